"""The pictures of evaluations: grids of the same prompts and noise, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from gardo.report.metrics_log import Record
from gardo.report.page import picture, text


def picture_path(run_folder: Path, evaluation: Record) -> Path | None:
    """The evaluation's picture, if it is a readable PNG inside the run's folder."""
    if not isinstance(evaluation.get("images"), str):
        return None
    path: Path = (run_folder / evaluation["images"]).resolve()
    if not path.is_relative_to(run_folder.resolve()) or not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, SyntaxError, Image.DecompressionBombError):  # Pillow's ways to refuse
        return None
    return path


def image(run_folder: Path, evaluation: Record, longest: int) -> str:
    """The picture of an evaluation that has one, as an `<img>` of at most so many pixels a side."""
    path = picture_path(run_folder, evaluation)
    assert path is not None, "only evaluations with a picture come here"
    return picture(path.read_bytes(), longest, f"samples at step {evaluation['step']}")


def side_by_side(columns: Sequence[tuple[str, str]], prompts: Sequence[str]) -> str:
    """(caption, `<img>` of a grid) beside each other, and before them the prompt of each row."""
    captions = "".join(
        f'<div class="caption"><b>{text(caption)}</b></div>' for caption, _ in columns
    )
    labels = "".join(f'<span title="{text(prompt)}">{text(prompt)}</span>' for prompt in prompts)
    rows = f"grid-template-rows:repeat({max(1, len(prompts))},minmax(0,1fr))"
    style = f"grid-template-columns:minmax(90px,150px) repeat({len(columns)},minmax(240px,1fr))"
    images = "".join(image for _, image in columns)
    return (
        f'<div class="grids" style="{style}"><div></div>{captions}'
        f'<div class="prompts" style="{rows}">{labels}</div>{images}</div>'
    )
