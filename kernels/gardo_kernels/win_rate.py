"""Strict win rate of each sample in its population.

    w(y_i) = #{j : y_i > y_j} / B           over the B valid samples of the batch, or of the group

The uncertainty of GARDO (arXiv 2512.24138, section 4.1) is w(proxy) minus the mean of w over the
auxiliary rewards. Ties win against nobody, so the best of a batch of equal rewards has 0.

Least traffic: the scores once. Called once an iteration for each reward, by GARDO's gate. By sort
and search: B log B.

Shapes: B samples.
"""

import torch
from torch import Tensor

from gardo_kernels._launch import check_rows


@torch.no_grad()
def win_rate_ref(y_B: Tensor, mask_B: Tensor, group_B: Tensor) -> Tensor:
    """Sort (group, rank) pairs, coded as integers, and count by binary search: ties are exact."""
    B = y_B.shape[0]
    index_B = torch.unique(group_B, return_inverse=True)[1]
    nan_B = mask_B & y_B.isnan()
    spoiled_B = torch.zeros_like(index_B).index_add(0, index_B, nan_B.long())[index_B] > 0
    y_B = torch.where(mask_B & ~nan_B, y_B, torch.inf)  # a search over NaN goes anywhere
    rank_B = torch.searchsorted(y_B.sort().values, y_B)  # equal scores, equal ranks, 0..B-1
    rank_B = torch.where(mask_B, rank_B, B)  # above every valid sample, so beaten by none
    start_B = index_B * (B + 1)
    code_B = (start_B + rank_B).sort().values
    first_B = torch.searchsorted(code_B, start_B)
    wins_B = torch.searchsorted(code_B, start_B + rank_B) - first_B
    valid_B = torch.searchsorted(code_B, start_B + B) - first_B
    rate_B = torch.where(spoiled_B, torch.nan, wins_B / valid_B.clamp(min=1))
    return torch.where(mask_B, rate_B, 0.0)


def win_rate(
    y_B: Tensor,
    mask_B: Tensor | None = None,
    *,
    group_B: Tensor | None = None,
) -> Tensor:
    """Share of the population that a sample beats strictly: [B] fp32 in [0, 1).

    y_B [B] scores, any real dtype; mask_B [B] bool, False for a score that failed: such a sample is
    in nobody's population and gets 0 here, to be masked out by the caller, whatever y_B holds there
    (NaN included). group_B [B] integers makes each group a population of its own; None compares the
    whole batch, the paper's default. A valid NaN makes its whole population NaN.

    ValueError for an empty batch or shapes, dtypes and devices that do not fit.
    """
    op = "win_rate"
    if y_B.ndim != 1 or y_B.numel() == 0:
        raise ValueError(f"{op}: y_B has shape {tuple(y_B.shape)}; pass [samples], at least one")
    if mask_B is None:
        mask_B = torch.ones_like(y_B, dtype=torch.bool)
    if group_B is None:
        group_B = torch.zeros_like(y_B, dtype=torch.int64)
    check_rows(op, "mask_B", mask_B, "y_B", y_B)
    check_rows(op, "group_B", group_B, "y_B", y_B)
    if mask_B.dtype != torch.bool:
        raise ValueError(f"{op}: mask_B has dtype {mask_B.dtype}; pass booleans")
    if group_B.is_floating_point():
        raise ValueError(f"{op}: group_B has dtype {group_B.dtype}; pass integers")
    y_B = y_B.detach().double()  # holds every lower dtype exactly, so no tie is made or lost
    return win_rate_ref(y_B, mask_B, group_B)
