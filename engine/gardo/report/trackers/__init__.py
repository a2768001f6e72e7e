"""Where a run is watched beside its own folder: one file a tracker; base.py holds the protocol."""
