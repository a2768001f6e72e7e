"""What is kept of an iteration's pictures: a strip of thumbnails, and a line on each of them.

    samples/train-00041.png   thumbnails side by side, all of one size
    samples/train.jsonl       {"step": 41, "images": "samples/train-00041.png", "size": [256, 256],
                               "samples": [{"sample": 7, "prompt": "...", "shown": ["gated"],
                               "proxy": 0.91, "proxy_rank": 0.97, "uncertainty": 0.71,
                               "gated": true, "advantage": 0.4, "nearest": 0.2,
                               "rewards": {"hpsv2": {"value": 0.31, "rank": 0.2,
                                                     "role": "auxiliary"}}}]}

`samples` are in the order of the thumbnails. A rank is the share of the iteration's samples that
this one beats; what has no value is null. gardo/kept_samples.py writes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from gardo.files import write_atomically
from gardo.settings import Strict

FILE = Path("samples") / "train.jsonl"


class KeepSettings(Strict):
    """Which training pictures a run keeps, for its report: gated beside trusted, best and worst."""

    every: int | None = Field(
        None, ge=1, description="iterations; the first and the last are always kept. As often as "
        "evaluations if left out",
    )  # fmt: skip
    count: int = Field(4, ge=1, le=16, description="pictures of each kind")
    longest: int = Field(
        256, ge=16, le=1024, description="longest side of a kept picture, in pixels"
    )
    most: int = Field(
        50, ge=2, description="iterations of which pictures are kept: a long run keeps them less "
        "often than `every`",
    )  # fmt: skip

    def due(self, step: int, last: int, evaluations: int) -> bool:
        """Whether pictures of iteration `step`, counted from 1, of `last` are kept."""
        between = max(self.every or evaluations, math.ceil(last / (self.most - 1)))
        return step in (1, last) or step % between == 0


def picture_of(step: int) -> Path:
    """Where the strip of an iteration lies in the run's folder."""
    return FILE.with_name(f"train-{step:05d}.png")


def read_kept(run_folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, oldest first; without those that are damaged or have no picture."""
    found = []
    path = run_folder / FILE
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            record = json.loads(line)
            there = (run_folder / picture_of(int(record["step"]))).is_file()
        except (ValueError, LookupError, TypeError):
            continue
        if there and isinstance(record.get("samples"), list):
            found.append(record)
    return found


def keep(run_folder: Path, record: Mapping[str, Any]) -> None:
    """Adds a line; those of its iteration and of later ones, of before a resume, go."""
    _write(run_folder, [*_before(run_folder, record["step"]), record])


def forget_after(run_folder: Path, step: int) -> None:
    """Drops what lies after `step`: a resumed run will write it again."""
    if (run_folder / FILE).is_file():
        _write(run_folder, _before(run_folder, step + 1))


def _before(run_folder: Path, step: int) -> list[dict[str, Any]]:
    return [record for record in read_kept(run_folder) if record["step"] < step]


def _write(run_folder: Path, records: list[Any]) -> None:
    lines = "".join(json.dumps(r, ensure_ascii=False, allow_nan=False) + "\n" for r in records)
    # a lone surrogate of a badly decoded prompt becomes \udc80, as in metrics.jsonl
    write_atomically(run_folder / FILE, lines.encode("utf-8", "backslashreplace"))
