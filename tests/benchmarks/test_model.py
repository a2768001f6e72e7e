"""What whole blocks launch and move, counted: `./run bench model` on its smallest kind of block."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

Rows = dict[tuple[str, str], dict[str, str]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """In a process of its own: kernels are not interpreted there. By model and mode."""
    out = tmp_path_factory.mktemp("model") / "counts.csv"
    here = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels", "benchmarks"))
    command = [sys.executable, str(ROOT / "benchmarks/bench_model.py"), "--out", str(out),
               "--block", "FluxSingleTransformerBlock", "--weights", "lora"]  # fmt: skip
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": here}, timeout=300)
    with Path(out).open() as file:
        return {(row["model"], row["mode"]): row for row in csv.DictReader(file)}


def numbers(row: dict[str, str], name: str) -> list[float]:
    return [float(row[f"{way}_{name}"]) for way in ("forward", "backward")]


@pytest.mark.parametrize("model", ["folded", "kernels"])
def test_a_change_launches_and_moves_less(rows: Rows, model: str) -> None:
    plain, changed = rows["as it is", "eager"], rows[model, "eager"]
    for name in ("launches", "kb_token"):
        assert all(a < b for a, b in zip(numbers(changed, name), numbers(plain, name), strict=True))
    assert float(changed["share_training"]) > float(plain["share_training"])


def test_together_they_leave_the_least(rows: Rows) -> None:
    both = numbers(rows["folded, kernels", "eager"], "kb_token")
    for model in ("as it is", "folded", "kernels"):
        assert all(
            a < b for a, b in zip(both, numbers(rows[model, "eager"], "kb_token"), strict=True)
        )


@pytest.mark.parametrize("name", ["launches", "kb_token"])
def test_a_compiler_leaves_less_than_eager(rows: Rows, name: str) -> None:
    for model in ("as it is", "folded"):
        eager, compiled = (numbers(rows[model, mode], name) for mode in ("eager", "compiled"))
        assert all(a < b for a, b in zip(compiled, eager, strict=True))


def test_what_is_computed_does_not_change(rows: Rows) -> None:
    assert len({row["mflop_token"] for row in rows.values()}) == 1
