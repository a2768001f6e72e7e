"""Leaf modules of ZeRO-3: which they are, and that being one changes no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from gardo.distributed.blocks import keep_parameters, leaves_of, make_leaves
from gardo.settings import model_path

OUTSIDE = ["time_text_embed", "norm_out"]


def flux(trains: bool) -> tuple[Any, list[nn.Module]]:
    model: Any = FluxTransformer2DModel.from_pretrained(
        Path(model_path("builtin:flux")) / "transformer"
    )
    model.requires_grad_(trains)
    return model, [*model.transformer_blocks, *model.single_transformer_blocks]


def output(model: Any) -> Tensor:
    """[2, 4, 16], of inputs that have no gradient."""
    torch.manual_seed(0)
    velocity: Tensor = model(
        hidden_states=torch.randn(2, 4, 16),
        encoder_hidden_states=torch.randn(2, 3, 32),
        pooled_projections=torch.randn(2, 32),
        timestep=torch.tensor([0.3, 0.8]),
        guidance=torch.full((2,), 3.5),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )[0]
    return velocity


def test_what_consists_of_modules_with_weights_is_a_leaf() -> None:
    model, blocks = flux(trains=True)
    leaves = leaves_of(model, blocks)
    assert leaves == [*blocks, *(getattr(model, name) for name in OUTSIDE)]


@pytest.mark.parametrize("trains", [True, False])
def test_a_leaf_computes_what_the_module_does(trains: bool) -> None:
    plain, _ = flux(trains)
    model, blocks = flux(trains)
    make_leaves(leaves_of(model, blocks))
    expected, found = output(plain), output(model)
    assert torch.equal(found, expected)
    assert found.requires_grad == trains  # a frozen leaf asks for no gradient of its input
    if trains:
        expected.square().sum().backward()
        found.square().sum().backward()
        gradients = {name: p.grad for name, p in plain.named_parameters()}
        assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters())


def test_hooks_see_what_has_a_gradient_and_nothing_else() -> None:
    """Each tensor that they see costs a function of DeepSpeed's on the tape."""
    model, blocks = flux(trains=True)
    make_leaves(leaves_of(model, blocks))
    seen: dict[str, list[bool]] = {}

    def hook(name: str) -> Any:
        return lambda _, given: seen.update({name: [v.requires_grad for v in given]})

    for name, module in (("block", blocks[0]), ("time", model.time_text_embed)):
        module.register_forward_pre_hook(hook(name))
    output(model)
    assert seen == {"block": [True, True, True], "time": [True]}  # not the rotary embedding
    with torch.no_grad():
        output(model)
    assert seen == {"block": [], "time": []}


def test_kept_parameters_are_those_that_a_walk_finds() -> None:
    model, blocks = flux(trains=True)
    leaves = leaves_of(model, blocks)
    walked = [list(leaf.named_parameters()) for leaf in leaves]
    make_leaves(leaves)
    keep_parameters(leaves)
    assert [list(leaf.named_parameters()) for leaf in leaves] == walked
    own = leaves[0].attn.named_parameters("attn")
    inside = [(n, p) for n, p in walked[0] if n.startswith("attn.")]
    assert list(own) == inside
    assert not list(leaves[0].named_parameters(recurse=False))
    assert dict(leaves[0].named_parameters("x")) == {f"x.{n}": p for n, p in walked[0]}
