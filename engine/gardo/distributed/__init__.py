"""Where the loop runs: local.py (one process) and zero3.py (DeepSpeed, imported only there)."""
