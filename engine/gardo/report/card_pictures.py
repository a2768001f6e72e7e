"""Pictures of a run for its model card: the grids before and after, and one picture a prompt."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from gardo.files import write_atomically
from gardo.report.metrics_log import Record

GRID, SAMPLE = 1600, 1024  # longest side, pixels
GAP = 2  # of the grids that evaluations write (pictures.py)
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # Pillow's refusals


@dataclass(frozen=True)
class Shown:
    """Files of the card's folder, by name."""

    before_and_after: Sequence[tuple[int, str]] = ()  # iterations and grids
    prompts: Sequence[str] = ()  # of the grids' rows
    samples: Sequence[tuple[str, str]] = ()  # a prompt and a picture of it, after training


def write_pictures(
    folder: Path, run_folder: Path, evaluations: Sequence[Record], *, columns: int
) -> Shown:
    """Copies into `folder` the first and the last evaluation's grid, made smaller, and the first
    of the last one's `columns` pictures a prompt. OSError where nothing can be written."""
    grids = [(one, grid) for one in evaluations if (grid := _grid(run_folder, one))]
    if not grids:
        return Shown()
    folder.mkdir(parents=True, exist_ok=True)
    ends = {"before": grids[0], "after": grids[-1]} if len(grids) > 1 else {"after": grids[-1]}
    kept = [
        (int(one["step"]), _written(grid, folder / f"{name}.png", GRID))
        for name, (one, grid) in ends.items()
    ]
    last, grid = grids[-1]
    prompts = [str(prompt) for prompt in last.get("prompts", ())]
    samples = [
        (prompt, _written(cell, folder / f"sample-{number}.png", SAMPLE))
        for number, (prompt, cell) in enumerate(
            zip(prompts, _first_column(grid, len(prompts), columns), strict=False), start=1
        )
    ]
    return Shown(kept, prompts, samples)


def _grid(run_folder: Path, evaluation: Record) -> Image.Image | None:
    """The evaluation's picture, if it is a readable PNG inside the run's folder."""
    if not isinstance(evaluation.get("images"), str):
        return None
    path = (run_folder / evaluation["images"]).resolve()
    if not path.is_relative_to(run_folder.resolve()):
        return None
    try:
        with Image.open(path, formats=["PNG"]) as found:
            return found.convert("RGB")
    except UNREADABLE:
        return None


def _first_column(grid: Image.Image, rows: int, columns: int) -> list[Image.Image]:
    """The first picture of each row; none where the grid is not of so many rows and columns."""
    width, height = grid.width - GAP, grid.height - GAP
    if not rows or width % columns or height % rows:
        return []
    across, down = width // columns, height // rows
    if min(across, down) <= GAP:
        return []
    corners = ((GAP, GAP + row * down) for row in range(rows))
    return [grid.crop((x, y, x + across - GAP, y + down - GAP)) for x, y in corners]


def _written(image: Image.Image, path: Path, longest: int) -> str:
    """Writes a PNG of at most that size; returns its name."""
    smaller = image.copy()
    smaller.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    smaller.save(encoded, format="PNG", optimize=True)
    write_atomically(path, encoded.getvalue())
    return path.name
