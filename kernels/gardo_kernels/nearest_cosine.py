"""Cosine distances within groups of feature vectors: to the nearest neighbour, and on average.

    d_ij = 1 - cos(e_i, e_j) = |n_i - n_j|^2 / 2            n_i = e_i / |e_i|
    nearest_i       = min over j != i in the group of i of d_ij
    mean_pairwise_i = mean over all pairs j < k of that group of d_jk

The squared chord is exactly 0 for identical rows, where 1 - cos would leave 1e-7 of rounding of
either sign. A row of zeros has no direction: its cosine with any row is taken as 0, its distance as
1. A group of one has distance 0.

nearest is d_i of GARDO (arXiv 2512.24138, eq. 8); 100 times mean_pairwise is the diversity the
paper reports.

Least traffic: the features once. Called once an iteration, under no_grad, by GARDO's diversity and
by the evaluation.

Shapes: B samples, D features, G samples of one group (groups may differ in size and lie anywhere in
the batch).
"""

import torch
from torch import Tensor

from gardo_kernels._launch import Backend, check_floating, check_rows, choose_backend


@torch.no_grad()
def nearest_cosine_ref(e_BD: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in plain torch, one group after the other."""
    largest_B1 = e_BD.abs().amax(1, keepdim=True).to(torch.float32)
    zero_B = largest_B1[:, 0] == 0
    # Scaled first, so that no square under- or overflows.
    scaled_BD = e_BD.float() / largest_B1.masked_fill(zero_B[:, None], 1.0)
    n_BD = torch.nn.functional.normalize(scaled_BD, dim=1)
    nearest_B = torch.zeros(e_BD.shape[0], dtype=torch.float32, device=e_BD.device)
    mean_B = torch.zeros_like(nearest_B)
    order_B = group_B.argsort(stable=True)
    sizes = torch.unique_consecutive(group_B[order_B], return_counts=True)[1].tolist()
    for index_G in order_B.split(sizes):
        G = len(index_G)
        if G == 1:
            continue
        n_GD, zero_G = n_BD[index_G], zero_B[index_G]
        chord_GG = torch.cdist(n_GD, n_GD, compute_mode="donot_use_mm_for_euclid_dist")
        distance_GG = torch.where(zero_G[:, None] | zero_G[None, :], 1.0, chord_GG.square() / 2)
        distance_GG = distance_GG.clamp(max=2.0).fill_diagonal_(0.0)
        mean_B[index_G] = distance_GG.sum() / (G * (G - 1))
        nearest_B[index_G] = distance_GG.fill_diagonal_(torch.inf).amin(1)
    return nearest_B, mean_B


def nearest_cosine(
    e_BD: Tensor, group_B: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Distance to the nearest other image of the group, and the group's mean pairwise distance.

    e_BD [B, D], any floating dtype; group_B [B] integers, equal for the samples of one group.
    Returns (nearest_B, mean_pairwise_B), both [B] fp32 in [0, 2]; mean_pairwise_B holds the value
    of its group in each of the group's rows. No gradient flows.

    ValueError for an empty batch, features without width, or shapes, dtypes and devices that do not
    fit.
    """
    op = "nearest_cosine"
    if e_BD.ndim != 2 or e_BD.numel() == 0:
        raise ValueError(
            f"{op}: e_BD has shape {tuple(e_BD.shape)}; pass [samples, features], neither empty"
        )
    check_floating(op, "e_BD", e_BD)
    check_rows(op, "group_B", group_B, "e_BD", e_BD)
    if group_B.is_floating_point():
        raise ValueError(f"{op}: group_B has dtype {group_B.dtype}; pass integers")
    choose_backend(op, backend, e_BD)
    return nearest_cosine_ref(e_BD, group_B)
