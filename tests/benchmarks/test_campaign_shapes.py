"""The sweep of launch shapes: what it tries, what it keeps, the file that the ops read."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from campaign import shapes
from campaign.shapes import GAIN, Size, sizes, winners
from campaign.table import Table
from core_ops.cases import Case
from core_ops.machine import Machine
from core_ops.shapes import OPS, PROBLEMS, gpu_cases
from gardo_kernels import _gram_tiles, _launch_shape
from gardo_kernels._examples import On, op_modules
from gardo_kernels._launch_shape import LaunchShape, read_shapes, size_class
from tests.kernels.launches import recorded

CPU = torch.device("cpu")
DEFAULT = LaunchShape()


def row(shape, median_us, *, default=False, up_to=4096, status="done"):
    found = {"launched_as": "sde_step", "capability": "9.0", "up_to": up_to, "default": default,
             "status": status, "median_us": median_us}  # fmt: skip
    return {name: str(value) for name, value in (found | shape._asdict()).items()}


def test_only_what_is_faster_by_more_than_noise_is_kept():
    fast, wrong = DEFAULT._replace(block=2048), DEFAULT._replace(warps=8)
    rows = [
        row(DEFAULT, 10.0, default=True), row(fast, 10.0 / GAIN - 0.01), row(wrong, 9.9),
        row(DEFAULT, 10.0, default=True, up_to=4**9), row(fast, 9.8, up_to=4**9),
        row(DEFAULT, "", default=True, up_to=4**8, status="failed"), row(fast, 70.0, up_to=4**8),
        row(DEFAULT, 10.0, default=True, up_to=4**7),
        row(fast, 1.0, up_to=4**7, status="failed"), row(wrong, "", up_to=4**7),
    ]  # fmt: skip
    assert winners(rows) == {("sde_step", "9.0", 4**6): fast, ("sde_step", "9.0", 4**8): fast}


def test_every_op_is_swept_once_in_every_size_class():
    found = sizes(gpu_cases(OPS, quick=False), CPU)
    assert {size.op for size in found} == set(OPS)
    assert len({size.key for size in found}) == len(found)
    of_loss = [size.up_to for size in found if size.op == "policy_loss"]
    assert sorted(of_loss) == [4**k for k in range(8, 13)]
    for size in found:
        tried = PROBLEMS[size.op].launch_shapes(size.case)
        assert len(set(tried)) == len(tried) > 3
        assert all(shape.chunk % min(shape.block, shape.chunk) == 0 for shape in tried)
        assert size_class(1, size.case.elements) == size.up_to


@pytest.mark.parametrize("op", OPS)
def test_the_first_shape_tried_is_what_the_op_takes(op):
    with recorded() as launches:
        list(op_modules()[op].examples(On("triton", CPU)))
    case = PROBLEMS[op].cpu_cases(op, quick=True)[0]
    first = PROBLEMS[op].launch_shapes(case)[0]
    blocks = [launch.arguments["BLOCK"] for launch in launches if "BLOCK" in launch.arguments]
    assert first.block in blocks
    assert first.warps in [launch.arguments["num_warps"] for launch in launches]


def test_the_first_tile_tried_is_what_one_large_group_takes():
    case = Case("nearest_cosine", (1, 4096, 1024), torch.float32)
    problem = PROBLEMS["nearest_cosine"]
    assert problem.launched_as(case) == "gram_tiles"
    assert problem.launch_shapes(case)[0] == _gram_tiles.DEFAULT


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Two ops swept on a CPU, one of them with a shape that gives wrong numbers."""
    monkeypatch.setattr(shapes, "this_machine", lambda kind: Machine())
    monkeypatch.setattr(shapes, "REPS", 5)
    wrong = LaunchShape(chunk=1000)  # not a whole number of blocks: the last elements count twice
    tried = {"policy_loss": [DEFAULT, wrong], "sde_step": [DEFAULT, LaunchShape(block=512)]}
    for op, some in tried.items():
        monkeypatch.setattr(PROBLEMS[op], "launch_shapes", classmethod(lambda *_, s=some: s))
    command = ["--out", str(tmp_path), "--small", "--op", *tried]
    return tmp_path, command


def rows_in(folder):
    with (folder / "shapes.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_sweep_is_resumed_checks_before_it_times_and_writes_what_the_ops_read(swept):
    folder, command = swept
    assert shapes.main([*command, "--seconds", "-1"]) == 4  # unfinished
    assert {r["status"] for r in rows_in(folder)} == {"left out"}
    assert shapes.main(command) == 0
    rows = rows_in(folder)
    assert [(r["op"], r["default"], r["status"]) for r in rows] == [
        ("policy_loss", "True", "done"), ("policy_loss", "False", "failed"),
        ("sde_step", "True", "done"), ("sde_step", "False", "done"),
    ]  # fmt: skip
    assert "ParityError" in rows[1]["note"] and not rows[1]["median_us"]
    assert all(float(r["median_us"]) > 0 for r in rows if r["status"] == "done")
    again = (folder / "shapes.csv").read_text()
    assert shapes.main(command) == 0 and (folder / "shapes.csv").read_text() == again
    table = json.loads((folder / "launch_shapes.json").read_text())
    assert read_shapes(table) == winners(rows) and "CPU" in table["measured"]
    assert not _launch_shape.measured_shapes()  # nothing tried is left behind


def test_the_file_is_taken_by_the_ops_and_keeps_other_gpus(swept, monkeypatch):
    folder, command = swept
    shapes.main(command)
    table, faster = Table(folder / "shapes.csv", shapes.COLUMNS), LaunchShape(block=512)
    for found in table.rows:
        if found["op"] == "sde_step":
            found["median_us"] = "8.0" if found["default"] == "True" else "4.0"
    other = ("sde_step", "8.0", 4**9)
    with _launch_shape.trying(other, faster):
        shapes.write_winners(table)
    monkeypatch.setattr(_launch_shape, "FILE", folder / "launch_shapes.json")
    _launch_shape.measured_shapes.cache_clear()
    try:
        assert _launch_shape.launch_shape("sde_step", 2, 1024, CPU) == faster
        assert _launch_shape.measured_shapes()[other] == faster
        assert _launch_shape.launch_shape("policy_loss", 2, 1024, CPU) == DEFAULT
    finally:
        _launch_shape.measured_shapes.cache_clear()


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert shapes.main(["--out", str(tmp_path)]) == 3
    assert capsys.readouterr().out == "needs an NVIDIA GPU\n"


def test_a_size_is_its_case():
    size = Size("policy_loss", "3x1024x64", "bfloat16", "policy_loss", "9.0", 4**9)
    assert size.case.shape == (3, 1024, 64) and size.case.dtype == torch.bfloat16
    assert size.key == ("policy_loss", "9.0", 4**9)
