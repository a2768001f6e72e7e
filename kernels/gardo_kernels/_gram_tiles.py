"""`nearest_cosine` for one group of many rows: tiles of the Gram matrix, on tensor cores.

    d_ij = (g_ii + g_jj) / 2 - g_ij            g_ij = n_i . n_j, with an error of about 1e-6

g is made by the same arithmetic everywhere, so that identical rows have equal g and distance 0. A
program per tile on or above the diagonal, then two reductions of torch; neither g nor the matrix of
distances is ever in memory.

Least traffic: n, for every tile's rows and columns again (in L2), and a value a row and tile.

Shapes: B rows of D features, T tiles of rows or columns. The reference is that of `nearest_cosine`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels._launch import cdiv, launch
from gardo_kernels._launch_shape import LaunchShape, launch_shape

# block: rows and columns of a tile. chunk: features at a time.
DEFAULT = LaunchShape(block=64, chunk=32, warps=4, stages=3)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _gram(n_ptr, row, column, rows, width, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """n_i . n_j of TILE rows and TILE columns; equal bits for equal pairs of rows."""
    row = tl.minimum(row, rows - 1).to(tl.int64)
    column = tl.minimum(column, rows - 1).to(tl.int64)
    gram = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, width, DEPTH):
        feature = start + tl.arange(0, DEPTH)
        a = tl.load(n_ptr + row[:, None] * width + feature[None, :])
        b = tl.load(n_ptr + column[None, :] * width + feature[:, None])
        gram = tl.dot(a, b, gram, input_precision="tf32x3")
    return gram


@triton.jit
def _gram_squares_kernel(n_ptr, square_ptr, rows, width, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """square[row] = n_i . n_i, by the arithmetic of the tiles."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    gram = _gram(n_ptr, row, row, rows, width, TILE, DEPTH)
    square = tl.sum(tl.where(row[:, None] == row[None, :], gram, 0.0), 1)
    tl.store(square_ptr + row, square, mask=row < rows)


@triton.jit
def _gram_tiles_kernel(
    n_ptr, square_ptr, nearest_ptr, sums_ptr, rows, width, TILE: tl.constexpr, DEPTH: tl.constexpr
):
    """nearest, sums[tile, row]: least distance from a row to those of a tile, and the sum of all.

    A program on or above the diagonal fills its rows' part and, the distance being symmetric, its
    columns'.
    """
    row_tile, column_tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    if column_tile < row_tile:
        return
    row = (row_tile * TILE).to(tl.int32) + tl.arange(0, TILE)
    column = (column_tile * TILE).to(tl.int32) + tl.arange(0, TILE)
    gram = _gram(n_ptr, row, column, rows, width, TILE, DEPTH)
    row_square = tl.load(square_ptr + row, mask=row < rows, other=1.0)[:, None]
    column_square = tl.load(square_ptr + column, mask=column < rows, other=1.0)[None, :]
    distance = 0.5 * (row_square + column_square) - gram
    distance = tl.where(row_square * column_square == 0, 1.0, distance)
    distance = tl.where(distance < 0, 0.0, distance)  # not minimum and maximum: NaN stays
    distance = tl.where(distance > 2, 2.0, distance)
    pair = (row[:, None] != column[None, :]) & (row < rows)[:, None] & (column < rows)[None, :]
    least, term = tl.where(pair, distance, float("inf")), tl.where(pair, distance, 0.0)
    sums = tl.sum(term, 1)  # NaN where one is, which tl.min drops
    tl.store(nearest_ptr + column_tile * rows + row, tl.min(least, 1) + 0.0 * sums, mask=row < rows)
    tl.store(sums_ptr + column_tile * rows + row, sums, mask=row < rows)
    if column_tile > row_tile:
        sums = tl.sum(term, 0)
        at = row_tile * rows + column
        tl.store(nearest_ptr + at, tl.min(least, 0) + 0.0 * sums, mask=column < rows)
        tl.store(sums_ptr + at, sums, mask=column < rows)


# ---- launches ------------------------------------------------------------------------------------


def one_group(n_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(nearest_B, mean_pairwise_B) fp32 of B unit rows, or rows of zeros; D a multiple of 64."""
    B, D = n_BD.shape
    shape = launch_shape("gram_tiles", B, D, n_BD.device, DEFAULT)
    T = cdiv(B, shape.block)
    square_B = n_BD.new_empty(B)
    nearest_TB = n_BD.new_empty(T, B)
    sums_TB = n_BD.new_empty(T, B)
    tile = {"n_ptr": n_BD, "square_ptr": square_B, "rows": B, "width": D, "TILE": shape.block,
            "DEPTH": shape.chunk}  # fmt: skip
    # the same tile and warps in both, so that equal rows get equal bits; two stages do not spill
    launch(_gram_squares_kernel, (T,), shape._replace(stages=2), **tile)
    launch(_gram_tiles_kernel, (T, T), shape, nearest_ptr=nearest_TB, sums_ptr=sums_TB, **tile)
    mean: Tensor = torch.sum(sums_TB) / (B * (B - 1))
    return nearest_TB.amin(0), mean.expand(B).contiguous()
