"""The file of kept pictures, when they are due, and the report's sections made of it."""

from __future__ import annotations

import io
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from gardo.report.gated import best_and_worst_section, gated_section
from gardo.report.kept import FILE, KeepSettings, forget_after, keep, picture_of, read_kept
from gardo.report.pictures import save_grid
from tests.engine.report.records import EVIL

COLOURS = {"gated": 0.0, "trusted": 0.3, "best": 0.5, "worst": 1.0}


def sample(kind: str, **changes: Any) -> dict[str, Any]:
    rewards = {
        "judge": {"value": None, "rank": None, "role": "held_out"},
        "shape": {"value": -0.5, "rank": 0.125, "role": "auxiliary"},
        "count": {"value": 0.9, "rank": 0.96, "role": "proxy"},
    }
    return {
        "sample": 3, "prompt": EVIL, "shown": [kind], "proxy": 0.9, "proxy_rank": 0.96,
        "uncertainty": 0.835, "gated": kind == "gated", "advantage": 1.5, "nearest": None,
        "rewards": rewards,
    } | changes  # fmt: skip


def kept(folder: Path, step: int, kinds: tuple[str, ...] = tuple(COLOURS)) -> dict[str, Any]:
    """Keeps an iteration whose thumbnails are of one grey each."""
    greys = torch.tensor([COLOURS[kind] for kind in kinds])
    images = greys[:, None, None, None].expand(-1, 3, 8, 6)
    save_grid(images, folder / picture_of(step), columns=len(kinds), scale=1, padding=0)
    samples = [sample(kind) for kind in kinds]
    record = {"step": step, "images": str(picture_of(step)), "size": [6, 8], "samples": samples}
    keep(folder, record)
    return record


def test_pictures_are_due_with_evaluations_unless_the_recipe_says_otherwise() -> None:
    def due(last: int, **settings: int) -> list[int]:
        return [s for s in range(1, last + 1) if KeepSettings(**settings).due(s, last, 20)]

    assert due(50) == [1, 20, 40, 50]
    assert due(10, every=4) == [1, 4, 8, 10]
    assert due(1) == [1]
    assert len(due(5000, every=1)) <= 51 and len(due(5000, every=1, most=4)) <= 5


def test_lines_of_later_iterations_go_when_a_run_goes_back(tmp_path: Path) -> None:
    assert read_kept(tmp_path) == []
    forget_after(tmp_path, 3)
    assert not (tmp_path / FILE).exists()
    records = [kept(tmp_path, step) for step in (1, 20, 40)]
    assert read_kept(tmp_path) == records
    forget_after(tmp_path, 20)
    assert read_kept(tmp_path) == records[:2]
    again = kept(tmp_path, 20, ("best", "worst"))
    assert read_kept(tmp_path) == [records[0], again]


def test_damaged_lines_and_lines_without_a_picture_are_left_out(tmp_path: Path) -> None:
    records = [kept(tmp_path, step) for step in (1, 2, 3)]
    (tmp_path / picture_of(2)).unlink()
    with open(tmp_path / FILE, "a") as file:
        file.write('{"step": "x", "samples": []}\n[]\n{"step": 3}\n{"st')
    assert read_kept(tmp_path) == [records[0], records[2]]


def greys(html: str) -> list[float]:
    """The pictures inside, as their grey."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    pictures = [Image.open(io.BytesIO(b64decode(one))).convert("L") for one in found]
    assert all(one.size == (6, 8) for one in pictures)
    return [round(one.getpixel((3, 4)) / 255, 1) for one in pictures]


def test_gated_stand_beside_trusted_with_their_ranks(tmp_path: Path) -> None:
    assert gated_section(tmp_path) == best_and_worst_section(tmp_path) == ""
    for step in range(1, 8):
        kept(tmp_path, step)
    kept(tmp_path, 8, ("best", "worst"))  # an iteration whose gate took none
    gated = gated_section(tmp_path)
    assert gated.startswith('<p class="soft">A bar is the share of the step')
    assert (
        gated.index("<h3>Step 7</h3>") < gated.index("<h3>Step 6</h3>")
        and "Before: step 6, 3, 1" in gated
    )
    assert greys(gated) == [0.0, 0.3] * 4
    assert "<span>count</span><span>0.900</span>" in gated and 'title="beats 96 %"' in gated
    assert 'style="width:12%"' in gated
    assert "judge: no value" in gated and "<span>uncertainty</span><span>0.83</span>" in gated
    proxy, auxiliary, judge = (gated.index(name) for name in (">count<", ">shape<", ">judge:"))
    assert proxy < auxiliary < judge
    assert "<script>" not in gated and "&lt;script&gt;" in gated
    assert greys(best_and_worst_section(tmp_path))[:2] == [0.5, 1.0]


def test_a_strip_that_cannot_be_read_leaves_its_figures_out(tmp_path: Path) -> None:
    kept(tmp_path, 1)
    (tmp_path / picture_of(1)).write_bytes(b"no picture")
    assert "<img" not in gated_section(tmp_path)
