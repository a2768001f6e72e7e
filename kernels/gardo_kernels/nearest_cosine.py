"""Cosine distances within groups of feature vectors: to the nearest neighbour, and on average.

    d_ij = 1 - cos(e_i, e_j) = |n_i - n_j|^2 / 2            n_i = e_i / |e_i|
    nearest_i       = min over j != i in the group of i of d_ij
    mean_pairwise_i = mean over all pairs j < k of that group of d_jk

Identical rows have distance exactly 0, where 1 - cos would leave 1e-7 of rounding of either sign.
A row of zeros has no direction: its cosine with any row is taken as 0, its distance as 1. A group
of one has distance 0. A feature that is not finite makes its whole group NaN.

nearest is d_i of GARDO (arXiv 2512.24138, eq. 8); 100 times mean_pairwise is the diversity the
paper reports.

Least traffic: the features once, n written and read again. Called once an iteration, under no_grad,
by GARDO's diversity and by the evaluation.

Groups take three launches: n, and where each group lies; squared chords in fp32, which keep the
digits of small distances; the groups' means. One group of many rows takes n and then, in
`_gram_tiles.py`, products on tensor cores. The matrix of all distances is never in memory. No
atomics, no host synchronisation, the same bits every time.

Shapes: B samples, D features, G samples of one group (groups may differ in size and lie anywhere in
the batch), S splits of a group's columns, T tiles of rows.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels._examples import Examples, On
from gardo_kernels._gram_tiles import one_group
from gardo_kernels._launch import (
    Backend,
    cdiv,
    check_floating,
    check_rows,
    choose_backend,
    launch,
    looked_on,
)
from gardo_kernels._launch_shape import LaunchShape, launch_shape


@torch.no_grad()
def nearest_cosine_ref(e_BD: Tensor, group_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """1 - cos in fp64, one group after the other, rows in blocks; rounding, 1e-15, becomes 0."""
    n_BD = torch.nn.functional.normalize(e_BD.double(), dim=1, eps=1e-300)
    nearest_B = 0.0 * n_BD.sum(1).abs().float()  # for groups of one: 0, or NaN
    mean_B = nearest_B.clone()
    if group_B is None:
        group_B = torch.zeros_like(nearest_B, dtype=torch.int32)
    order_B = group_B.argsort(stable=True)
    sizes = torch.unique_consecutive(group_B[order_B], return_counts=True)[1].tolist()
    for index_G in order_B.split(sizes):
        G = len(index_G)
        if G == 1:
            continue
        n_GD, total = n_BD[index_G], n_BD.new_zeros(())
        for first in range(0, G, 1024):
            row_R = torch.arange(first, min(first + 1024, G), device=e_BD.device)
            distance_RG = (1 - n_GD[row_R] @ n_GD.T).clamp(max=2.0)
            distance_RG.masked_fill_(distance_RG < 1e-14, 0.0)
            distance_RG[row_R - first, row_R] = 0.0
            total = total + distance_RG.sum()
            distance_RG[row_R - first, row_R] = torch.inf
            nearest_B[index_G[row_R]] = distance_RG.amin(1).float()
        mean_B[index_G] = (total / (G * (G - 1))).float()
    return nearest_B, mean_B


# ---- kernels -------------------------------------------------------------------------------------

WHOLE = 256  # n is filled up to a multiple of this many features, which needs no masks
# A program of chords is four warps: LANES along a row, each with four features, one 128-bit load.
# Few turns of its loop wait for memory; the warps' sums meet once, behind it. SPLITS programs share
# a tile of rows.
COLUMNS, SPLITS, LANES = 4, 6, 64
_FEATURES = tl.constexpr(4)
# block: features or group ids at a time. chunk: a group's distances at a time. rows: of a tile.
# warps: of the normalisation. stages: of the chords' loads.
DEFAULT = LaunchShape(block=1024, chunk=256, rows=8, warps=8, stages=2)
MANY = 128  # rows of one group above which tiles are taken, not chords


@triton.jit
def _extent(group_ptr, group, rows, BLOCK: tl.constexpr):
    """The first and the last row of each of these groups."""
    first, last = tl.zeros(group.shape, tl.int32) + rows, tl.zeros(group.shape, tl.int32)
    for start in range(0, rows, BLOCK):
        column = start + tl.arange(0, BLOCK)
        other = tl.load(group_ptr + column, mask=column < rows, other=0)
        same = (other[None, :] == group[:, None]) & (column < rows)[None, :]
        first = tl.minimum(first, tl.min(tl.where(same, column[None, :], rows), 1))
        last = tl.maximum(last, tl.max(tl.where(same, column[None, :], 0), 1))
    return first, last


@triton.jit
def _nearest_cosine_normalise_kernel(
    e_ptr, group_ptr, n_ptr, zero_ptr, leader_ptr, bounds_ptr, rows, features, width,
    HAS_GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """n of ROWS rows, filled up with zeros from `features` to `width`, and where their groups lie.

    zero is 1 for a row of zeros, NaN for one that is not finite, else 0. leader is the first row of
    a row's group: the group's number from here on. bounds are the first and the last row of all
    these groups.
    """
    tile = tl.program_id(0)
    row = tl.minimum(tile * ROWS + tl.arange(0, ROWS), rows - 1)  # the last row again, at the end
    row_ptr = e_ptr + row.to(tl.int64)[:, None] * features
    largest = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, features, BLOCK):
        feature = start + tl.arange(0, BLOCK)[None, :]
        e = tl.load(row_ptr + feature, mask=feature < features, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(e))  # drops NaN, which the squares keep
    scale = tl.max(largest, 1)[:, None]  # divided by it, no square under- or overflows
    scale = tl.where(scale == 0, 1.0, scale)
    square = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, features, BLOCK):
        feature = start + tl.arange(0, BLOCK)[None, :]
        e = tl.load(row_ptr + feature, mask=feature < features, other=0.0).to(tl.float32) / scale
        square += e * e
    squares = tl.sum(square, 1)  # 0 for zeros, NaN where not finite, else 1 or more
    tl.store(zero_ptr + row, tl.where(squares == 0, 1.0, 0.0 * squares))
    inverse = (1.0 / tl.sqrt(tl.where(squares == 0, 1.0, squares)))[:, None]
    at = row.to(tl.int64)[:, None] * width
    for start in range(0, width, BLOCK):
        feature = start + tl.arange(0, BLOCK)[None, :]
        e = tl.load(row_ptr + feature, mask=feature < features, other=0.0).to(tl.float32) / scale
        tl.store(n_ptr + at + feature, e * inverse, mask=feature < width)
    first, last = row * 0, row * 0 + rows - 1
    if HAS_GROUPS:
        first, last = _extent(group_ptr, tl.load(group_ptr + row), rows, BLOCK)
    tl.store(leader_ptr + row, first)
    tl.store(bounds_ptr + 2 * tile, tl.min(first))
    tl.store(bounds_ptr + 2 * tile + 1, tl.max(last))


@triton.jit
def _nearest_cosine_chords_kernel(
    n_ptr, zero_ptr, leader_ptr, bounds_ptr, nearest_ptr, sums_ptr, rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, LANES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """nearest, sums[split, row]: least distance and sum over every SPLITS-th tile of columns."""
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tl.minimum(tile * ROWS + tl.arange(0, ROWS), rows - 1)
    leader, zero = tl.load(leader_ptr + row), tl.load(zero_ptr + row)
    row_ptr = n_ptr + row.to(tl.int64)[:, None, None, None] * width
    lane = tl.arange(0, LANES)[None, None, :, None] * _FEATURES
    lane += tl.arange(0, _FEATURES)[None, None, None, :]
    first, last = tl.load(bounds_ptr + 2 * tile), tl.load(bounds_ptr + 2 * tile + 1)
    nearest = tl.full((ROWS,), float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(first + split * COLUMNS, last + 1, SPLITS * COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        other = tl.load(leader_ptr + column, mask=column < rows, other=-1)
        pair = (other[None, :] == leader[:, None]) & (column[None, :] != row[:, None])
        if tl.max(tl.max(pair.to(tl.int32), 1)) > 0:
            column = tl.minimum(column, rows - 1)
            column_ptr = n_ptr + column.to(tl.int64)[None, :, None, None] * width
            chord = tl.zeros((ROWS, COLUMNS, LANES), tl.float32)
            for depth in tl.range(0, width, LANES * _FEATURES, num_stages=STAGES):
                difference = tl.load(row_ptr + depth + lane) - tl.load(column_ptr + depth + lane)
                chord += tl.sum(difference * difference, 3)  # within a thread
            distance = 0.5 * tl.sum(chord, 2)
            distance = tl.where(distance > 2, 2.0, distance)  # NaN stays
            either = zero[:, None] + tl.load(zero_ptr + column)[None, :]
            distance = tl.where(either > 0, 1.0, distance)
            total += tl.sum(tl.where(pair, distance, 0.0), 1)
            least = tl.min(tl.where(pair, distance, float("inf")), 1)
            nearest = tl.minimum(nearest, least)  # drops NaN, which the total keeps
    tl.store(nearest_ptr + split * rows + row, nearest)
    tl.store(sums_ptr + split * rows + row, total)


@triton.jit
def _nearest_cosine_means_kernel(
    parts_ptr, sums_ptr, zero_ptr, leader_ptr, bounds_ptr, nearest_ptr, mean_ptr, rows,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """nearest[row], the least of parts[split, row]; mean[row], over the pairs of the row's group.

    The blocks start at multiples of BLOCK and are added in order: all rows of a group get the same
    bits.
    """
    tile = tl.program_id(0)
    row = tl.minimum(tile * ROWS + tl.arange(0, ROWS), rows - 1)
    leader = tl.load(leader_ptr + row)
    first, last = tl.load(bounds_ptr + 2 * tile), tl.load(bounds_ptr + 2 * tile + 1)
    total, size = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(first // BLOCK * BLOCK, last + 1, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < rows
        other = tl.load(leader_ptr + column, mask=inside, other=-1)
        of_row = tl.zeros((BLOCK,), tl.float32)
        for split in range(SPLITS):
            of_row += tl.load(sums_ptr + split * rows + column, mask=inside, other=0.0)
        same = other[None, :] == leader[:, None]
        total += tl.sum(tl.where(same, of_row[None, :], 0.0), 1)
        size += tl.sum(same.to(tl.float32), 1)
    nearest = tl.full((ROWS,), float("inf"), tl.float32)
    for split in range(SPLITS):
        nearest = tl.minimum(nearest, tl.load(parts_ptr + split * rows + row))
    nearest += 0.0 * total  # NaN where a row of the group is not finite, which a minimum drops
    alone = 0.0 * tl.load(zero_ptr + row)
    tl.store(nearest_ptr + row, tl.where(size == 1, alone, nearest))
    mean = total / tl.maximum(size * (size - 1.0), 1.0)
    tl.store(mean_ptr + row, tl.where(size == 1, alone, mean))


# ---- op ------------------------------------------------------------------------------------------


def _launch_distances(e_BD: Tensor, group_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """(nearest_B, mean_pairwise_B) fp32; features contiguous, group_B contiguous int64."""
    B, D = e_BD.shape
    shape = launch_shape("nearest_cosine", B, D, e_BD.device, DEFAULT)
    T = cdiv(B, shape.rows)
    width = cdiv(D, WHOLE) * WHOLE
    n_BD = e_BD.new_empty(B, width, dtype=torch.float32)
    zero_B = e_BD.new_empty(B, dtype=torch.float32)
    leader_B = e_BD.new_empty(B, dtype=torch.int32)
    bounds_T2 = e_BD.new_empty(T, 2, dtype=torch.int32)
    launch(
        _nearest_cosine_normalise_kernel, (T,), shape._replace(stages=3), e_ptr=e_BD,
        group_ptr=group_B, n_ptr=n_BD, zero_ptr=zero_B, leader_ptr=leader_B, bounds_ptr=bounds_T2,
        rows=B, features=D, width=width, HAS_GROUPS=group_B is not None, ROWS=shape.rows,
        BLOCK=shape.block,
    )  # fmt: skip
    if group_B is None and B > MANY:
        return one_group(n_BD)
    parts_SB = e_BD.new_empty(SPLITS, B, dtype=torch.float32)
    sums_SB = e_BD.new_empty(SPLITS, B, dtype=torch.float32)
    nearest_B = e_BD.new_empty(B, dtype=torch.float32)
    mean_B = e_BD.new_empty(B, dtype=torch.float32)
    launch(
        _nearest_cosine_chords_kernel, (T, SPLITS), shape._replace(warps=4, stages=3), n_ptr=n_BD,
        zero_ptr=zero_B, leader_ptr=leader_B, bounds_ptr=bounds_T2, nearest_ptr=parts_SB,
        sums_ptr=sums_SB, rows=B, width=width, ROWS=shape.rows, COLUMNS=COLUMNS, SPLITS=SPLITS,
        LANES=LANES, STAGES=shape.stages,
    )  # fmt: skip
    launch(
        _nearest_cosine_means_kernel, (T,), shape._replace(warps=4, stages=3), parts_ptr=parts_SB,
        sums_ptr=sums_SB, zero_ptr=zero_B, leader_ptr=leader_B, bounds_ptr=bounds_T2,
        nearest_ptr=nearest_B, mean_ptr=mean_B, rows=B, ROWS=shape.rows, SPLITS=SPLITS,
        BLOCK=shape.chunk,
    )  # fmt: skip
    return nearest_B, mean_B


_nearest_cosine_op = torch.library.custom_op(
    "gardo::nearest_cosine", _launch_distances, mutates_args=()
)


@_nearest_cosine_op.register_fake
def _(e_BD: Tensor, group_B: Tensor | None) -> tuple[Tensor, Tensor]:
    B = e_BD.shape[0]
    return e_BD.new_empty(B, dtype=torch.float32), e_BD.new_empty(B, dtype=torch.float32)


def nearest_cosine(
    e_BD: Tensor, group_B: Tensor | None = None, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Distance to the nearest other image of the group, and the group's mean pairwise distance.

    e_BD [B, D], any floating dtype; group_B [B] integers, equal for the samples of one group, None
    for one group of all. Returns (nearest_B, mean_pairwise_B), both [B] fp32 in [0, 2];
    mean_pairwise_B holds the value of its group in each of the group's rows. No gradient flows.

    ValueError for an empty batch, features without width, shapes, dtypes and devices that do not
    fit, or fp64 features for the kernels, which work in fp32.
    """
    op = "nearest_cosine"
    if e_BD.ndim != 2 or e_BD.numel() == 0:
        raise ValueError(
            f"{op}: e_BD has shape {tuple(e_BD.shape)}; pass [samples, features], neither empty"
        )
    check_floating(op, "e_BD", e_BD)
    if group_B is not None:
        check_rows(op, "group_B", group_B, "e_BD", e_BD)
        if group_B.is_floating_point():
            raise ValueError(f"{op}: group_B has dtype {group_B.dtype}; pass integers")
    if choose_backend(op, backend, e_BD) == "triton":
        group_B = None if group_B is None else group_B.long().contiguous()
        distances = _nearest_cosine_op if looked_on() else _launch_distances
        return distances(e_BD.detach().contiguous(), group_B)
    return nearest_cosine_ref(e_BD, group_B)


def examples(on: On) -> Examples:
    """Groups, and one group of many rows; see `_examples.py`."""
    (e_BD,) = on.samples(1)
    yield "", list(nearest_cosine(e_BD, on.row_index() // 3, backend=on.backend))
    (e_BD,) = replace(on, rows=MANY + 2, elements=40).samples(1)
    yield "one_group", list(nearest_cosine(e_BD, backend=on.backend))
