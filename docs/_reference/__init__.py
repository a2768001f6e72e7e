"""What docs/make_reference.py writes, a module a page."""
