"""Cases: small training runs as data. What their words mean is in recipes.py, faults.py, probes.py.

worker.py runs them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

LOOK = ("slots", "teachers")  # what every engine promises


@dataclass(frozen=True)
class Case:
    """A run, and what is looked at; `name` is its file's and its test's."""

    algorithm: str  # of recipes.ALGORITHMS
    weights: str  # lora or full
    engine: str  # local (one process without DeepSpeed), or stage0 to stage3
    options: tuple[str, ...] = ()  # of recipes.TRAINING and recipes.LAYOUT
    steps: int = 3  # a reference that is reset is reset after the second; the third has the new one
    kernels: str = "auto"
    fault: str | None = None  # of faults.FAULTS
    cut: int | None = None  # stops dead after so many gradient steps, as a killed run would
    resume: bool = False  # goes on with what a cut left behind
    reshard: bool = False  # trains nothing: saves the newest checkpoint again, from these ranks
    probes: tuple[str, ...] = LOOK  # of probes.PROBES

    @property
    def base(self) -> str:
        """The case without what befalls it."""
        parts = [self.algorithm, self.weights, self.engine, *self.options]
        parts += [self.kernels] if self.kernels != "auto" else []
        return "-".join(parts)

    @property
    def run(self) -> str:
        """The run's name and folder: a cut run and its resumption share it."""
        befalls = [self.fault] if self.fault else []
        befalls += [f"cut{self.cut}"] if self.cut is not None else []
        return "-".join([self.base, *befalls])

    @property
    def name(self) -> str:
        return self.run + ("-resumed" if self.resume else "") + ("-reshard" if self.reshard else "")

    def __str__(self) -> str:
        return self.name

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def plus(self, *options: str) -> Case:
        return replace(self, options=(*self.options, *options))

    def has(self, option: str) -> bool:
        return option in self.options


def dumps(cases: Iterable[Case]) -> str:
    """The cases as JSON, for a command line."""
    return json.dumps([asdict(case) for case in cases])


def loads(text: str) -> list[Case]:
    tuples = ("options", "probes")
    return [Case(**{**c, **{name: tuple(c[name]) for name in tuples}}) for c in json.loads(text)]
