"""Files of pairs: which of two pictures of a prompt someone preferred.

    {"prompt": "a red square", "first": "a.png", "second": "b.png", "preferred": "first"}

one JSON object a line. `preferred` is first, second, tie, or how sure of the first, from 0 to 1;
`margin` may say by how much the winner should be ahead. Pictures are beside the file, or wherever
their paths lead from there. What else a line says is left alone.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from gardo.data import load_lines
from gardo.types import Prompt

LABELS = {"first": 1.0, "second": 0.0, "tie": 0.5}
FORMATS = ["PNG", "JPEG", "WEBP"]
LONGEST = 8192  # pixels a side
LEAST = 20  # pairs of a file


@dataclass(frozen=True)
class Pair:
    """`preferred` is the probability that the first is better; `line` is its line in the file."""

    prompt: str
    first: Path
    second: Path
    preferred: float
    tied: bool  # the verdict was the word; a number of 0.5 is raters who were divided
    margin: float | None
    line: int


def load_pairs(path: Path) -> tuple[list[Pair], dict[Path, tuple[int, int]]]:
    """The pairs, and of each picture its height and width by its header.

    ValueError, opening with the file and the line, for the first thing that is wrong.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {str(path)!r}; give one JSON object a line, for each pair")
    pairs: list[Pair] = []
    sizes: dict[Path, tuple[int, int]] = {}
    for line, said in load_lines(path):
        try:
            pairs.append(_pair(said, path.parent, line, sizes))
        except ValueError as error:
            raise ValueError(f"{str(path)!r}, line {line}: {error}") from None
    if len(pairs) < LEAST:
        raise ValueError(f"{str(path)!r} has {len(pairs)} pairs; give at least {LEAST}")
    if all(pair.preferred == 0.5 for pair in pairs):
        raise ValueError(f"{str(path)!r} prefers nothing: every pair is a tie")
    return pairs, sizes


def _pair(said: Prompt, folder: Path, line: int, sizes: dict[Path, tuple[int, int]]) -> Pair:
    fields = said.metadata
    first, second = (_picture(fields, name, folder, sizes) for name in ("first", "second"))
    if first == second:
        raise ValueError(f"second: {fields['second']!r} is the first; a pair is two pictures")
    preferred = fields.get("preferred")
    if isinstance(preferred, str) and preferred in LABELS:
        value = LABELS[preferred]
    elif _is_number(preferred) and 0 <= preferred <= 1:  # type: ignore[operator]
        value = float(preferred)  # type: ignore[arg-type]
    else:
        said_so = f"{json.dumps(preferred)}" if "preferred" in fields else "missing"
        raise ValueError(
            f"preferred: {said_so}; write first, second, tie, or a number from 0 to 1, how sure "
            "the first is the better one"
        )
    margin = fields.get("margin")
    if margin is not None and not (_is_number(margin) and 0 <= margin <= 1e3):
        raise ValueError(f"margin: {json.dumps(margin)}; write a number of log-odds from 0 on")
    return Pair(str(said), first, second, value, preferred == "tie", margin, line)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _picture(fields: Any, name: str, folder: Path, sizes: dict[Path, tuple[int, int]]) -> Path:
    said = fields.get(name)
    if not isinstance(said, str) or not said.strip() or "\0" in said:
        shown = json.dumps(said) if name in fields else "missing"
        raise ValueError(f"{name}: {shown}; write the path of a picture, from the file's folder")
    path = folder / said
    if path not in sizes:
        if not path.is_file():
            raise ValueError(f"{name}: no such file: {str(path)!r}")
        sizes[path] = _size(path, name)
    return path


def _size(path: Path, name: str) -> tuple[int, int]:
    """Height and width, by the picture's header; its pixels are not read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # LONGEST is the limit
            with Image.open(path, formats=FORMATS) as picture:
                width, height = picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name}: {str(path)!r} is no picture ({error}); give a PNG, JPEG or WebP"
        ) from None
    if max(width, height) > LONGEST:
        raise ValueError(
            f"{name}: {str(path)!r} has {width} x {height} pixels; at most {LONGEST} a side"
        )
    return height, width


# ---- which are held out --------------------------------------------------------------------------


@dataclass(frozen=True)
class Split:
    """Pairs by their places in the file. `by` is prompt, or pair where there is one prompt."""

    train: list[int]
    held_out: list[int]
    by: str


def split(pairs: Sequence[Pair], share: float, seed: int) -> Split:
    """At least `share` of the pairs held out, whole prompts of them; one prompt stays at least.

    A hash of seed and text orders the prompts, so the order of the lines does not matter. Where
    there is one prompt, its pairs are divided: what is measured then is new pairs, not new prompts.
    """
    by = "prompt" if len({pair.prompt for pair in pairs}) > 1 else "pair"
    units: dict[str, list[int]] = {}
    for at, pair in enumerate(pairs):
        key = pair.prompt if by == "prompt" else f"{pair.first}\n{pair.second}\n{pair.line}"
        units.setdefault(key, []).append(at)
    order = sorted(units, key=lambda unit: hashlib.sha256(f"{seed}\n{unit}".encode()).digest())
    held_out: list[int] = []
    for unit in order[:-1]:
        if len(held_out) >= share * len(pairs):
            break
        held_out += units[unit]
    kept = set(held_out)
    return Split([at for at in range(len(pairs)) if at not in kept], sorted(held_out), by)
