"""The Bradley-Terry fit: strengths of a group's images from who beat whom, however few pairs met.

    P(i beats j) = sigmoid(theta_i - theta_j)
    maximise  sum over the pairs of  p_ij log P(i beats j) + p_ji log P(j beats i)
              - sum_i theta_i^2 / (2 prior^2)

p_ij is 1, 0, a half for a tie, or a judge's probability; p_ij + p_ji = 1. The Gaussian prior keeps
an unbeaten image finite, and places groups of images that never met around the same mean.
(Bradley and Terry, Biometrika 39, 1952; ties as half a win each.)

The objective is concave. Newton steps of length log(1 + d) / d, d being the spread of the step,
climb from any start: along a step h the third derivative of a pair's term is at most |h_i - h_j|
times the second, and that length is the best for the bound that follows (Sun and Tran-Dinh,
arXiv 1703.04599). Near the maximum d vanishes and the steps are Newton's own.

Shapes: P groups of G images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Always all of them, so that every rank has the same bits. 128 images in perfect order and a prior
# of 10, the widest that recipes may ask for, need 32 [measured].
ITERATIONS = 40


def strengths(preference_PGG: Tensor, valid_PGG: Tensor, prior: float) -> Tensor:
    """theta, fp64 [P, G]. `valid_PGG`: which pairs met, symmetric, False on the diagonal."""
    met = valid_PGG.double()
    preference = torch.where(valid_PGG, preference_PGG.double(), 0.0)
    theta_PG = torch.zeros_like(met[..., 0])
    for _ in range(ITERATIONS):
        predicted = torch.sigmoid(theta_PG[:, :, None] - theta_PG[:, None, :])
        gradient_PG = (preference - met * predicted).sum(-1) - theta_PG / prior**2
        weight = met * predicted * (1 - predicted)
        hessian = torch.diag_embed(weight.sum(-1) + prior**-2) - weight
        step_PG = torch.linalg.solve(hessian, gradient_PG)
        spread_P1 = step_PG.amax(-1, keepdim=True) - step_PG.amin(-1, keepdim=True)
        tiny = torch.finfo(torch.float64).tiny
        theta_PG = theta_PG + step_PG * (spread_P1 + tiny).log1p() / (spread_P1 + tiny)
    return theta_PG


def predicted_win_rate(preference_PGG: Tensor, valid_PGG: Tensor, prior: float) -> Tensor:
    """The mean predicted probability of beating each other image of the group, fp64 [P, G].

    On the win rate's scale: where all pairs met, the two are equal but for the prior.
    """
    theta_PG = strengths(preference_PGG, valid_PGG, prior)
    predicted = torch.sigmoid(theta_PG[:, :, None] - theta_PG[:, None, :])
    others = theta_PG.shape[-1] - 1
    mean_PG = (predicted.sum(-1) - 0.5) / others  # without the image against itself
    return (mean_PG * 1e7).round() / 1e7  # equal records must stay ties
