"""A LoRA folded into its layers: PEFT's values and gradients, fewer launches, PEFT's names."""

from __future__ import annotations

import pytest
import torch

from gardo.policies.attention import use_attention
from gardo.policies.base import Policy
from gardo.policies.lora_linear import project
from tests.engine.policies.built_in import Calls, built_in, sampled, trained

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32, sums in another order


def policies(family: str, mode="none") -> tuple[Policy, Policy]:
    """Of one LoRA: as PEFT adds it, and folded."""
    peft, folded = built_in(family), built_in(family)
    for policy in (peft, folded):
        use_attention(policy.transformer, "native")
    folded.fold_lora(mode)
    return peft, folded


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_values_and_gradients_are_pefts(family: str) -> None:
    peft, folded = policies(family)
    torch.testing.assert_close(sampled(folded), sampled(peft), **CLOSE)
    expected, gradients = trained(peft)
    out, again = trained(folded)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(again, gradients, **CLOSE)


def test_sampling_and_training_see_the_same_bits() -> None:
    _, folded = policies("flux")
    assert torch.equal(sampled(folded), trained(folded)[0])


@pytest.mark.parametrize("mode", ["selective", "matmuls", "full"])
def test_checkpoints_change_no_bit(mode) -> None:
    _, folded = policies("flux", mode)
    expected, gradients = trained(folded)
    out, again = trained(folded, mode)
    assert torch.equal(out, expected)
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


def test_names_and_parameters_stay() -> None:
    peft, folded = policies("sd3")
    assert list(folded.trainable()) == list(peft.trainable())
    assert [name for name, _ in folded.transformer.named_modules()] == [
        name for name, _ in peft.transformer.named_modules()
    ]


def test_fewer_launches() -> None:
    """Per layer no product of its own with A where three share it, no scaling, no sum."""
    counts = []
    for policy in policies("flux"):
        with Calls() as seen:
            sampled(policy)
        counts.append(seen.of)
    peft, folded = counts
    adapted = sum(1 for name in built_in("flux").trainable() if "lora_A" in name)
    three = 6  # two double blocks of two streams, two single blocks
    matmuls = [sum(count.get(op, 0) for op in ("mm", "addmm", "addmm_")) for count in counts]
    assert matmuls[0] - matmuls[1] == 2 * three
    assert folded["addmm_"] == adapted
    assert peft["mul"] - folded["mul"] == peft["add"] - folded["add"] == adapted


def test_an_adapter_that_is_off_adds_nothing() -> None:
    _, folded = policies("flux")
    with_it = sampled(folded)
    folded.transformer.disable_adapters()
    without = sampled(folded)
    folded.transformer.enable_adapters()
    assert not torch.equal(without, with_it) and torch.equal(sampled(folded), with_it)


def test_layers_without_an_adapter_are_called_as_they_are() -> None:
    layers = [torch.nn.Linear(4, 3), torch.nn.Linear(4, 2)]
    x = torch.randn(5, 4)
    made = zip(project(layers, x), layers, strict=True)
    assert all(torch.equal(one, layer(x)) for one, layer in made)


def test_bf16_is_rounded_less_often_than_pefts() -> None:
    """Against fp32 arithmetic on the same bf16 weights."""
    exact, _ = policies("flux")
    errors = []
    for policy in policies("flux"):
        policy.transformer.to(torch.bfloat16)
        for one, other in zip(
            exact.transformer.parameters(), policy.transformer.parameters(), strict=True
        ):
            one.data.copy_(other.data)
        layer = policy.transformer.transformer_blocks[0].ff.net[0].proj
        wide = exact.transformer.transformer_blocks[0].ff.net[0].proj
        x = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.no_grad():
            errors.append((layer(x).float() - wide(x.float())).square().mean().sqrt())
    peft, folded = errors
    assert folded < peft
