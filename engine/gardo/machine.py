"""What this process is and has: its rank, its threads, and whether a recipe can run here."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

import gardo_kernels
from gardo.distributed.base import Ranks, gather_text, ranks_here
from gardo.distributed.optimizers import check_here
from gardo.nvidia import (
    ALLOCATOR,
    cuda_trouble,
    devices,
    driver_version,
    kernels_lacking,
    unwanted,
)
from gardo.policies.attention import missing
from gardo.policies.compiling import compile_trouble
from gardo.policies.quantised import BASES
from gardo.recipe import Recipe
from gardo.recipe_errors import RankError, RecipeError
from gardo.settings import FieldError, check_installed, is_hub_id, model_path

PACKAGES = ("torch", "triton", "deepspeed", "diffusers", "transformers", "peft")
FULL_SIZE = 10**9  # bytes of a transformer: a CPU would train it for weeks


def ranks() -> tuple[int, int, int]:
    """(rank, local rank, world) as the launcher says; (0, 0, 1) without one."""
    env = os.environ
    return int(env.get("RANK", 0)), int(env.get("LOCAL_RANK", 0)), int(env.get("WORLD_SIZE", 1))


def use_allocator() -> None:
    """Before CUDA is asked anything: memory in segments that grow, so that pictures, rows and
    gathered weights of many sizes leave no holes. Not where the environment says something else."""
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys() and ALLOCATOR:
        os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATOR


def use_device(local_rank: int) -> torch.device:
    """This rank's GPU, made the current one, or the CPU."""
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def use_threads(recipe: Recipe, world: int) -> None:
    """CPU threads of this rank: the recipe's, or its share of the cores. They also update weights
    that a GPU offloads."""
    torch.set_num_threads(recipe.distributed.threads or share_of_cores(world))


def share_of_cores(world: int) -> int:
    """How many cores each rank of this machine has, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here(world))


def use_bf16_reductions(allowed: bool) -> None:
    """Whether cuBLAS may add up parts of a bf16 matmul in bf16, as torch lets it; else in fp32."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = allowed


def use_deterministic_kernels() -> None:
    """Only kernels that give the same bits every time.

    torch would fill new memory with NaN too: nothing reads it unwritten, so that only costs time.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def check_accelerator(recipe: Recipe, source: str) -> None:
    """RecipeError where a run would pass by the GPU that is here, or train a full-size model on a
    CPU. DS_ACCELERATOR=cpu in the environment asks for either."""
    check_device(recipe.model.path, source, "model.path", would="train", mend="train")


def check_device(path: str, source: str, field: str, *, would: str, mend: str) -> None:
    """As `check_accelerator`, of a model that a field names and that would be used so."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return
    if trouble := cuda_trouble():
        raise RecipeError(f"{source}: {trouble}")
    rank, local_rank, _ = ranks()
    if 0 < (there := torch.cuda.device_count()) <= local_rank:
        raise RankError(
            f"{source}: rank {rank} is to use GPU {local_rank} of its machine and sees {there}; "
            "let every rank see all of them (Slurm: srun --gpu-bind=none), or start fewer"
        )
    if there and (trouble := kernels_lacking(local_rank)):
        raise RecipeError(f"{source}: {trouble}")
    if not torch.cuda.is_available() and (size := full_size(path)):
        absent = "no NVIDIA GPU is here"
        if devices() and unwanted():
            hidden = os.environ["CUDA_VISIBLE_DEVICES"]
            absent = f"CUDA_VISIBLE_DEVICES={hidden!r} hides the NVIDIA GPU"
        elif not devices() and driver_version():
            absent += ", though the machine has the driver (a container? docker run --gpus all)"
        raise RecipeError(
            f"{source}: {field}: {path!r} ({size}) would {would} on the CPU: {absent}; {mend} it "
            "where there is one, or set DS_ACCELERATOR=cpu if the CPU is meant"
        )


def full_size(path: str) -> str:
    """How large a published model is, in words; "" of one that a CPU can train."""
    if is_hub_id(path):
        return "full size, from the hub"
    files = (Path(model_path(path)) / "transformer").glob("*.safetensors")
    size = sum(file.stat().st_size for file in files)
    return f"a transformer of {size / 1e9:.1f} GB" if size > FULL_SIZE else ""


def check_machine(recipe: Recipe, world: int, device: torch.device, source: str) -> None:
    """RecipeError where the recipe asks for what is not here."""
    if world > 1 and recipe.distributed.engine == "local":
        raise RecipeError(
            f"{source}: distributed.engine: local runs in one process, but {world} ranks were "
            "launched; use engine zero"
        )
    if recipe.kernels == "triton" and not gardo_kernels.kernels_run_on(device):
        raise RecipeError(
            f"{source}: kernels: triton needs an NVIDIA GPU, this run is on the {device.type}; use "
            "auto or torch"
        )
    try:
        check_here(recipe.train.optimizer.name, device)
        if recipe.model.base in BASES:
            check_installed("bitsandbytes", f"model.base: {recipe.model.base}")
    except FieldError as error:
        raise RecipeError(f"{source}: {error}") from error
    if lacks := missing(recipe.model.attention, device):
        raise RecipeError(
            f"{source}: model.attention: {recipe.model.attention}: {lacks}; `gardo doctor` says "
            "which attention runs here"
        )


def kernels_trouble(recipe: Recipe, device: torch.device, source: str) -> str:
    """Why Triton does not start on a GPU where `kernels: auto` would take it; "" where it does.

    RecipeError for `kernels: triton`. A kernel is launched to see, before anything heavy loads.
    """
    wanted = recipe.kernels == "triton" or (recipe.kernels == "auto" and device.type == "cuda")
    if (
        not wanted
        or not gardo_kernels.kernels_run_on(device)
        or not (trouble := gardo_kernels.triton_trouble(device))
    ):
        return ""
    if recipe.kernels == "triton":
        raise RecipeError(f"{source}: kernels: triton: {trouble}; or use auto or torch")
    return trouble


def blocks_trouble(recipe: Recipe, device: torch.device, source: str) -> str:
    """Why blocks do not compile on a GPU where `train.compile: auto` would; "" where they do.

    RecipeError for `train.compile: blocks`. Something small is compiled to see.
    """
    wanted = recipe.train.compile
    if wanted == "none" or not (trouble := compile_trouble(device)):
        return ""
    if wanted == "blocks":
        raise RecipeError(f"{source}: train.compile: blocks: {trouble}; or use none")
    return trouble


def settled_compile(recipe: Recipe, compile_: str) -> Recipe:
    """The recipe with this `train.compile`."""
    train = recipe.train.model_copy(update={"compile": compile_})
    return recipe.model_copy(update={"train": train})


def as_it_runs(
    recipe: Recipe, group: Ranks, *, kernels: str, blocks: str
) -> tuple[Recipe, list[str]]:
    """The recipe as this run uses it, and notes where that is not as it was asked for.

    `kernels` and `blocks` are this rank's troubles. One rank's has all do without: each decides
    from all ranks' samples what it computes, gates for one, and may not differ from the others by a
    rounding.
    """
    notes = []
    if said := _said(group, kernels):
        recipe = recipe.model_copy(update={"kernels": "torch"})
        notes.append(f"kernels: auto is plain torch here, not Triton: {said}")
    if recipe.train.compile == "auto":
        said = _said(group, blocks)
        recipe = settled_compile(recipe, "none" if said else "blocks")
        if said:
            notes.append(f"train.compile: auto is none here: {said}")
    return recipe, notes


def _said(group: Ranks, trouble: str) -> str:
    """The first rank's trouble that has one."""
    here = trouble and f"{trouble} ({socket.gethostname()})"
    return next(filter(None, gather_text(group, here)), "")
