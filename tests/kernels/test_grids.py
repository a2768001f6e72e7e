"""How kernels are laid over rows: a GPU's second grid axis ends at 65,535."""

from importlib import import_module

import pytest
import torch

from gardo_kernels import (
    awm_loss,
    nearest_cosine,
    nft_loss,
    policy_loss,
    random_normal,
    sde_step,
)
from tests.kernels.row_losses import DEVICE

ROWS, WIDTH = 70_000, 3
ONES = torch.ones(ROWS, WIDTH, device=DEVICE)


def loss(op, *more, rows, **settings):
    """Forward and backward, every other sample and row of ones."""
    v = ONES.clone().requires_grad_()
    values = dict.fromkeys(rows, torch.ones(ROWS, device=DEVICE))
    op(v, v, v, *more, **values, **settings, backend="triton").loss.backward()


CALLS = {
    "policy_loss": lambda: loss(policy_loss, rows=("advantage", "h", "B")),
    "nft_loss": lambda: loss(nft_loss, ONES, rows=("t", "r"), b=1.0),
    "awm_loss": lambda: loss(awm_loss, rows=("advantage", "t")),
    "sde_step": lambda: sde_step(
        ONES, ONES, torch.zeros(1, 6, device=DEVICE),
        torch.zeros(ROWS, dtype=torch.int64, device=DEVICE), backend="triton",
    ),
    "philox": lambda: random_normal(
        1, torch.arange(ROWS, device=DEVICE), 0, (WIDTH,), backend="triton"
    ),
    "nearest_cosine": lambda: nearest_cosine(
        ONES, torch.arange(ROWS, device=DEVICE), backend="triton"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_more_rows_than_the_second_axis_has_are_laid_along_the_first(name, monkeypatch):
    """The grids alone: 70,000 programs would take the interpreter minutes."""
    module = import_module(f"gardo_kernels.{name}")
    grids = []
    monkeypatch.setattr(module, "launch", lambda kernel, grid, *_, **__: grids.append(grid))
    CALLS[name]()
    assert grids and all(size <= 2**16 - 1 for grid in grids for size in grid[1:]), grids
    assert any(grid[0] * 8 >= ROWS for grid in grids)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_gpu_takes_more_rows_than_its_second_axis_has(name):
    CALLS[name]()
    torch.cuda.synchronize()
