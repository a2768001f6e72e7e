"""The published configurations at their real widths, a block or two deep: our sampler without noise
draws what diffusers' pipeline draws.

Random weights, random texts of the published widths; SD3 with guidance.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from gardo.flow import transitions
from gardo.plugins import resolve
from gardo.policies.attention import use_attention
from gardo.policies.base import Policy
from gardo.rollout import sample
from gardo.settings import PUBLISHED
from gardo.types import SamplePlan

CPU = torch.device("cpu")
STEPS, IMAGES, SEED = 3, 2, 11
MODELS = {
    "flux": ("black-forest-labs/FLUX.1-dev", {"num_layers": 1, "num_single_layers": 1}),
    "sd3-medium": ("stabilityai/stable-diffusion-3.5-medium", {"num_layers": 2}),
    "sd3-large": ("stabilityai/stable-diffusion-3.5-large", {"num_layers": 2}),
}
TOLERANCE = 2e-5  # of pixels in [0, 1]
PLANS = [("ode", 0.0), ("flow", 0.0)]  # no noise by its kind, and by its level


def parts_of(folder: Path, transformer_name: str, depth: dict[str, int]) -> dict[str, Any]:
    """The pipeline's components with random weights, the same every time, but no text encoders."""
    transformer_class = getattr(diffusers, transformer_name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        config = transformer_class.load_config(folder / "transformer")
        parts = {
            "transformer": transformer_class.from_config({**config, **depth}),
            "vae": AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
        }
    for part in parts.values():
        part.requires_grad_(False).eval()
    return parts | {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    }


@pytest.fixture(scope="module", params=MODELS)
def policy(request) -> Iterator[Policy]:
    path, depth = MODELS[request.param]
    folder = PUBLISHED / path.replace("/", "--")
    plugin = resolve("gardo.policies", request.param.partition("-")[0])
    settings = plugin.Settings(path=path, size=[64, 64], text_tokens=16)
    parts = parts_of(folder, plugin.transformer_name, depth)
    made: Policy = plugin(settings, dtype=torch.float32, device=CPU, defer=True, parts=parts)
    if hasattr(made.pipeline, "tokenizer_max_length"):
        of_clip = json.loads((folder / "text_encoder" / "config.json").read_text())
        made.pipeline.tokenizer_max_length = of_clip["max_position_embeddings"]
    use_attention(made.transformer, "native")
    yield made
    gc.collect()  # pipelines hold themselves: the next model would find this one's gigabytes taken


@pytest.mark.full
def test_our_sampler_draws_what_the_pipeline_draws(policy, monkeypatch):
    """fp32, 3 steps; the two differ by how they round time and by the order of a few products."""
    draw = torch.Generator().manual_seed(SEED)
    shapes = policy.conditioning_shapes()
    told = {name: torch.randn(IMAGES, *shape, generator=draw) for name, shape in shapes.items()}
    monkeypatch.setattr(policy, "encode", lambda prompts: told)
    drawn = [
        sample(
            policy, ["one", "two"],
            SamplePlan(transitions(policy.sigmas(STEPS), kind, noise_level), record=(0,)),
            images_per_prompt=1, first=0, count=IMAGES, seed=SEED, step=0, device=CPU,
        )
        for kind, noise_level in PLANS
    ]  # fmt: skip
    noise_BX = drawn[0].state_BTX[:, 0]
    theirs = policy.generate(told, noise_BX, steps=STEPS)
    assert (theirs[0] - theirs[1]).abs().mean() > 100 * TOLERANCE
    for rollout in drawn:
        assert (rollout.final_BX - noise_BX).abs().mean() > 0.1  # the model moved them
        torch.testing.assert_close(rollout.images_B3HW, theirs, rtol=0, atol=TOLERANCE)
