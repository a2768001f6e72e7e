"""Flux's own: tables of positions are made once."""

from __future__ import annotations

from typing import Any

import torch

from gardo.policies.flux import FluxPolicy, FluxSettings


def test_rotary_tables_are_made_once_and_are_the_models_own() -> None:
    settings = FluxSettings(path="builtin:flux", size=(32, 32), text_tokens=8)
    policy = FluxPolicy(settings, dtype=torch.float32, device=torch.device("cpu"))
    positions = policy.transformer.pos_embed
    seen: list[Any] = []
    positions.embed.register_forward_hook(lambda module, inputs, said: seen.append((inputs, said)))
    text = policy.encode(["a circle"])
    x = torch.randn(1, *policy.latent_shape)
    first = policy.velocity(x, torch.tensor([0.5]), text)
    again = policy.velocity(x, torch.tensor([0.5]), text)
    policy.generate(text, x, steps=2)
    ((ids,), said) = seen[0]
    assert len(seen) == 1 and torch.equal(first, again)
    assert all(map(torch.equal, said, positions.embed(ids)))
