"""How far the proxy's ranks are from the auxiliaries': what GARDO gates by, and a sign of hacking.

    U(x) = win rate of the proxy - mean win rate of the auxiliaries        (arXiv 2512.24138)

Shapes: B samples of all ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

import gardo_kernels
from gardo.types import Scores

if TYPE_CHECKING:
    from torch import Tensor


def _ordered(value_B: Tensor, sample_B: Tensor) -> Tensor:
    """The place of each value in ascending order, fp32 [B]; of equal ones the lower id is above."""
    by_sample = sample_B.argsort(descending=True)
    order = by_sample[value_B[by_sample].argsort(stable=True)]
    place_B = torch.empty_like(value_B)
    place_B[order] = torch.arange(len(order), dtype=value_B.dtype)
    return place_B


def uncertainty(
    scores: Scores,
    population: Literal["batch", "group"],
    ties: Literal["equal", "ordered"] = "equal",
) -> Tensor:
    """U = win rate of the proxy - mean win rate of the auxiliaries, fp64 [B] in (-1, 1).

    `ties: ordered` gives equal rewards different ranks, as the release's double argsort does.
    """
    group_B = scores.group_B if population == "group" else None

    def rate(value_B: Tensor) -> Tensor:
        if ties == "ordered":
            value_B = _ordered(value_B, scores.sample_B)
        return gardo_kernels.win_rate(value_B, scores.valid_B, group_B=group_B)

    proxy_B = rate(scores.proxy_B)
    others = [rate(scores.rewards[name]) for name in scores.auxiliaries]
    uncertainty_B = proxy_B.double() - torch.stack(others).double().mean(0)
    return (uncertainty_B * 1e6).round() / 1e6  # win rates are fractions: ties must stay ties


def disagreement(scores: Scores) -> float:
    """Mean of max(U, 0) over the valid samples, in [0, 1): 0 where all rank alike; NaN for none."""
    uncertainty_B = uncertainty(scores, "batch")[scores.valid_B]
    return float(uncertainty_B.clamp(min=0).mean())
