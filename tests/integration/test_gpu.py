"""One GPU: the engine over NCCL in bf16, what it promises on CPUs, and the demo's command.

One rank gathers nothing: what several GPUs do to each other needs several.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gardo import phases
from gardo.config import check
from gardo.distributed.local import LocalEngine
from gardo.report.metrics_log import read_metrics
from gardo.rewards.panel import Panel
from gardo.rollout import LossContext
from gardo.session import open_session
from gardo.train import train
from tests import ROOT
from tests.integration.cases import Case
from tests.integration.checks import check_slots, check_teachers, seen, steps_of
from tests.integration.coverings import alone
from tests.integration.faults import Around
from tests.integration.launch import launch_on_gpu, type_command
from tests.integration.recipes import recipe
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


class SecondIteration(Around):
    """A progress under which torch raises at every wait for the GPU, in the second iteration."""

    iteration = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.iteration += name == "sample"
        watched = self.iteration == 2 and name not in ("checkpoint", "evaluate")
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        with self.inner.phase(name):
            yield


def may_wait(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*arguments: Any, **more: Any) -> Any:
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            return function(*arguments, **more)
        finally:
            torch.cuda.set_sync_debug_mode(mode)

    return called


@pytest.mark.parametrize("algorithm", ["gardo", "gardo_nft", "awm", "refl"])
def test_an_iteration_waits_where_it_says(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For scores and what rewards do, for metrics and the ratio's error, for an update's norm.

    The second iteration, whose prompts are encoded and whose kernels are compiled.
    """
    for place, name in (
        (Panel, "__call__"), (LossContext, "score"), (phases, "together"),
        (LocalEngine, "reduce"), (LocalEngine, "step"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, may_wait(getattr(place, name)))
    case = Case(algorithm, "lora", "local", kernels="triton", steps=2, probes=())
    asked = recipe(case, tmp_path)
    (tmp_path / "prompts.txt").write_text("one red circle\ntwo blue squares\n")
    asked["data"]["prompts"] = str(tmp_path / "prompts.txt")
    asked["evaluate"] |= {"prompt_count": 1, "batch": 1}
    threads = torch.get_num_threads()
    session = open_session(check(asked, case.name), quiet=True)
    session.progress = SecondIteration(session.progress)  # type: ignore[assignment]
    try:
        with session:
            train(session)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_num_threads(threads)
    assert session.progress.iteration == 2  # type: ignore[attr-defined]


def test_the_demo_runs(tmp_path: Path) -> None:
    done = type_command(1, tmp_path, "distributed.precision=bfloat16", accelerator="cuda")
    assert done.returncode == 0, done.stderr[-3000:]
    records = read_metrics(tmp_path / "tiny-flux-gardo" / "metrics.jsonl")
    assert [r["kind"] for r in records] == ["evaluation", "step", "evaluation"]


@pytest.mark.parametrize("recipe", TINY, ids=lambda path: path.stem)
def test_every_tiny_recipe_runs_on_the_kernels(recipe: Path, tmp_path: Path) -> None:
    """Two iterations of each algorithm in bf16; `kernels: triton` refuses to fall back."""
    if recipe.stem == "tiny_flux_ocr":
        pytest.importorskip("rapidocr")
        pytest.importorskip("uvicorn")
    done = type_command(1, tmp_path, "distributed.precision=bfloat16", "kernels=triton",
                        "run.steps=2", accelerator="cuda", recipe=recipe)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (log,) = tmp_path.glob("*/metrics.jsonl")
    steps = [r for r in read_metrics(log) if r["kind"] == "step"]
    assert len(steps) == 2
    assert all(math.isfinite(step["metrics"]["loss"]) for step in steps)
