"""Model families: one file each; base.py holds the protocol and what all pipelines share."""
