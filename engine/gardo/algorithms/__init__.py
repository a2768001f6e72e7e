"""One file for each algorithm behind the protocol of base.py; gardo.py wraps any that has a KL."""

from gardo.algorithms.base import SamplerSettings, World, build

__all__ = ["SamplerSettings", "World", "build"]
