"""What a measurement's exit code says to ../gpu_campaign.py, besides 0 and failure."""

NEEDS_GPU = 3  # and there is none: nothing was measured
UNFINISHED = 4  # the time was spent: run again, it goes on
NEEDS_MORE = 5  # a package, or what another step makes; the last line says which
