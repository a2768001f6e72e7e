"""One GPU: the engine over NCCL in bf16, what it promises on CPUs, and the demo's command.

One rank gathers nothing: what several GPUs do to each other needs several.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gardo.report.metrics_log import read_metrics
from tests import ROOT
from tests.integration.cases import Case
from tests.integration.checks import check_slots, check_teachers, seen, steps_of
from tests.integration.coverings import alone
from tests.integration.launch import launch_on_gpu, type_command
from tests.integration.test_resume import EVALUATION, MIDDLE, same_bits

pytestmark = pytest.mark.gpu
TINY = sorted((ROOT / "recipes").glob("tiny_*.yaml"))
FP32 = [
    Case("gardo", "lora", "stage3", ("large", "tight", "once")),
    Case("gardo", "full", "stage3", ("large", "tight", "each", "full")),
    Case("flow_grpo", "full", "stage1", ("large",)),
]
BF16 = [
    Case("gardo", "lora", "stage3", ("large", "tight", "once", "bf16")),
    Case("gardo", "full", "stage3", ("large", "tight", "each", "full", "bf16")),
    Case("diffusion_nft", "lora", "stage3",
         ("large", "tight", "once", "selective", "bf16", "host")),
    Case("refl", "lora", "stage3", ("large", "bf16")),
    Case("flow_grpo", "full", "stage1", ("large", "full", "bf16")),
    Case("gardo", "full", "stage2", ("large", "bf16", "offload")),
    Case("gardo", "full", "stage3", ("large", "bf16_masters")),
    Case("gardo", "lora", "stage1", ("large", "nf4", "full", "bf16")),
    Case("flow_grpo", "lora", "stage2", ("large", "int8", "bf16", "offload")),
]  # fmt: skip
RESUMED = [
    Case(algorithm, "lora", "stage3", ("bf16", "deterministic", "saving"), probes=EVALUATION)
    for algorithm in ("flow_grpo", "diffusion_nft", "gardo", "refl")
] + [
    Case("gardo", "lora", stage, (*options, "bf16", "deterministic", "saving"), probes=EVALUATION)
    for stage, *options in (
        ("stage1", "nf4"),
        ("stage3", "eight_bit"),
        ("stage3", "adamw_paged"),
        ("stage2", "adamw_8bit_paged"),
        ("stage3", "deepspeed_fused"),
        ("stage1", "deepspeed_fused"),
        ("stage2", "deepspeed_cpu", "offload"),
    )
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    launch_on_gpu(1, folder, [*FP32, *BF16])
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    launch_on_gpu(0, folder, [alone(case) for case in FP32])
    return folder


@pytest.mark.parametrize("case", FP32, ids=str)
def test_fp32_starts_like_one_process(trained: Path, one_process: Path, case: Case) -> None:
    """The first rollout and the first update; later ones differ by what GPUs sum in any order."""
    ours, theirs = seen(one_process, alone(case)), seen(trained, case)
    assert torch.equal(ours["noise"], theirs["noise"])
    torch.testing.assert_close(ours["images"], theirs["images"], rtol=0, atol=1e-4)
    one = steps_of(one_process, alone(case))[0]["metrics"]
    two = steps_of(trained, case)[0]["metrics"]
    assert math.isclose(one["grad_norm"], two["grad_norm"], rel_tol=1e-3)
    assert math.isclose(one["loss"], two["loss"], rel_tol=1e-3, abs_tol=1e-5)


@pytest.mark.parametrize("case", FP32 + BF16, ids=str)
def test_slots_and_teachers(trained: Path, case: Case) -> None:
    check_slots(trained, case)
    check_teachers(trained, case)


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_trains(trained: Path, case: Case) -> None:
    steps = steps_of(trained, case)
    assert len(steps) == case.steps
    for step in steps:
        metrics = step["metrics"]
        assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
        assert metrics.get("ratio_error", 0.0) <= 1e-3  # the clip range of these cases


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    cut = [case.but(cut=MIDDLE) for case in RESUMED]
    launch_on_gpu(1, folder, [*RESUMED, *cut])
    launch_on_gpu(1, folder, [case.but(resume=True) for case in cut])
    return folder


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_a_cut_run_goes_on_to_the_same_bits(resumed: Path, case: Case) -> None:
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
