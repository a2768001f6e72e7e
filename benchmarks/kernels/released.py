"""What the released training scripts compute, written again from their formulas, to compare with.

Flow-GRPO and GARDO (arXiv 2505.05470, 2512.24138) step and score in one eager function: the row of
the schedule is searched for every sample, which waits for the device each time; everything is
widened to fp32 first; the log-probability is the difference of two tensors of size one, with its
constants; the reference is scored on every row and the ungated ones are then dropped by a boolean
mask. DiffusionNFT (2509.16117) divides by fp64 weights. Nothing here is tidied, and the metrics are
only those that our ops report too.

Shapes: R rows; B samples, D features, P groups.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Schedule(NamedTuple):
    """The scheduler's two tensors, on the device: timesteps [T] = 1000 sigma, sigmas [T + 1]."""

    timesteps_T: Tensor
    sigmas_T: Tensor
    noise_level: float


class Loss(NamedTuple):
    loss: Tensor
    log_ratio_R: Tensor | None
    metrics: list[Tensor]


def step_index(schedule: Schedule, timestep: Tensor) -> int:
    found = (schedule.timesteps_T == timestep).nonzero()
    return int(found[0].item())


def sde_step(
    schedule: Schedule,
    v: Tensor,
    timestep_R: Tensor,
    x: Tensor,
    x_next: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', its log-probability, the step's mean and the diffusion g; given x', its score alone."""
    v, x = v.float(), x.float()
    if x_next is not None:
        x_next = x_next.float()
    index = [step_index(schedule, t) for t in timestep_R]
    shape = (-1, *[1] * (x.ndim - 1))
    sigma = schedule.sigmas_T[index].view(shape)
    sigma_next = schedule.sigmas_T[[i + 1 for i in index]].view(shape)
    largest = schedule.sigmas_T[1].item()
    dt = sigma_next - sigma
    g = torch.sqrt(sigma / (1 - torch.where(sigma == 1, largest, sigma))) * schedule.noise_level
    mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    if x_next is None:
        noise = torch.randn_like(mean) if noise is None else noise
        x_next = mean + g * torch.sqrt(-1 * dt) * noise
    log_prob = (
        -((x_next.detach() - mean) ** 2) / (2 * ((g * torch.sqrt(-1 * dt)) ** 2))
        - torch.log(g * torch.sqrt(-1 * dt))
        - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    )
    return x_next, log_prob.mean(dim=tuple(range(1, x.ndim))), mean, g


def clipped(
    log_prob_R: Tensor, log_prob_old_R: Tensor, advantage_R: Tensor, clip: float, adv_clip: float
) -> tuple[Tensor, list[Tensor]]:
    """The clipped policy loss with the metrics that are kept of it."""
    advantage_R = torch.clamp(advantage_R, -adv_clip, adv_clip)
    ratio_R = torch.exp(log_prob_R - log_prob_old_R)
    unclipped_R = -advantage_R * ratio_R
    clipped_R = -advantage_R * torch.clamp(ratio_R, 1.0 - clip, 1.0 + clip)
    policy = torch.mean(torch.maximum(unclipped_R, clipped_R))
    metrics = [
        0.5 * torch.mean((log_prob_R - log_prob_old_R) ** 2),
        torch.mean((torch.abs(ratio_R - 1.0) > clip).float()),
        torch.mean((ratio_R - 1.0 > clip).float()),
        torch.mean((1.0 - ratio_R > clip).float()),
        policy.detach(),
    ]
    return policy, metrics


def add_gated_kl(
    loss: Tensor, kl: Tensor, gated_R: Tensor, beta: float, metrics: list[Tensor]
) -> Tensor:
    """The mean KL over the gated rows of the micro-batch; without one, none."""
    if gated_R.any():
        kl_loss = torch.mean(kl[gated_R])
        loss = loss + beta * kl_loss
        metrics.append(kl_loss.detach())
    return loss


def policy_loss(
    schedule: Schedule,
    v: Tensor,
    x: Tensor,
    x_next: Tensor,
    v_ref: Tensor,
    *,
    timestep_R: Tensor,
    log_prob_old_R: Tensor,
    advantage_R: Tensor,
    gated_R: Tensor,
    clip: float,
    beta: float,
    adv_clip: float = 5.0,
) -> Loss:
    _, log_prob_R, mean, g = sde_step(schedule, v, timestep_R, x, x_next)
    with torch.no_grad():
        _, _, mean_ref, _ = sde_step(schedule, v_ref, timestep_R, x, x_next)
    loss, metrics = clipped(log_prob_R, log_prob_old_R, advantage_R, clip, adv_clip)
    dims = tuple(range(1, x.ndim))
    kl = ((mean - mean_ref) ** 2).mean(dim=dims, keepdim=True) / (2 * g**2)
    loss = add_gated_kl(loss, kl, gated_R, beta, metrics)
    return Loss(loss, (log_prob_R - log_prob_old_R).detach(), metrics)


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t_R: Tensor,
    v_ref: Tensor,
    *,
    advantage_R: Tensor,
    gated_R: Tensor,
    b: float,
    beta: float,
    adv_clip: float = 5.0,
) -> Loss:
    advantage_R = torch.clamp(advantage_R, -adv_clip, adv_clip)
    r_R = torch.clamp((advantage_R / adv_clip) / 2.0 + 0.5, 0, 1)
    t = t_R.view(-1, *[1] * (v.ndim - 1))
    dims = tuple(range(1, v.ndim))

    def branch(v_branch: Tensor) -> Tensor:
        x0_predicted = x_t - t * v_branch
        with torch.no_grad():
            difference = torch.abs(x0_predicted.double() - x0.double())
            weight = difference.mean(dim=dims, keepdim=True).clip(min=0.00001)
        return ((x0_predicted - x0) ** 2 / weight).mean(dim=dims)

    plus_R = branch(b * v + (1 - b) * v_old.detach())
    minus_R = branch((1.0 + b) * v_old.detach() - b * v)
    policy_R = r_R * plus_R / b + (1.0 - r_R) * minus_R / b
    policy = (policy_R * adv_clip).mean()
    metrics = [policy.detach(), policy_R.mean().detach()]
    kl_R = ((v - v_ref) ** 2).mean(dim=dims)
    loss = add_gated_kl(policy, kl_R, gated_R, beta, metrics)
    return Loss(loss, None, metrics)


def awm_loss(
    v: Tensor,
    v_old: Tensor,
    target: Tensor,
    v_ref: Tensor,
    *,
    advantage_R: Tensor,
    gated_R: Tensor,
    clip: float,
    beta: float,
    adv_clip: float = 5.0,
) -> Loss:
    """Matching errors as log-probabilities, of the uniform weight."""
    dims = tuple(range(1, v.ndim))
    target = target.float()
    log_prob_R = -((v.float() - target) ** 2).mean(dim=dims)
    with torch.no_grad():
        log_prob_old_R = -((v_old.float() - target) ** 2).mean(dim=dims)
    advantage_R = torch.clamp(advantage_R, -adv_clip, adv_clip) / adv_clip
    loss, metrics = clipped(log_prob_R, log_prob_old_R, advantage_R, clip, adv_clip)
    kl_R = ((v.float() - v_ref.float()) ** 2).mean(dim=dims)
    loss = add_gated_kl(loss, kl_R, gated_R, beta, metrics)
    return Loss(loss, (log_prob_R - log_prob_old_R).detach(), metrics)


def nearest_neighbour(e_BD: Tensor, group_B: Tensor) -> Tensor:
    """1 - cos to the nearest other member of the group, one group after the other."""
    nearest_B = torch.zeros(e_BD.shape[0], device=e_BD.device)
    for group in torch.unique(group_B):
        members_B = group_B == group
        e_GD = torch.nn.functional.normalize(e_BD[members_B].float(), p=2, dim=1)
        cosine_GG = torch.matmul(e_GD, e_GD.T)
        itself_GG = torch.eye(len(e_GD), dtype=torch.bool, device=e_GD.device)
        distance_GG = (1 - cosine_GG).masked_fill(itself_GG, float("inf"))
        nearest_B[members_B] = distance_GG.min(dim=1).values
    return nearest_B
