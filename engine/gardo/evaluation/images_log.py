"""`images.jsonl`: what an evaluation has measured so far, so that a cut one goes on.

The first line says which evaluation it is. Each other line is an image: its number, its prompt's,
its rewards (null where it has none), labels, and features as base64 of little-endian float32. Lines
are appended a batch at a time; a batch of which a line is missing is measured again.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gardo.evaluation.drawing import FEATURES, LABEL, REWARD, of_kind
from gardo.evaluation.values import number
from gardo.files import write_atomically

Row = dict[str, Any]


class ImagesLog:
    """The log of one evaluation in a folder. ValueError where the folder has another's."""

    def __init__(self, path: Path, evaluation: Mapping[str, Any]) -> None:
        """`evaluation` is JSON; what is in the file must be equal to it."""
        self.path = path
        self.evaluation: dict[str, Any] = json.loads(json.dumps(evaluation))
        head = {"evaluation": self.evaluation}
        self.rows: dict[int, Row] = {}
        lines = _lines(path)
        if lines and lines[0] != head:
            was = lines[0].get("evaluation")
            raise ValueError(
                f"{path} is of another evaluation ({difference(was, self.evaluation)}); give "
                "another --out, or remove it"
            )
        for row in lines[1:]:
            if isinstance(row.get("image"), int):
                self.rows[row["image"]] = row
        kept = [head, *(self.rows[image] for image in sorted(self.rows))]
        write_atomically(path, b"".join(map(_line, kept)))

    def append(self, rows: Sequence[Row]) -> None:
        with open(self.path, "ab") as file:
            file.write(b"".join(map(_line, rows)))
            file.flush()
            os.fsync(file.fileno())
        self.rows |= {row["image"]: row for row in rows}

    def columns(self) -> dict[str, Tensor]:
        """The columns of `drawing.judged` of all images, in order of their numbers."""
        rows = [self.rows[image] for image in sorted(self.rows)]
        found: dict[str, Tensor] = {}
        for name in rows[0]["rewards"]:
            values = [math.nan if r["rewards"][name] is None else r["rewards"][name] for r in rows]
            found[f"{REWARD}/{name}"] = torch.tensor(values, dtype=torch.float32)
        for name in rows[0].get("labels", {}):
            found[f"{LABEL}/{name}"] = torch.tensor([r["labels"][name] for r in rows])
        if FEATURES in rows[0]:
            found[FEATURES] = torch.stack([_features(r[FEATURES]) for r in rows])
        return found


def rows_of_batch(image_B: Tensor, prompt_B: Tensor, columns: dict[str, Tensor]) -> list[Row]:
    """The lines of a batch."""
    rows: list[Row] = []
    for at, image in enumerate(image_B.tolist()):
        row: Row = {"image": image, "prompt": int(prompt_B[at])}
        rewards, labels = of_kind(columns, REWARD), of_kind(columns, LABEL)
        row["rewards"] = {n: number(float(value_B[at])) for n, value_B in rewards.items()}
        if labels:
            row["labels"] = {name: int(label_B[at]) for name, label_B in labels.items()}
        if FEATURES in columns:
            data = columns[FEATURES][at].float().cpu().contiguous().numpy().tobytes()
            row[FEATURES] = base64.b64encode(data).decode()
        rows.append(row)
    return rows


def _features(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float32)


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that is there; not those of lines that a crash tore."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def difference(was: Any, now: Any, name: str = "") -> str:
    """The first value that differs: `steps: 8 there, 4 here`."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(key for key in now if key not in was)]:
            if was.get(key) != now.get(key):
                return difference(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    shown = [text if len(text) < 60 else f"{text[:60]}..." for text in map(repr, (was, now))]
    return f"{name}: {shown[0]} there, {shown[1]} here"
