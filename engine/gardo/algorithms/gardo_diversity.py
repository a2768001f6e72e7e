"""How far the images of a group are apart, and what GARDO makes of it (arXiv 2512.24138, eq. 8).

Shapes: B samples of all ranks, D features, G images of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

import gardo_kernels
from gardo.algorithms.advantage import group_statistics
from gardo.lazily import no_grad

if TYPE_CHECKING:
    from torch import Tensor

    from gardo_kernels import Backend

Distances = Callable[["Tensor", "Tensor", "Backend"], tuple["Tensor", "Tensor"]]


def _cosine(features_BD: Tensor, group_B: Tensor, kernels: Backend) -> tuple[Tensor, Tensor]:
    return gardo_kernels.nearest_cosine(features_BD, group_B, backend=kernels)


@no_grad
def nearest_euclidean(
    features_BD: Tensor, group_B: Tensor, kernels: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Euclidean distances within groups: to the nearest neighbour, and on average over pairs.

    As `nearest_cosine`: both fp32 [B], 0 in a group of one. Plain torch whatever `kernels` says:
    features whose length means something are positions, few and short. It waits for the device once
    a group.
    """
    nearest_B = torch.zeros(len(features_BD), device=features_BD.device)
    mean_B = torch.zeros_like(nearest_B)
    for group in group_B.unique().tolist():
        index_G = (group_B == group).nonzero().flatten()
        G = len(index_G)
        if G == 1:
            continue
        e_GD = features_BD[index_G].float()
        distance_GG = torch.cdist(e_GD, e_GD, compute_mode="donot_use_mm_for_euclid_dist")
        mean_B[index_G] = distance_GG.sum() / (G * (G - 1))
        nearest_B[index_G] = distance_GG.fill_diagonal_(torch.inf).amin(1)
    return nearest_B, mean_B


METRICS: dict[str, Distances] = {"cosine": _cosine, "euclidean": nearest_euclidean}


def diversity_factor(
    nearest_B: Tensor,
    advantage_B: Tensor,
    valid_B: Tensor,
    group_B: Tensor,
    normalise: Literal["group_mean", "raw"],
) -> Tensor:
    """What each advantage is multiplied with, fp32 [B].

    The distance to the nearest neighbour where the advantage is positive, else 1. `group_mean`
    divides by the group's mean distance; a group of identical images keeps factor 1 (its mean
    distance is 0).
    """
    factor_B = nearest_B
    if normalise == "group_mean":
        mean_B = group_statistics(nearest_B, valid_B, group_B)[0].float()
        safe_B = torch.where(mean_B > 1e-8, mean_B, torch.ones_like(mean_B))
        factor_B = torch.where(mean_B > 1e-8, nearest_B / safe_B, torch.ones_like(mean_B))
    return torch.where(advantage_B > 0, factor_B, torch.ones_like(factor_B))
