"""The ops' problems, one file each, found by listing: the file has the op's name, and one class."""

from importlib import import_module
from pkgutil import iter_modules

from ..cases import Problem


def _problem(op: str) -> type[Problem]:
    module = import_module(f"{__name__}.{op}")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    )
    return found


def find_problems() -> dict[str, type[Problem]]:
    """Every problem by its op; files that begin with _ are shared."""
    names = sorted(found.name for found in iter_modules(__path__))
    return {name: _problem(name) for name in names if not name.startswith("_")}


PROBLEMS = find_problems()
