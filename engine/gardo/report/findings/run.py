"""A run as the rules see it, and what they find."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gardo.report.metrics_log import Record

Severity = Literal["warning", "note", "good"]
ORDER: tuple[Severity, ...] = ("warning", "note", "good")

RECENT = 20  # steps
ENOUGH = 5  # of them, before anything is said of training


@dataclass(frozen=True)
class Finding:
    """Plain text. `about`: the metrics that it rests on, as their charts are named."""

    severity: Severity
    sentence: str
    advice: str
    about: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """What a run has logged, with its resolved recipe and environment as mappings, maybe empty."""

    steps: Sequence[Record]
    evaluations: Sequence[Record]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recent(self) -> Sequence[Record]:
        return self.steps[-RECENT:]

    def metric(self, name: str) -> list[float]:
        """The finite values of a metric in the last steps; none of them where these are too few."""
        values = [step.get("metrics", {}).get(name) for step in self.recent]
        known = [value for value in values if value is not None and math.isfinite(value)]
        return known if len(known) >= ENOUGH else []

    def setting(self, path: str) -> Any:
        """A field of the recipe; None where it is not there."""
        section: Any = self.recipe
        for part in path.split("."):
            section = section.get(part) if isinstance(section, Mapping) else None
        return section

    def algorithm(self, path: str) -> Any:
        """A field of the algorithm, or of the one that it is wrapped around."""
        layer, prefix = self.setting("algorithm"), "algorithm"
        while isinstance(layer, Mapping):
            if (found := self.setting(f"{prefix}.{path}")) is not None:
                return found
            layer, prefix = layer.get("base"), f"{prefix}.base"
        return None

    def events(self, beginning: str) -> int:
        """How many of the last steps have an event that begins like this."""
        return sum(any(e.startswith(beginning) for e in s.get("events", ())) for s in self.recent)
