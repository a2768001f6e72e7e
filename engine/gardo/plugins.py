"""Names in a recipe -> Python objects.

`flow_grpo` is a module of a package of ours, `my.module:Name` a user's own. Adding an algorithm, a
reward or a model family is one new file: its name is the file's name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
from typing import Any


def names(package: str, *, hidden: tuple[str, ...] = ("base",)) -> list[str]:
    """The built-in names of a package ("gardo.algorithms"): its modules that define `PLUGIN`.

    They are read, not imported: some take seconds.
    """
    path = importlib.import_module(package).__path__
    found = [m.name for m in pkgutil.iter_modules(path) if m.name not in hidden]
    return sorted(n for n in found if "PLUGIN" in _globals_of(f"{package}.{n}"))


def _globals_of(module: str) -> tuple[str, ...]:
    """The names that a module's own code uses."""
    spec = importlib.util.find_spec(module)
    code = spec.loader.get_code(module) if spec and spec.loader else None  # type: ignore[attr-defined]
    return code.co_names if code else ()


def resolve(package: str, name: str) -> Any:
    """The plug-in called `name`: a module's `PLUGIN`, or what a path "module:attribute" names.

    ValueError says which names exist.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # as `python -m` does: a user's file lies there
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{name!r} cannot be imported ({error})") from error
        except (Exception, SystemExit) as error:  # whatever a user's module does when it is run
            said = f"{type(error).__name__}: {error}"
            raise ValueError(f"{name!r} cannot be imported ({said})") from error
    # Only the module that is named, not all of the package: some import what takes seconds.
    if name.isidentifier() and importlib.util.find_spec(f"{package}.{name}"):
        plugin = getattr(importlib.import_module(f"{package}.{name}"), "PLUGIN", None)
        if plugin is not None:
            return plugin
    known = ", ".join(names(package))
    raise ValueError(f"{name!r} is none of {known}, nor a dotted path module:Name")
