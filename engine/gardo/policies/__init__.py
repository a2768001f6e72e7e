"""Model families. base.py holds the protocol and what all diffusers pipelines share; one more file for each family."""
