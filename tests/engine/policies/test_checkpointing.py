"""Keeping less for the backward pass: the same bits, less memory, and what it runs again."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gardo.policies import checkpointing
from tests.engine.policies.built_in import Calls, built_in, sampled, trained

MODES = ("selective", "matmuls", "full")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(scope="module", params=["flux-lora", "flux-full", "sd3-lora", "sd3-full"])
def policy(request):
    return built_in(*request.param.split("-"))


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_keeping_all(policy, mode):
    expected, gradients = trained(policy)
    out, again = trained(policy, mode)
    assert torch.equal(out, expected) and torch.equal(out, sampled(policy))
    assert again.keys() == gradients.keys()
    assert all(torch.equal(again[name], gradient) for name, gradient in gradients.items())


def calls(policy, mode):
    with Calls() as seen:
        trained(policy, mode)
    return seen.of


def test_attention_runs_again_in_full_alone(policy):
    counts = {mode: calls(policy, mode)[ATTENTION] for mode in ("none", *MODES)}
    assert counts["none"] == counts["selective"] == counts["matmuls"] > 0
    assert counts["full"] == 2 * counts["none"]


def flops(policy, mode):
    with FlopCounterMode(display=False) as counter:  # does not know the CPU's attention
        trained(policy, mode)
    return counter.get_total_flops()


def test_matmuls_are_not_run_twice(policy):
    """But an adapter's second product, and vectors' a row; selective runs nearly all of them."""
    none, matmuls, selective = (flops(policy, mode) for mode in ("none", "matmuls", "selective"))
    with FlopCounterMode(display=False) as counter:
        sampled(policy)
    forward = counter.get_total_flops()
    assert selective - none > 0.8 * forward
    if policy.lora is None:
        assert matmuls - none < 0.01 * forward
    else:
        assert 0 < matmuls - none < 0.05 * forward


@pytest.mark.parametrize(
    ("left", "right", "thin"),
    [((10, 64), (64, 3072), True), ((10, 3072), (3072, 64), False),  # a LoRA's B, its A
     ((10, 3072), (3072, 12288), False),  # a feed-forward's first layer
     ((2, 900, 64), (2, 64, 900), True), ((2, 900, 900), (2, 900, 64), False)],  # scores, values
)  # fmt: skip
def test_which_products_are_thin(left, right, thin):
    assert checkpointing._thin(torch.empty(left), torch.empty(right)) is thin
    bias = torch.empty(right[-1])
    assert checkpointing._thin(bias, torch.empty(left), torch.empty(right)) is thin


def test_every_attention_of_torch_is_known():
    """An op of a new release that is not in the list would run again, unnoticed."""
    kept = {op.overloadpacket.__name__ for op in checkpointing.attention_ops()[1:]}
    every = {schema.name.partition("::")[2] for schema in torch._C._jit_get_all_schemas()}
    fused = re.compile(r"_scaled_dot_product_(?!attention_math)\w+(?<!_backward)")
    assert kept >= {name for name in every if fused.fullmatch(name)}
