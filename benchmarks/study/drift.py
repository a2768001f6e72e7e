"""How far a policy is from where it started, as a KL.

    KL(policy || start) = N sum_t kl_t mean_N (v_t - v_start,t)^2,    in nats an image

over trajectories that the policy samples with Flow-GRPO's SDE: the KL of two chains is the sum of
that of their steps, and that of a step is between two Gaussians of one variance (kl_t: column
`kl_gaussian` of the transition table). The start is the policy without its LoRA.

Shapes: R rows, X a latent of N elements, T recorded steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from gardo.flow import transitions
from gardo.rollout import recorded_points, rows_of, sample
from gardo.session import Session
from gardo.types import SamplePlan

STEP = 1 << 20  # an iteration that training never reaches: its noise is nobody else's


@torch.no_grad()
def drift(s: Session, *, noise_level: float = 0.7, micro_batch: int = 72) -> float:
    """Nats an image, over one image of each training prompt; for a seed always the same noise."""
    sampler, recipe = s.recipe.sampler, s.recipe
    table = transitions(sampler.sigmas(s.policy.sigmas), "flow", noise_level)
    recorded = tuple(t for t, scored in enumerate(table.scored.tolist()) if scored)
    rollout = sample(
        s.policy,
        s.prompts,
        SamplePlan(transitions=table, record=recorded),
        images_per_prompt=1,
        first=0,
        count=len(s.prompts),
        seed=recipe.run.seed,
        step=STEP,
        device=s.engine.device,
        micro_batch=micro_batch,
        kernels=recipe.kernels,
    )
    points, total = recorded_points(rollout), 0.0
    kl_R = table.rows(points.step_R, "kl_gaussian").double()
    with without_lora(s.policy.transformer):
        for rows in torch.arange(len(points.x_RX)).split(micro_batch):
            start_RX = s.policy.velocity(
                points.x_RX[rows],
                points.sigma_R[rows],
                rows_of(rollout.conditioning, points.prompt_R[rows]),
            )
            apart_RX = points.velocities["rollout"][rows].double() - start_RX.double()
            square_R = apart_RX.square().flatten(1).sum(1)
            total += float((kl_R[rows] * square_R).sum())
    return total / len(s.prompts)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
