"""The folder of an evaluation: result.json, pages made of it, and a grid of pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gardo.evaluation.compare import compare
from gardo.evaluation.images_log import difference
from gardo.evaluation.values import Values, summary, values_in
from gardo.files import write_atomically
from gardo.recipe_errors import RecipeError
from gardo.report.evaluation import as_html, as_markdown
from gardo.report.pictures import save_grid_of

FORMAT = 1


def result_of(
    evaluation: Mapping[str, Any], values: Values, *, name: str, shown: Sequence[int]
) -> dict[str, Any]:
    """JSON; `evaluation` is what the numbers depend on, `shown` are the prompts of the grid."""
    return {
        "format": FORMAT,
        "suite": {"name": name, **evaluation["suite"]},
        "model": evaluation["model"],
        "made_with": evaluation["made_with"],
        "shown": list(shown),
        **summary(values),
    }


def read_baseline(folder: Path, asks: Mapping[str, Any]) -> dict[str, Any]:
    """The result to compare with. RecipeError where there is none, or its suite asks other things
    than this one."""
    file = folder / "result.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        was, version = found["suite"]["asks"], found["format"]
    except FileNotFoundError:
        raise RecipeError(
            f"--against {folder}: no result.json there; give the folder of a finished evaluation"
        ) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(f"--against {file}: cannot be read ({error}); evaluate again") from None
    if version != FORMAT:
        raise RecipeError(
            f"--against {file}: of format {version}; this release reads {FORMAT}: evaluate again"
        )
    if was != asks:
        raise RecipeError(
            f"--against {folder}: its suite asks something else ({difference(was, dict(asks))}); "
            "evaluate both on one suite"
        )
    return dict(found)


def against_of(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """What changed from the baseline in a folder to this result: JSON."""
    baseline = read_baseline(folder, result["suite"]["asks"])
    here, there = values_in(result), values_in(baseline)
    notes = []
    for part in ("made_with", "model"):
        for name in (*result["made_with"], "precision", "base"):
            now, was = result[part].get(name), baseline[part].get(name)
            if now != was:
                notes.append(f"{name}: {was} at the baseline, {now} here")
    return {
        "folder": str(folder),
        "model": baseline["model"],
        "differs_in": notes,
        **compare(here, there),
    }


def write_result(
    folder: Path, result: Mapping[str, Any], pictures: Sequence[Path], *, columns: int
) -> list[Path]:
    """Writes the folder's four files, each whole or not at all; returns them, the page first.

    Many large pictures are made smaller for the grid.
    """

    def write(name: str, text: str) -> None:
        write_atomically(folder / name, f"{text}\n".encode("utf-8", "replace"))

    write("result.json", json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
    write("result.md", as_markdown(result))
    grid = save_grid_of(pictures, folder / "grid.png", columns)
    write("result.html", as_html(result, grid.read_bytes()))
    return [*(folder / f"result.{kind}" for kind in ("html", "md", "json")), grid]
