"""What raises and what lowers the share of the centre, to first order.

Plain gradient ascent moves the weights by the sum over regions j of p_j E_j[A grad log p], and so
the centre's log share by

    d log p_c = p_c <grad log p_c, E_c[A grad log p]> + sum_{j != c} p_j <grad log p_c, E_j[...]>

Of the centre's own term its share is a factor: what a faint mode has to say is faint, whatever the
advantage of its samples. The other terms are what all other samples do to the centre, through the
weights that they share with it. Each is measured here: the gradient of one region's samples alone,
and a small step along it, to either side.

Shapes: B samples, 2 coordinates, P the policy's parameters.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from toy.train import EVALUATION_STEP, Run, positions
from toy.world import Layout, Mixture, PlanePolicy, Toy, measures

REGIONS = ("centre", "rewarded", "unrewarded", "between")
GROUPS = 60  # for the gradients: the centre has a handful of samples in the usual 10
SAMPLES = 20_000  # to measure its share with
REACH = 0.1  # of a step, in the policy's weights


def regions(layout: Layout, x_B2: Tensor) -> dict[str, Tensor]:
    """bool [B] each: at the centre, at ring modes with and without reward, and at no mode."""
    modes_K2 = Mixture(layout).modes_K2
    distance_B, mode_B = torch.cdist(x_B2, modes_K2).min(1)
    near_B = distance_B < layout.covered_radius
    centre_B = near_B & (mode_B == len(modes_K2) - 1)
    rewarded_B = near_B & torch.isin(mode_B, torch.tensor(layout.rewarded))
    return {
        "centre": centre_B,
        "rewarded": rewarded_B,
        "unrewarded": near_B & ~centre_B & ~rewarded_B,
        "between": ~near_B,
    }


def ascents(run: Run, step: int) -> dict[str, Tensor]:
    """{region: the part that its samples have in minus the gradient of an iteration's loss [P]}."""
    rollout, scores = run.rollout(step)
    credit = run.credit(scores)
    found = {}
    for name, of_region_B in regions(run.layout, rollout.images_B3HW).items():
        alone = replace(credit, advantage_B=credit.advantage_B * of_region_B)
        (batch,) = run.batches(rollout, alone, step)
        loss, _ = run.algorithm.loss(run.ctx, batch)
        gradient = torch.autograd.grad(loss, list(run.policy.parameters()))
        found[name] = -nn.utils.parameters_to_vector(gradient)
    return found


def pulls(toy: Toy, arm: str, seed: int, policy: PlanePolicy) -> dict[str, float]:
    """d log(share of the centre) a unit of length of the whole step, by whose samples make it.

    The parts of the first step that `arm`, which has no KL, would take from `policy` by plain
    gradient ascent.
    """
    training = toy.training.model_copy(update={"groups": GROUPS, "evaluation_samples": SAMPLES})
    run = Run(toy.model_copy(update={"training": training}), arm, seed, policy)
    parts = ascents(run, EVALUATION_STEP + 1)
    length = torch.stack(list(parts.values())).sum(0).norm()
    start_P = nn.utils.parameters_to_vector(policy.parameters()).detach()

    def share(step_P: Tensor) -> float:
        moved = copy.deepcopy(policy)
        nn.utils.vector_to_parameters(start_P + step_P, moved.parameters())
        return measures(toy.layout, positions(moved, training, seed))["centre_share"]

    here = share(torch.zeros_like(start_P))
    steps = {name: REACH * ascent_P / length for name, ascent_P in parts.items()}
    return {
        name: (share(step_P) - share(-step_P)) / (2 * REACH * here)
        for name, step_P in steps.items()
    }
