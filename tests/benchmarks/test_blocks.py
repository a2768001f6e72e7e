"""The count of a transformer block's ops, and the reading of Inductor's code for a GPU."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest

from tests import ROOT

SMALL = """
import sys
import bench_blocks as bench
bench.SAMPLES, bench.TEXT, bench.IMAGE, bench.LAYOUTS = 2, 16, 48, ["plain"]
sys.argv = ["bench_blocks", "--out", sys.argv[1]]
raise SystemExit(bench.main())
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of short sequences, in a process of its own: kernels are compiled there, not interpreted."""
    out = tmp_path_factory.mktemp("blocks") / "counts.csv"
    path = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels", "benchmarks", "."))
    done = subprocess.run(
        [sys.executable, "-c", SMALL, str(out)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = list(csv.DictReader(out.open(encoding="utf-8")))
    return {(row["op"], row["layout"], row["pass"]): row for row in found}


def test_an_op_is_one_launch_each_way_and_a_compiler_places_it_without_copies(rows):
    assert len({op for op, *_ in rows}) == 5 and len(rows) == 5 * 2
    for (op, *_), row in rows.items():
        assert row["triton_launches"] == row["placed_launches"] == "1", (op, row)
        assert int(row["eager_launches"]) >= 1
        assert float(row["triton_bytes"]) <= float(row["eager_bytes"]) + 0.5


@pytest.mark.parametrize(("way", "tensors"), [("forward", 4), ("backward", 5)])
def test_a_residual_and_the_norm_behind_it_move_the_least(rows, way, tensors):
    """x, y, z, m; the gradients of z and m, z, those of x and y: and rows of the modulation."""
    row = rows["residual_adaln", "plain", way]
    assert (row["inductor_launches"], row["triton_launches"]) == ("1", "1")
    for of in ("inductor", "triton"):
        assert 2 * tensors < float(row[f"{of}_bytes"]) < 2 * tensors + 0.15


def test_a_known_traffic(rows):
    """bf16: a residual reads two tensors and writes one; its gates are a row of [2, 64, 3072]."""
    row = rows["gated_residual", "plain", "forward"]
    gate = 2 / 64
    for way in ("inductor", "triton"):
        assert float(row[f"{way}_bytes"]) == pytest.approx(6 + gate, abs=0.01)
    assert float(row["eager_bytes"]) == pytest.approx(10 + gate, abs=0.01)
