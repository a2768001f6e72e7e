"""Tiny random pipelines of both families, and what is looked at in a policy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from gardo.flow import transitions
from gardo.policies.base import Policy
from gardo.tiny.models import flux_pipeline, sd3_pipeline
from gardo_kernels import sde_step

FAMILIES = {"flux": flux_pipeline, "sd3": sd3_pipeline}
TRANSFORMERS = {"flux": FluxTransformer2DModel, "sd3": SD3Transformer2DModel}
PROMPTS = ["two red circles", "one blue square", "three green triangles"]
HEIGHT, WIDTH = 32, 24  # not square: an exchange of the two would show
CPU = torch.device("cpu")

Make = Callable[..., Policy]


def latents(policy: Policy, count: int = len(PROMPTS), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *policy.latent_shape, generator=generator)


def velocity(policy: Policy) -> torch.Tensor:
    """At a time of its own in each row."""
    with torch.no_grad():
        return policy.velocity(
            latents(policy), torch.tensor([0.9, 0.5, 0.1]), policy.encode(PROMPTS)
        )


def images(policy: Policy, steps: int = 3) -> torch.Tensor:
    return policy.generate(policy.encode(PROMPTS), latents(policy), steps=steps)


def euler(policy: Policy, steps: int) -> torch.Tensor:
    """The latents of the training loop's own sampler, without noise."""
    x, conditioning = latents(policy), policy.encode(PROMPTS)
    table = transitions(policy.sigmas(steps), "ode")
    for t in range(steps):
        row_B = torch.full((len(x),), t)
        with torch.no_grad():
            v = policy.velocity(x, table.rows(row_B, "sigma"), conditioning)
        x = sde_step(x, v, table.table_TK, row_B).x
    return x


def randomise(policy: Policy) -> dict[str, torch.Tensor]:
    """Weights far from the initial ones, as an engine would gather them."""
    generator = torch.Generator().manual_seed(3)
    for parameter in policy.trainable().values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += (0.1 * noise).to(parameter)
    return {n: p.detach().float().clone() for n, p in policy.trainable().items()}
