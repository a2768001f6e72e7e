"""What is heavy loads when it is used: a recipe is read, checked and refused without torch.

The `gardo` command puts off `HEAVY` before it imports anything else of ours. Modules that it reads
recipes with import them as wholes (`import torch`) and use nothing of them while they are imported:
names for annotations stand under TYPE_CHECKING, and `no_grad` here decorates for `torch.no_grad`.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

HEAVY = ("torch", "numpy", "gardo_kernels")


class _Later(ModuleType):
    """A module that runs when it is asked for what it does not have yet.

    importlib's LazyLoader runs it at the statement `import` already, which asks for `__spec__`.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec and spec.loader
        self.__class__ = ModuleType  # type: ignore[assignment]  # a module like others
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        spec.loader.exec_module(self)
        return getattr(self, name)


def put_off(names: Sequence[str] = HEAVY) -> None:
    """Has modules load at the first use of something in them. Those that are loaded stay."""
    for name in names:
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if spec and spec.loader:
            sys.modules[name] = later = _Later(name)
            later.__spec__, later.__loader__, later.__package__ = spec, spec.loader, name
            later.__file__ = spec.origin


def load_now(names: Sequence[str] = HEAVY) -> None:
    """Before threads begin: two that come first at once would both load a module."""
    for name in names:
        getattr(sys.modules.get(name), "__path__", None)


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """As `torch.no_grad()`, of a function that is no generator."""

    @functools.wraps(function)
    def without(*args: P.args, **kwargs: P.kwargs) -> R:
        import torch

        with torch.no_grad():
            return function(*args, **kwargs)

    return without
