"""Blocks by our kernels: diffusers' values and gradients, and no module changes its name."""

from __future__ import annotations

import pytest
import torch

from gardo.policies.attention import use_attention
from gardo.policies.base import Policy
from gardo_kernels import _launch
from tests.engine.policies.built_in import Calls, built_in, sampled, trained

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32, sums in another order
ALL = [("flux", "lora"), ("flux", "full"), ("sd3", "lora"), ("sd3", "full")]


def policies(family: str, weights: str, backend="torch") -> tuple[Policy, Policy]:
    """As diffusers computes it, and by our ops."""
    diffusers, ours = built_in(family, weights), built_in(family, weights)
    use_attention(ours.transformer, "native")
    ours.use_block_kernels(backend)
    return diffusers, ours


@pytest.mark.parametrize(("family", "weights"), ALL)
def test_values_and_gradients_are_those_of_diffusers(family: str, weights: str) -> None:
    diffusers, ours = policies(family, weights)
    torch.testing.assert_close(sampled(ours), sampled(diffusers), **CLOSE)
    expected, gradients = trained(diffusers)
    out, again = trained(ours)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(again, gradients, rtol=1e-3, atol=1e-5)
    assert list(ours.trainable()) == list(diffusers.trainable())


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_the_kernels_themselves(family: str) -> None:
    """In Triton's interpreter."""
    diffusers, ours = policies(family, "lora", "triton")
    torch.testing.assert_close(sampled(ours), sampled(diffusers), **CLOSE)
    (out, gradients), (expected, of_diffusers) = trained(ours), trained(diffusers)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(gradients, of_diffusers, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", ["selective", "matmuls", "full"])
def test_checkpoints_change_no_bit(mode) -> None:
    _, ours = policies("flux", "lora")
    expected, gradients = trained(ours)
    out, again = trained(ours, mode)
    assert torch.equal(out, expected)
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_no_norm_is_left_to_torch(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But in SD3's last block, whose text is normed by another module, and outside blocks."""
    monkeypatch.setattr(_launch, "launch", lambda *_, **__: None)  # calls are counted, not values
    _, ours = policies(family, "lora", "triton")
    whole, blocks = Calls(), ours.blocks()
    seen: dict[str, int] = {}

    def before(*_: object) -> None:
        whole.of.clear()

    def after(*_: object) -> None:
        for name, count in whole.of.items():
            seen[name] = seen.get(name, 0) + count

    for block in blocks[:-1]:
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
    with whole:
        sampled(ours)
    assert not {"native_layer_norm", "_fused_rms_norm", "rms_norm", "pow", "rsqrt"} & set(seen)
    for op in ("adaln_modulate", "gated_residual", "residual_adaln", "gelu", "qk_norm_rope"):
        assert seen[op] > 0
