"""Where the loop runs: local.py (one process) and zero3.py (DeepSpeed, the only file that imports it); slots.py."""
