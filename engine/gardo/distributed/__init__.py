"""Where the loop runs: local.py (one process) and zero.py (DeepSpeed, imported only there)."""
