"""Model families: one file each; base.py holds the protocol and what all pipelines share."""

import logging

# PEFT imports bitsandbytes where it is installed, which on CPUs warns about 4-bit kernels.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
