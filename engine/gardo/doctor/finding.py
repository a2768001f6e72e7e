"""What the doctor found: a line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["ok", "note", "problem"]
ORDER: tuple[State, ...] = ("ok", "note", "problem")


@dataclass(frozen=True)
class Finding:
    """One line of the report, which ends with the mend; a problem keeps recipes from running."""

    name: str
    state: State
    detail: str
    facts: Mapping[str, Any] = field(default_factory=dict)  # for scripts, beside the rest

    def as_text(self) -> str:
        return f"{self.state:8} {self.name:22} {self.detail}"

    def as_data(self) -> dict[str, Any]:
        return {"name": self.name, "state": self.state, "detail": self.detail, **self.facts}


def worst(findings: Iterable[Finding]) -> State:
    return max((finding.state for finding in findings), key=ORDER.index, default="ok")
