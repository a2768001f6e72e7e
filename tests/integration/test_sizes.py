"""Pictures that are twice as wide as high, or as high as wide, through a run of either family."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.integration.cases import Case
from tests.integration.checks import seen, steps_of
from tests.integration.launch import start
from tests.integration.recipes import recipe

CASES = [
    Case("gardo", "lora", "local", ("wide",), steps=1, probes=("evaluation",)),
    Case("flow_grpo", "full", "local", ("tall",), steps=1, probes=("evaluation",)),
    Case("gardo", "lora", "local", ("wide", "sd3"), steps=1, probes=("evaluation",)),
    Case("flow_grpo", "full", "local", ("tall", "sd3"), steps=1, probes=("evaluation",)),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    start(0, folder, CASES).wait()
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_picture_need_not_be_square(runs: Path, case: Case) -> None:
    height, width = recipe(case, runs)["model"]["size"]
    assert max(height, width) == 2 * min(height, width)
    for name in ("images", "evaluation"):  # of the rollout, and of the pipeline
        assert seen(runs, case)[name].shape[1:] == (3, height, width)
    (step,) = steps_of(runs, case)
    assert step["metrics"]["ratio_error"] <= 1e-6
    assert math.isfinite(step["metrics"]["loss"]) and step["metrics"]["grad_norm"] > 0
