"""One GPU: the engine over NCCL in bf16, what it promises on CPUs, and the demo's command.

One rank gathers nothing: what several GPUs do to each other needs several.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gardo.report.metrics_log import read_metrics
from tests import ROOT
from tests.integration.test_launch import type_command
from tests.integration.test_parity import check_slots, check_teachers, launch, steps_of
from tests.integration.test_resume import MIDDLE, same_bits

pytestmark = pytest.mark.gpu
TINY = sorted((ROOT / "recipes").glob("tiny_*.yaml"))
FP32 = ["gardo-lora-zero+tight+once", "gardo-full-zero+tight+each+full", "flow_grpo-full-stage1"]
BF16 = [
    "gardo-lora-zero+tight+once+bf16",
    "gardo-full-zero+tight+each+full+bf16",
    "diffusion_nft-lora-zero+tight+once+selective+bf16+host",
    "refl-lora-zero+bf16",
    "flow_grpo-full-stage1+full+bf16",
    "gardo-full-stage2+bf16+offload",
    "gardo-full-zero+bf16_masters",
]
RESUMED = [f"{a}-lora-zero+bf16+deterministic+saving"
           for a in ("flow_grpo", "diffusion_nft", "gardo", "refl")]  # fmt: skip


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    launch(1, str(folder), *FP32, *BF16, accelerator="cuda")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    launch(0, str(folder), *(f"{c.split('-zero')[0].split('-stage')[0]}-local" for c in FP32),
           accelerator="cuda")  # fmt: skip
    return folder


@pytest.mark.parametrize("case", FP32)
def test_fp32_starts_like_one_process(seen: Path, alone: Path, case: str) -> None:
    """The first rollout and the first update; later ones differ by what GPUs sum in any order."""
    local = f"{case.split('-zero')[0].split('-stage')[0]}-local"
    ours, theirs = (load_file(f) for f in (alone / f"{local}.safetensors",
                                           seen / f"{case}.safetensors"))  # fmt: skip
    assert torch.equal(ours["noise"], theirs["noise"])
    torch.testing.assert_close(ours["images"], theirs["images"], rtol=0, atol=1e-4)
    one, two = steps_of(alone, local)[0]["metrics"], steps_of(seen, case)[0]["metrics"]
    assert math.isclose(one["grad_norm"], two["grad_norm"], rel_tol=1e-3)
    assert math.isclose(one["loss"], two["loss"], rel_tol=1e-3, abs_tol=1e-5)


@pytest.mark.parametrize("case", FP32 + BF16)
def test_slots_and_teachers(seen: Path, case: str) -> None:
    check_slots(seen, case)
    check_teachers(seen, case)


@pytest.mark.parametrize("case", BF16)
def test_bf16_trains(seen: Path, case: str) -> None:
    steps = steps_of(seen, case)
    assert len(steps) == 5
    for step in steps:
        metrics = step["metrics"]
        assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
        assert metrics.get("ratio_error", 0.0) <= 1e-3  # the clip range of these cases


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    cuts = [f"{case}+cut{MIDDLE}" for case in RESUMED]
    launch(1, str(folder), *RESUMED, *cuts, accelerator="cuda")
    launch(1, str(folder), *(f"{c}+resume{MIDDLE}" for c in RESUMED), accelerator="cuda")
    return folder


@pytest.mark.parametrize("case", RESUMED)
def test_a_cut_run_goes_on_to_the_same_bits(resumed: Path, case: str) -> None:
    same_bits(resumed, case, MIDDLE)


def test_the_demo_runs(tmp_path: Path) -> None:
    done = type_command(1, tmp_path, "distributed.precision=bfloat16", accelerator="cuda")
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_metrics(tmp_path / "tiny-flux-gardo" / "metrics.jsonl")
    assert [r["kind"] for r in records] == ["evaluation", "step", "evaluation"]


@pytest.mark.parametrize("recipe", TINY, ids=lambda path: path.stem)
def test_every_tiny_recipe_runs_on_the_kernels(recipe: Path, tmp_path: Path) -> None:
    """Two iterations of each algorithm in bf16; `kernels: triton` refuses to fall back."""
    done = type_command(1, tmp_path, "distributed.precision=bfloat16", "kernels=triton",
                        "run.steps=2", accelerator="cuda", recipe=recipe)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = tmp_path.glob("*/metrics.jsonl")
    steps = [r for r in read_metrics(log) if r["kind"] == "step"]
    assert len(steps) == 2
    assert all(math.isfinite(step["metrics"]["loss"]) for step in steps)
