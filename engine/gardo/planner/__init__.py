"""What a recipe asks of a machine, before anything is downloaded: batch geometry, memory, time."""

from gardo.planner.geometry import Geometry, geometry

__all__ = ["Geometry", "geometry"]
