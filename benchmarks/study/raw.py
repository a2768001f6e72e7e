"""A cell's raw metrics, as they are committed: what the tables and figures are made of.

One JSON object a line, floats in five digits. First what the cell is:

    {"kind": "cell", "arm": "gardo", "seed": 3, "identity": "9f3c...", "seconds": 190.2,
     "revision": "83d4457", "machine": "...", "gpu": ""}

then its `step` and `evaluation` records as `gardo.report.metrics_log` has them, less what only a
run's own report shows. An evaluation has `drift` too (study/drift.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gardo.files import write_atomically
from gardo.report.metrics_log import Record
from study.protocol import Cell

EVALUATION = ("kind", "step", "by_prompt", "diversity", "drift")
METRICS = ("ratio", "clip_fraction", "grad_norm", "kl", "gate_share", "gate_fraction", "nearest",
           "disagreement")  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """What a cell left."""

    about: Record
    steps: list[Record]
    evaluations: list[Record]

    @property
    def evaluated(self) -> list[int]:
        return [r["step"] for r in self.evaluations]


def path_of(folder: Path, cell: Cell) -> Path:
    return folder / f"{cell.name}.jsonl"


def samples_of(folder: Path, cell: Cell) -> Path:
    """The pictures of its last evaluation."""
    return folder / f"{cell.name}.png"


def read(path: Path) -> Raw:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    about, *rest = records
    kinds = {k: [r for r in rest if r["kind"] == k] for k in ("step", "evaluation")}
    return Raw(about, kinds["step"], kinds["evaluation"])


def known(folder: Path, cell: Cell) -> Raw | None:
    """What is there of this very cell; None where it is missing or another recipe's."""
    path = path_of(folder, cell)
    if not path.is_file():
        return None
    raw = read(path)
    return raw if raw.about["identity"] == cell.identity else None


def write(path: Path, about: Record, records: Iterable[Record]) -> None:
    lines = [about, *map(_kept, records)]
    text = "".join(json.dumps(_short(line), separators=(",", ":")) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _kept(record: Record) -> Record:
    if record["kind"] == "evaluation":
        return {name: record[name] for name in EVALUATION}
    metrics = {
        name: value
        for name, value in record["metrics"].items()
        if name in METRICS or name.startswith(("paper_", "official_code_"))
    }
    rewards = {name: reward["mean"] for name, reward in record["rewards"].items()}
    kept = {"kind": "step", "step": record["step"], "rewards": rewards, "metrics": metrics}
    return kept | ({"events": record["events"]} if record["events"] else {})


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _short(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_short(inner) for inner in value]
    return value
