"""How kernels are laid over rows: a GPU's second grid axis ends at 65,535."""

import pytest
import torch

from gardo_kernels._examples import On, op_modules
from tests.kernels.launches import recorded
from tests.kernels.row_losses import DEVICE

OPS = op_modules()
MANY = On("triton", torch.device(DEVICE), rows=70_000, elements=3)


@pytest.mark.parametrize("name", OPS)
def test_more_rows_than_the_second_axis_has_are_laid_along_the_first(name):
    """The grids alone: 70,000 programs would take the interpreter minutes."""
    with recorded() as launches:
        list(OPS[name].examples(MANY))
    grids = [launch.grid for launch in launches]
    assert grids and all(size <= 2**16 - 1 for grid in grids for size in grid[1:]), grids
    assert any(grid[0] * 8 >= MANY.rows for grid in grids)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_a_gpu_takes_more_rows_than_its_second_axis_has(name):
    list(OPS[name].examples(MANY))
    torch.cuda.synchronize()
