"""Rows divided by their lengths, whatever their scale: n_i = e_i / |e_i|.

`nearest_cosine` divides as it goes, by `unit_factors`; for its one group of many rows n is written.

Shapes: B rows of D features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels._launch import cdiv, launch
from gardo_kernels._launch_shape import LaunchShape

WHOLE = 256  # n is filled up to a multiple of this many features, which needs no masks
SHAPE = LaunchShape(block=1024, rows=8, warps=8)


@triton.jit
def _squares(
    e_ptr, row, scale, features, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The sum of (e scale)^2 over each row."""
    row_ptr = e_ptr + row.to(tl.int64)[:, None, None] * features
    lane = tl.arange(0, BLOCK // WIDE)[None, :, None] * WIDE + tl.arange(0, WIDE)[None, None, :]
    square = tl.zeros((ROWS, BLOCK // WIDE), tl.float32)
    for start in range(0, features, BLOCK):
        feature = start + lane
        e = tl.load(row_ptr + feature, mask=feature < features, other=0.0).to(tl.float32)
        e *= scale[:, None, None]
        square += tl.sum(e * e, 2)  # within a thread
    return tl.sum(square, 1)


@triton.jit
def unit_factors(
    e_ptr, row, features, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """scale, inverse of each row: n = (e scale) inverse. `row` holds ROWS of them.

    scale is a power of two, 1 unless squares would under- or overflow; inverse is 0 for a row of
    zeros, NaN for one that is not finite.
    """
    scale = tl.full((ROWS,), 1.0, tl.float32)
    square = _squares(e_ptr, row, scale, features, ROWS, BLOCK, WIDE)
    scale = tl.where(square < 2.0**-80, 2.0**96, tl.where(square > 2.0**80, 2.0**-96, 1.0))
    if tl.max(tl.where(scale != 1.0, 1, 0)) > 0:
        square = _squares(e_ptr, row, scale, features, ROWS, BLOCK, WIDE)
    inverse = 1.0 / tl.sqrt(tl.where(square == 0, 1.0, square)) + 0.0 * square
    return scale, tl.where(square == 0, 0.0, inverse)


@triton.jit
def _normalise_kernel(
    e_ptr, n_ptr, rows, features, width, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """n of ROWS rows, filled up with zeros from `features` to `width`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(row, rows - 1)  # the last row again, at the end
    scale, inverse = unit_factors(e_ptr, row, features, ROWS, BLOCK, WIDE)
    row = row.to(tl.int64)[:, None]
    for start in range(0, width, BLOCK):
        feature = start + tl.arange(0, BLOCK)[None, :]
        e = tl.load(e_ptr + row * features + feature, mask=feature < features, other=0.0)
        n = e.to(tl.float32) * scale[:, None] * inverse[:, None]
        tl.store(n_ptr + row * width + feature, n, mask=feature < width)


def unit_rows(e_BD: Tensor) -> Tensor:
    """n fp32, D filled up with zeros to a multiple of WHOLE; e_BD contiguous."""
    B, D = e_BD.shape
    width = cdiv(D, WHOLE) * WHOLE
    n_BD = e_BD.new_empty(B, width, dtype=torch.float32)
    launch(
        _normalise_kernel, (cdiv(B, SHAPE.rows),), SHAPE, e_ptr=e_BD, n_ptr=n_BD, rows=B,
        features=D, width=width, ROWS=SHAPE.rows, BLOCK=SHAPE.block, WIDE=16 // e_BD.element_size(),
    )  # fmt: skip
    return n_BD
