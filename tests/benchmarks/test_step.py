"""The step benchmark: FLOPs by the shapes of modules, sides that change one thing, its tables."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench_step import FORWARD, TRAINED, Measured, gains_table, sides_table
from gardo.config import load
from gardo.loading import build_policy
from gardo.policies import compiling
from gardo.policies.base import Policy
from step.flops import counted
from step.ours import SIDES, run
from tests import ROOT

RECIPES = {"flux": "tiny_flux_gardo.yaml", "sd3": "tiny_sd3_gardo.yaml"}
WEIGHTS = {"lora": "{kind: lora, rank: 8, alpha: 16}", "full": "{kind: full}"}
SMALL = (
    "distributed.engine=local", "run.name=run", "data.prompts_per_step=2",
    "data.images_per_prompt=4", "sampler.steps=3", "sampler.train_steps=2", "train.micro_batch=4",
    "train.updates_per_step=1", "evaluate.prompt_count=1", "evaluate.images_per_prompt=1",
    "evaluate.steps=1", "evaluate.every=100", "algorithm.reference=null",
)  # fmt: skip


@pytest.fixture(params=[(f, w) for f in RECIPES for w in WEIGHTS], ids="-".join)
def policy(request: pytest.FixtureRequest) -> Policy:
    family, weights = request.param
    recipe = load(ROOT / "recipes" / RECIPES[family], [f"train.weights={WEIGHTS[weights]}"])
    policy = build_policy(recipe, torch.device("cpu"))
    policy.load_transformer()
    return policy


def test_flops_by_shapes_are_what_torch_counts(policy: Policy) -> None:
    """Torch counts the patches' convolution of SD3 too, and all that is asked for of a matmul."""
    text = policy.encode(["a red circle", "a square"])
    x, sigma = torch.randn(2, *policy.latent_shape), torch.full((2,), 0.5)
    for trains in (False, True):
        torchs = FlopCounterMode(display=False)
        with (
            counted(policy.transformer, lambda: "now") as flops,
            torchs,
            sdpa_kernel(SDPBackend.MATH),
            torch.set_grad_enabled(trains),
        ):
            velocity = policy.velocity(x, sigma, text)
            if trains:
                velocity.sum().backward()
        said = flops.total["now"] if trains else flops.forward["now"]
        assert said == pytest.approx(torchs.get_total_flops(), rel=0.03)
    assert not policy.transformer._forward_hooks


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of one launch of two sides of the tiny recipe, by the command."""
    out = tmp_path_factory.mktemp("step") / "step.csv"
    sets = [part for one in SMALL for part in ("--set", one)]
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_step.py"),
               str(ROOT / "recipes" / "tiny_flux_gardo.yaml"), "--against", "reference_everywhere",
               "--launches", "1", "--iterations", "2", "--out", str(out), *sets]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    with out.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_compiled_side_is_counted_as_it_is_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks and modes that count would be compiled too; what a row computes does not change."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    recipe, side = str(ROOT / "recipes" / RECIPES["flux"]), SIDES["compiled"]
    timed, counts = (
        run(recipe, [*SMALL, "run.steps=2", f"run.folder={tmp_path / str(count)}"], side, count)
        for count in (False, True)
    )
    graphs = [[i.get("compiled_graphs", 0) for i in one["iterations"]] for one in (timed, counts)]
    assert graphs[0][0] > 0 and graphs[1] == [0, 0]
    assert counts["row_flops"]["training"] > 2 * counts["row_flops"]["forward"] > 0
    assert counts["flops"] > 0 and counts["launches"] == counts["waits"] == ""


def of(rows: list[dict[str, Any]], side: str) -> Iterator[dict[str, Any]]:
    return (row for row in rows if row["side"] == side)


def test_the_command_accounts_for_an_iteration(rows: list[dict[str, Any]]) -> None:
    ours = {row["phase"]: row for row in of(rows, "ours")}
    whole = ours.pop("iteration")
    seconds = {name: float(row["seconds"]) for name, row in ours.items()}
    assert sum(seconds.values()) == pytest.approx(float(whole["seconds"]), rel=0.01)
    assert float(ours["sample"]["rows"]) == 24
    trained = sum(float(ours[name]["rows"]) for name in TRAINED)
    forward = sum(float(ours[name]["rows"]) for name in FORWARD if name in ours)
    assert (trained, forward) == (16, 24 + float(ours["teachers"]["rows"]))
    assert float(whole["gflop_of_counted"]) == pytest.approx(
        float(whole["gflop_counted"]), rel=0.05
    )
    assert int(whole["launches"]) > 1000 and 0 < int(whole["waits"]) < 200
    assert float(whole["mfu_executed"]) > 0 and whole["mfu_model"] == ""  # no GPU, no peak


def test_the_reference_on_every_row_costs_what_its_rows_cost(rows: list[dict[str, Any]]) -> None:
    everywhere = {row["phase"]: row for row in of(rows, "reference_everywhere")}
    assert float(everywhere["teachers"]["rows"]) == 16
    assert float(everywhere["iteration"]["predicted_against_ours"]) > 1.1
    assert "reference_everywhere" in gains_table(rows) and "`ours`" in sides_table(rows)


def test_a_side_is_its_median_launch() -> None:
    launches = [
        [{"seconds": {"a": s, "b": 0.0}} for s in one] for one in ([1.0, 9.0, 2.0], [4.0, 4.0, 4.0])
    ]
    assert Measured(launches).seconds == [2.0, 4.0]
