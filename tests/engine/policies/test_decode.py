"""Decoding a few images at a time, and large ones in tiles."""

import pytest
import torch

from gardo.config import load
from gardo.loading import build_policy
from gardo.policies import base
from tests import ROOT

CPU = torch.device("cpu")


def policy_of(*settings):
    return build_policy(load(ROOT / "recipes/tiny_flux_gardo.yaml", settings), CPU)


def latents(policy, images):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(images, *policy.latent_shape, generator=draw)


def decoded_at_once(policy, monkeypatch):
    """How many images each call of the VAE has, while so many are decoded."""
    sizes = []
    whole = policy.pipeline.vae.decode
    monkeypatch.setattr(
        policy.pipeline.vae, "decode", lambda z, *a, **k: sizes.append(len(z)) or whole(z, *a, **k)
    )
    return sizes


@pytest.mark.parametrize(("batch", "sizes"), [(2, [2, 2, 1]), (5, [5]), (64, [5])])
def test_chunks_give_the_same_images(batch, sizes, monkeypatch):
    policy = policy_of(f"rollout.decode_batch={batch}")
    z = latents(policy, 5)
    whole = policy._decode(z)
    seen = decoded_at_once(policy, monkeypatch)
    torch.testing.assert_close(policy.decode(z), whole, rtol=0, atol=1e-6)
    assert seen == sizes


def test_gradients_reach_the_latents_through_chunks():
    policy = policy_of("rollout.decode_batch=2")
    z = latents(policy, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(policy.decode(z).square().sum(), z)
    (wanted,) = torch.autograd.grad(policy._decode(z).square().sum(), z)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pixels", "batch", "tiled"), [(4096, 4, False), (1023, 1, True)])
def test_defaults_follow_the_pixels(pixels, batch, tiled, monkeypatch):
    """Pictures of 32 x 32 where so many pixels are decoded at once."""
    monkeypatch.setattr(base, "DECODED", pixels)
    policy = policy_of()
    assert (policy.decode_batch, policy.pipeline.vae.use_tiling) == (batch, tiled)


def test_tiles_make_nearly_the_same_picture(monkeypatch):
    """A picture of 64 x 64, wider than a tile of the tiny VAE, with seams that are blended."""
    whole = policy_of("model.size=[64, 64]")
    monkeypatch.setattr(base, "DECODED", 64 * 64 - 1)
    tiled = policy_of("model.size=[64, 64]")
    z = latents(whole, 1)
    one, other = whole.decode(z), tiled.decode(z)
    assert one.shape == other.shape == (1, 3, 64, 64)
    difference = (one - other).abs()
    assert 0 < difference.mean() < 0.05
