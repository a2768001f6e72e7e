"""What this process is and has: its rank, its threads, and whether a recipe can run here."""

from __future__ import annotations

import os

import torch

from gardo.distributed.base import ranks_here
from gardo.distributed.optimizers import check_here
from gardo.policies.attention import missing
from gardo.policies.quantised import BASES
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError
from gardo.settings import FieldError, check_installed
from gardo_kernels import kernels_run_on


def ranks() -> tuple[int, int, int]:
    """(rank, local rank, world) as the launcher says; (0, 0, 1) without one."""
    env = os.environ
    return int(env.get("RANK", 0)), int(env.get("LOCAL_RANK", 0)), int(env.get("WORLD_SIZE", 1))


def use_device(local_rank: int) -> torch.device:
    """This rank's GPU, made the current one, or the CPU."""
    if not torch.cuda.is_available() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    # segments that grow: pictures, rows and gathered weights of many sizes leave no holes
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def use_threads(recipe: Recipe, world: int) -> None:
    """CPU threads of this rank: the recipe's, or its share of the cores. They also update weights
    that a GPU offloads."""
    torch.set_num_threads(
        recipe.distributed.threads or max(1, len(os.sched_getaffinity(0)) // ranks_here(world))
    )


def use_deterministic_kernels() -> None:
    """Only kernels that give the same bits every time.

    torch would fill new memory with NaN too: nothing reads it unwritten, so that only costs time.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def check_machine(recipe: Recipe, world: int, device: torch.device, source: str) -> None:
    """RecipeError where the recipe asks for what is not here."""
    if world > 1 and recipe.distributed.engine == "local":
        raise RecipeError(
            f"{source}: distributed.engine: local runs in one process, but {world} ranks were "
            "launched; use engine zero"
        )
    if recipe.kernels == "triton" and not kernels_run_on(device):
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
