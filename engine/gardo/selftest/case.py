"""A case of the self-test: what is done to a run, and what must hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gardo.selftest.trial import Trial


class Broken(AssertionError):
    """What must hold does not."""


@dataclass(frozen=True)
class Case:
    """`check` does it in a folder of its own, and raises Broken where it does not hold.

    `name` is kebab-case; `done` and `holds` are sentences for a table, without a full stop. `quick`
    cases take seconds and belong to every run of the tests.
    """

    name: str
    done: str
    holds: str
    check: Callable[[Trial], None]
    quick: bool = True


def must(holds: bool, otherwise: object) -> None:
    """Broken, saying what there is instead, unless it holds."""
    if not holds:
        raise Broken(str(otherwise)[-3000:])
