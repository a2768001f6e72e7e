"""What judges pictures: one file for each reward, the protocol in base.py."""
