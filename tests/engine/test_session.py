"""What a session sets for its whole process, and what it refuses before anything loads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gardo import machine
from gardo.config import load
from gardo.machine import (
    check_machine,
    use_allocator,
    use_deterministic_kernels,
    use_device,
    use_threads,
)
from gardo.recipe_errors import RecipeError
from gardo.session import prepare
from tests.engine.config.recipe import written
from tests.integration.launch import environment


def test_deterministic_kernels_leave_unwritten_memory_alone(monkeypatch):
    """torch fills all of it with NaN by default, every new_empty a pass over memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    was = torch.are_deterministic_algorithms_enabled()
    try:
        use_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.empty(4096).isnan().all()
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize("allowed", [False, True])
def test_bf16_matmuls_add_up_in_fp32_unless_asked_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    """Set for the process before anything loads; torch has it the other way."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    threads = torch.get_num_threads()
    asked = "bf16_reduced_precision_reduction: true, " if allowed else ""
    fragment = f"{{distributed: {{engine: local}}, run: {{{asked}folder: {tmp_path / 'runs'}}}}}"
    matmul = torch.backends.cuda.matmul
    was = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = not allowed
    try:
        prepare(load(written(tmp_path, fragment)), "here.yaml")
        assert matmul.allow_bf16_reduced_precision_reduction == allowed
    finally:
        matmul.allow_bf16_reduced_precision_reduction = was
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("asked", "runs"), [("auto", "none"), ("blocks", "blocks")])
def test_a_cpu_compiles_where_it_was_asked_for_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, runs: str
) -> None:
    """Calls that are compiled all have as many rows."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(machine, "compile_trouble", lambda device: "")
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    fragment = f"{{distributed: {{engine: local}}, train: {{compile: {asked}}}}}"
    made = load(written(tmp_path, fragment), [f"run.folder={tmp_path / 'runs'}"])
    recipe, _, plan, notes = prepare(made, "here.yaml")
    assert (recipe.train.compile, plan.fill, notes) == (runs, runs == "blocks", [])


@pytest.mark.parametrize(
    ("fragment", "said"),
    [
        ("{model: {base: nf4}, distributed: {stage: 2}}",
         "model.base: nf4: needs bitsandbytes, which is not here; pip install bitsandbytes"),
        ("train: {optimizer: {name: adamw_8bit}}",
         "train.optimizer.name: adamw_8bit: needs bitsandbytes, which is not here; pip install "
         "bitsandbytes"),
        ("train: {optimizer: {name: deepspeed_fused}}",
         "train.optimizer.name: deepspeed_fused needs an NVIDIA GPU, this run is on the cpu; use "
         "adamw"),
    ],
)  # fmt: skip
def test_what_this_machine_lacks_is_refused(
    fragment: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by a recipe's check: `gardo plan` is for machines that are elsewhere."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = load(written(tmp_path, fragment))
    with pytest.raises(RecipeError) as raised:
        check_machine(recipe, 1, torch.device("cpu"), "here.yaml")
    assert str(raised.value) == f"here.yaml: {said}"


def test_a_rank_takes_its_gpu_before_anything_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what it puts on "cuda" lands on the first one."""
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert use_device(3) == torch.device("cuda", 3) and taken == [torch.device("cuda", 3)]
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert use_device(3) == torch.device("cpu") and len(taken) == 1


def test_memory_that_grows_is_asked_for_unless_another_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "ALLOCATOR", "")  # under WSL, whose driver has failed with it
    use_allocator()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.undo()
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    use_allocator()
    assert os.environ.pop("PYTORCH_ALLOC_CONF") == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")  # the name of old
    use_allocator()
    assert "PYTORCH_ALLOC_CONF" not in os.environ


@pytest.mark.gpu
def test_memory_grows_in_segments() -> None:
    code = (
        "import torch; from gardo.machine import use_allocator, use_device;"
        "use_allocator(); device = use_device(0);"
        "x = torch.empty(1 << 22, device=device); (s, *_) = torch.cuda.memory_snapshot();"
        "assert s['is_expandable'], s"
    )
    subprocess.run([sys.executable, "-c", code], env=environment("cuda"), check=True, timeout=120)


@pytest.mark.parametrize(("fragment", "expected"), [("", 2), ("distributed: {threads: 5}", 5)])
def test_ranks_share_the_cores(
    fragment: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU too, where AdamW updates offloaded weights on the CPU."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    said: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    use_threads(load(written(tmp_path, fragment)), 32)
    assert said == [expected]
