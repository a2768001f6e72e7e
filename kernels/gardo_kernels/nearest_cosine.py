"""Cosine distances within groups of feature vectors: to the nearest neighbour, and on average.

    d_ij = 1 - cos(e_i, e_j) = |n_i - n_j|^2 / 2            n_i = e_i / |e_i|
    nearest_i       = min over j != i in the group of i of d_ij
    mean_pairwise_i = mean over all pairs j < k of that group of d_jk

Identical rows have distance exactly 0, where 1 - cos would leave 1e-7 of rounding of either sign.
A row of zeros has no direction: its cosine with any row is taken as 0, its distance as 1. A group
of one has distance 0. A feature that is not finite makes its whole group NaN.

nearest is d_i of GARDO (arXiv 2512.24138, eq. 8); 100 times mean_pairwise is the diversity the
paper reports.

Least traffic: the features once; tiles of them again, in L2. Called once an iteration, under
no_grad, by GARDO's diversity and by the evaluation.

Groups take two launches: squared chords in fp32, which keep the digits of small distances, of rows
that are divided by their lengths on the way; the groups' means. Near rows' pairs are computed once.
One group of many rows takes n (`_unit_rows.py`) and products on tensor cores (`_gram_tiles.py`).
The matrix of all distances is never in memory. No atomics, no host synchronisation, the same bits
every time.

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
from gardo_kernels._unit_rows import unit_factors, unit_rows


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

# SPLITS programs share a tile of rows: a group of 24 is three tiles. LANES lie along a row, each
# with one 128-bit load of features: a warp adds up its chords alone.
SPLITS, LANES = 3, 32
# block: features at a time of a length, and half as many as group ids. chunk: a group's distances
# at a time. rows: of a tile.
DEFAULT = LaunchShape(block=256, chunk=256, rows=8)
MANY = 128  # rows of one group above which tiles are taken, not chords


@triton.jit
def _ids(group_ptr, row, rows, HAS_GROUPS: tl.constexpr):
    """The groups of these rows; any of rows past the end."""
    ids = row * 0
    if HAS_GROUPS:
        ids = tl.load(group_ptr + row, mask=row < rows, other=0)
    return ids


@triton.jit
def _extent(group_ptr, start, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The first and the last row of the groups of ROWS rows from `start` on."""
    row = tl.minimum(start + tl.arange(0, ROWS), rows - 1)
    group = tl.load(group_ptr + row)[:, None]
    first, last = tl.full((BLOCK,), rows - 1, tl.int32), tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, rows, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        ids = tl.load(group_ptr + column, mask=column < rows, other=0)[None, :]
        same = (tl.max((ids == group).to(tl.int32), 0) > 0) & (column < rows)
        first = tl.minimum(first, tl.where(same, column, rows - 1))
        last = tl.maximum(last, tl.where(same, column, 0))
    return tl.min(first), tl.max(last)


@triton.jit
def _distances(
    e_ptr, row, column, rows, features, ROWS: tl.constexpr, LANES: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d of ROWS rows and as many columns; of a row with itself 0, or NaN if it is not finite."""
    row, column = tl.minimum(row, rows - 1), tl.minimum(column, rows - 1)
    # in one call, so that equal rows get equal bits
    either = tl.reshape(tl.join(row, column), (2 * ROWS,))
    scale, inverse = unit_factors(e_ptr, either, features, 2 * ROWS, BLOCK, WIDE)
    row_scale, column_scale = tl.split(tl.reshape(scale, (ROWS, 2)))
    row_inverse, column_inverse = tl.split(tl.reshape(inverse, (ROWS, 2)))
    row_ptr = e_ptr + row.to(tl.int64)[:, None, None, None] * features
    column_ptr = e_ptr + column.to(tl.int64)[None, :, None, None] * features
    lane = tl.arange(0, LANES)[None, None, :, None] * WIDE
    lane += tl.arange(0, WIDE)[None, None, None, :]
    chord = tl.zeros((ROWS, ROWS, LANES), tl.float32)
    for start in range(0, features, LANES * WIDE):
        feature = start + lane
        a = tl.load(row_ptr + feature, mask=feature < features, other=0.0).to(tl.float32)
        b = tl.load(column_ptr + feature, mask=feature < features, other=0.0).to(tl.float32)
        a *= row_scale[:, None, None, None]
        b *= column_scale[None, :, None, None]
        # + 0, or a compiler fuses a product with the difference, and equal rows leave its rounding
        a = tl.fma(a, row_inverse[:, None, None, None], 0.0)
        b = tl.fma(b, column_inverse[None, :, None, None], 0.0)
        difference = a - b
        chord += tl.sum(difference * difference, 3)  # within a thread
    distance = 0.5 * tl.sum(chord, 2)
    distance = tl.where(distance > 2, 2.0, distance)  # NaN stays
    directionless = row_inverse[:, None] * column_inverse[None, :] == 0  # not where one is NaN
    return tl.where(directionless & (row[:, None] != column[None, :]), 1.0, distance)


@triton.jit
def _nearest_cosine_chords_kernel(
    e_ptr, group_ptr, nearest_ptr, sums_ptr, bounds_ptr, rows, features, HAS_GROUPS: tl.constexpr,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """nearest, sums[split, row]: least distance and sum over every SPLITS-th tile of columns.

    Of two tiles less than SPLITS apart the first alone computes the distances, and counts them
    twice in the sum; the second's nearest are its columns', nearest[SPLITS + split, column]. Of
    tiles farther apart, where a group is large or scattered, both do. bounds[tile] are the first
    and the last row of all groups of the tile's rows.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    row = tl.minimum(tile * ROWS + tl.arange(0, ROWS), rows - 1)  # the last row again, at the end
    first, last = 0, rows - 1
    if HAS_GROUPS:
        first, last = _extent(group_ptr, tile * ROWS, rows, ROWS, 2 * BLOCK)
    if split == 0:
        tl.store(bounds_ptr + 2 * tile, first)
        tl.store(bounds_ptr + 2 * tile + 1, last)
    group = _ids(group_ptr, row, rows, HAS_GROUPS)
    nearest = tl.full((ROWS,), float("inf"), tl.float32)
    mirrored = tl.full((ROWS,), float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    start = first // ROWS
    for turn in tl.range(0, last // ROWS + 1 - start, SPLITS, disable_licm=True):
        other = start + turn + (tile + split - start) % SPLITS
        column = other * ROWS + tl.arange(0, ROWS)
        same = group[:, None] == _ids(group_ptr, column, rows, HAS_GROUPS)[None, :]
        same &= (column < rows)[None, :]
        mine = (other >= tile) | (other + SPLITS <= tile)
        if mine & (tl.max(same.to(tl.int32)) > 0):
            distance = _distances(e_ptr, row, column, rows, features, ROWS, LANES, WIDE, BLOCK)
            least = tl.where(same & (row[:, None] != column[None, :]), distance, float("inf"))
            nearest = tl.minimum(nearest, tl.min(least, 1))  # drops NaN, which the total keeps
            both = (other > tile) & (other < tile + SPLITS)
            mirrored = tl.where(both, tl.min(least, 0), mirrored)
            total += tl.where(both, 2.0, 1.0) * tl.sum(tl.where(same, distance, 0.0), 1)
    tl.store(nearest_ptr + split * rows + row, nearest)
    tl.store(sums_ptr + split * rows + row, total)
    column = (tile + split) * ROWS + tl.arange(0, ROWS)
    tl.store(nearest_ptr + (SPLITS + split) * rows + column, mirrored, mask=column < rows)


@triton.jit
def _nearest_cosine_means_kernel(
    parts_ptr, sums_ptr, group_ptr, bounds_ptr, nearest_ptr, mean_ptr, rows,
    HAS_GROUPS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """nearest[row], the least of parts[:, row]; mean[row], over the pairs of the row's group.

    The blocks start at multiples of BLOCK and are added in order: all rows of a group get the same
    bits.
    """
    tile = tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    group = _ids(group_ptr, row, rows, HAS_GROUPS)
    nearest = tl.full((ROWS,), float("inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        part = parts_ptr + split * rows + row
        nearest = tl.minimum(nearest, tl.load(part, mask=row < rows, other=0.0))
        beside = (row < rows) & (tile >= split)  # the tile that would have filled it is there
        part += SPLITS * rows
        nearest = tl.minimum(nearest, tl.load(part, mask=beside, other=float("inf")))
    first, last = tl.load(bounds_ptr + 2 * tile), tl.load(bounds_ptr + 2 * tile + 1)
    total, size = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(first // BLOCK * BLOCK, last + 1, BLOCK):
        column = start + tl.arange(0, BLOCK)
        of_row = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            of_row += tl.load(sums_ptr + split * rows + column, mask=column < rows, other=0.0)
        ids = _ids(group_ptr, column, rows, HAS_GROUPS)
        same = (ids[None, :] == group[:, None]) & (column < rows)[None, :]
        total += tl.sum(tl.where(same, of_row[None, :], 0.0), 1)
        size += tl.sum(same.to(tl.float32), 1)
    nearest = tl.where(size == 1, 0.0, nearest)
    nearest += 0.0 * total  # NaN where a row of the group is not finite, which a minimum drops
    tl.store(nearest_ptr + row, nearest, mask=row < rows)
    mean = total / tl.maximum(size * (size - 1.0), 1.0)
    tl.store(mean_ptr + row, mean, mask=row < rows)


# ---- op ------------------------------------------------------------------------------------------


def _launch_distances(e_BD: Tensor, group_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """(nearest_B, mean_pairwise_B) fp32; features contiguous, group_B contiguous int64."""
    B, D = e_BD.shape
    if group_B is None and B > MANY:
        return one_group(unit_rows(e_BD))
    shape = launch_shape("nearest_cosine", B, D, e_BD.device, DEFAULT)
    T = cdiv(B, shape.rows)
    parts_SB = e_BD.new_empty(2 * SPLITS, B, dtype=torch.float32)
    sums_SB = e_BD.new_empty(SPLITS, B, dtype=torch.float32)
    bounds_T2 = e_BD.new_empty(T, 2, dtype=torch.int32)
    nearest_B = e_BD.new_empty(B, dtype=torch.float32)
    mean_B = e_BD.new_empty(B, dtype=torch.float32)
    groups = {"group_ptr": group_B, "HAS_GROUPS": group_B is not None}
    launch(
        _nearest_cosine_chords_kernel, (T, SPLITS), shape, e_ptr=e_BD, nearest_ptr=parts_SB,
        sums_ptr=sums_SB, bounds_ptr=bounds_T2, rows=B, features=D, ROWS=shape.rows, SPLITS=SPLITS,
        LANES=LANES, WIDE=16 // e_BD.element_size(), BLOCK=shape.block, **groups,
    )  # fmt: skip
    launch(
        _nearest_cosine_means_kernel, (T,), shape._replace(warps=4), parts_ptr=parts_SB,
        sums_ptr=sums_SB, bounds_ptr=bounds_T2, nearest_ptr=nearest_B, mean_ptr=mean_B, rows=B,
        ROWS=shape.rows, SPLITS=SPLITS, BLOCK=shape.chunk, **groups,
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
    """Groups of one tile and of several, and one group of many rows; see `_examples.py`."""
    for name, where, size in (("", on, 3), ("groups", replace(on, rows=60, elements=40), 44)):
        (e_BD,) = where.samples(1)
        yield name, list(nearest_cosine(e_BD, where.row_index() // size, backend=on.backend))
    (e_BD,) = replace(on, rows=MANY + 2, elements=40).samples(1)
    yield "one_group", list(nearest_cosine(e_BD, backend=on.backend))
