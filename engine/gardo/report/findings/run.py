"""A run as the rules see it, and what they find."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from gardo.report.environment import read_environment
from gardo.report.metrics_log import Record, read_metrics

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

    @classmethod
    def of(cls, run_folder: Path) -> Self:
        """What lies in a run's folder. FileNotFoundError where it has no `metrics.jsonl`."""
        records = read_metrics(run_folder / "metrics.jsonl")
        starts = read_environment(run_folder)
        return cls(
            steps=[record for record in records if record["kind"] == "step"],
            evaluations=[record for record in records if record["kind"] == "evaluation"],
            recipe=_recipe(run_folder / "recipe.yaml"),
            environment=starts[-1] if starts else {},
        )

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


def _recipe(path: Path) -> dict[str, Any]:
    """The resolved recipe; empty where it is missing or damaged."""
    try:
        found = yaml.safe_load(path.read_text("utf-8", "replace"))
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
