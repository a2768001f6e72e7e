"""A base in few bits: the same in every forward pass, near the whole one, trained by a LoRA alone.

Runs on it are in tests/integration/test_quantised.py.
"""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from gardo.plugins import resolve
from gardo.policies.base import Policy
from gardo.policies.lora_files import save_diffusers
from gardo.policies.quantised import BASES, linears, quantise, stored_bytes
from gardo.rollout import rows_of
from gardo.settings import FieldError
from gardo.tiny.models import flux_pipeline

PROMPTS = ["two red circles", "one blue square", "three green triangles"]
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Flux of 4 heads of 16: nf4's blocks are 64 weights, and the built-in's rows 96."""
    folder = tmp_path_factory.mktemp("narrow") / "flux"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        pipeline = flux_pipeline()
        config = {**pipeline.transformer.config, "num_attention_heads": 4}
        pipeline.transformer = FluxTransformer2DModel.from_config(config)
        pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["flux", "sd3"])
def make(request: pytest.FixtureRequest, narrow: Path) -> Any:
    """A policy of a family: make(base, dtype), with a LoRA that has moved unless told otherwise."""

    def build(base: str | None, dtype: torch.dtype = torch.float32, *, lora: bool = True) -> Policy:
        plugin = resolve("gardo.policies", request.param)
        path = str(narrow) if request.param == "flux" else "builtin:sd3"
        settings = plugin.Settings(path=path, size=(16, 32), text_tokens=8, base=base)
        policy: Policy = plugin(settings, dtype=dtype, device=CPU, defer=True)
        if lora:
            policy.train_lora(rank=4, alpha=8, targets=None, seed=5)
        policy.load_transformer()
        generator = torch.Generator().manual_seed(3)
        for parameter in policy.trainable().values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += (0.02 * noise).to(parameter)
        return policy

    return build


def inputs(policy: Policy) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x_RX = torch.randn(len(PROMPTS), *policy.latent_shape, generator=generator)
    return x_RX, torch.tensor([0.9, 0.5, 0.1]), policy.encode(PROMPTS)


def sampled(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.velocity(*inputs(policy))


def trained(policy: Policy) -> tuple[Tensor, list[Tensor]]:
    """The velocities, and the gradients of their squares."""
    velocity = policy.velocity(*inputs(policy))
    velocity.float().square().sum().backward()
    return velocity.detach(), [p.grad for p in policy.trainable().values()]


def error(one: Tensor, two: Tensor) -> float:
    """RMS of the difference over RMS."""
    return float((one - two).float().square().mean().sqrt() / two.float().square().mean().sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_training_sees_what_sampling_saw(make: Any, base: str, dtype: torch.dtype) -> None:
    """To the bit, also where blocks run again; gradients are where a whole base has them."""
    policy, again, whole = make(base, dtype), make(base, dtype), make(None, dtype)
    again.checkpoint_activations("full")
    seen = sampled(policy)
    for one in (policy, again):
        velocity, gradients = trained(one)
        assert torch.equal(velocity, seen)
        assert torch.equal(sampled(one), seen)  # a forward pass leaves the base as it was
    first = [p.grad for p in policy.trainable().values()]
    for ours, theirs, plain in zip(first, gradients, trained(whole)[1], strict=True):
        assert torch.equal(ours, theirs)
        assert bool(ours.any()) == bool(plain.any())  # not where only the last block's text is
    assert {p.dtype for p in policy.trainable().values()} == {dtype}


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_the_rounded_base(make: Any, base: str) -> None:
    """Of a plain model whose weights are what the layers hold, read back; int8 rounds inputs too,
    by 1/254 of a row's largest at most, which the backward pass does not see."""
    policy, plain = make(base), make(None)
    names = dict(linears(policy.transformer, policy.block_lists))
    identity = {n: torch.eye(layer.in_features) for n, layer in names.items()}
    for name, layer in linears(plain.transformer, plain.block_lists):
        with torch.no_grad():
            whole = names[name](identity[name])
            layer.weight.copy_((whole - (0 if layer.bias is None else layer.bias)).T)
    (ours, our_gradients), (theirs, their_gradients) = trained(policy), trained(plain)
    assert error(ours, theirs) < {"nf4": 1e-5, "int8": 0.02}[base]
    gradients = [torch.cat([g.flatten() for g in gs]) for gs in (our_gradients, their_gradients)]
    assert error(*gradients) < {"nf4": 1e-4, "int8": 0.1}[base]


@pytest.mark.parametrize(("base", "most"), [("nf4", 0.15), ("int8", 0.02)])
def test_velocities_are_near_the_whole_bases(make: Any, base: str, most: float) -> None:
    """nf4 is off by 9 % of a normal weight, int8 by 1/254 of a row's largest, weights and inputs;
    the residual stream passes these models by, so velocities are off by less than a few of these.
    """
    off = error(sampled(make(base)), sampled(make(None)))
    assert 1e-4 < off < most


@pytest.mark.parametrize("base", BASES)
def test_rows_do_not_see_each_other(make: Any, base: str) -> None:
    policy = make(base)
    together, (x_RX, sigma_R, conditioning) = sampled(policy), inputs(policy)
    row = torch.tensor([1])
    with torch.no_grad():
        alone = policy.velocity(x_RX[row], sigma_R[row], rows_of(conditioning, row))
    torch.testing.assert_close(alone, together[row], rtol=0, atol=1e-5)
    _, layer = next(linears(policy.transformer, policy.block_lists))
    calm_RC = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
    wild_RC = torch.stack([calm_RC[0] * 40, calm_RC[1]])  # LLM.int8() takes outliers from all rows
    with torch.no_grad():
        torch.testing.assert_close(layer(wild_RC)[1], layer(calm_RC)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", BASES)
def test_a_lora_has_the_names_and_the_start_that_it_has_on_a_whole_base(
    make: Any, base: str
) -> None:
    ours, theirs = make(base).trainable(), make(None).trainable()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("base", BASES)
def test_an_export_loads_onto_a_whole_base(make: Any, base: str, tmp_path: Path) -> None:
    policy, trained, fresh = make(base), make(None), make(None, lora=False)
    weights = {n: p.detach().float().clone() for n, p in policy.trainable().items()}
    file = save_diffusers(weights, policy.lora, tmp_path)
    fresh.pipeline.load_lora_weights(file.parent)
    assert torch.equal(sampled(fresh), sampled(trained))
    assert policy.identity == fresh.identity  # that of the files


@pytest.mark.parametrize("base", BASES)
def test_the_pipeline_samples_from_it(make: Any, base: str) -> None:
    policy, whole = make(base), make(None)
    x_RX, _, conditioning = inputs(policy)
    pictures = [one.generate(conditioning, x_RX, steps=2) for one in (policy, whole)]
    assert pictures[0].shape == (3, 3, 16, 32)
    assert 0 < (pictures[0] - pictures[1]).abs().mean() < 0.1


@pytest.mark.parametrize("base", BASES)
def test_stored_bytes_are_those_of_the_layers(make: Any, base: str) -> None:
    policy, whole = make(base), make(None)
    layers = dict(linears(policy.transformer, policy.block_lists))
    inside = [m for block in policy.blocks() for m in block.modules() if isinstance(m, nn.Linear)]
    adapters = 2 * sum(".lora_A" in name for name in policy.trainable())
    assert len(layers) == len(inside) - adapters
    for name, plain in linears(whole.transformer, whole.block_lists):
        assert stored_bytes(base, plain) == pytest.approx(held(layers[name]), rel=0.01), name


def held(layer: Any) -> int:
    """Bytes of all tensors that a layer's weights consist of."""
    weight = layer.weight
    if weight.dtype == torch.int8:
        return weight.nbytes + (weight.SCB if weight.SCB is not None else layer.state.SCB).nbytes
    state = weight.quant_state
    parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    return weight.nbytes + sum(part.nbytes for part in parts)


def test_int8_keeps_no_input_that_checkpointing_lets_go() -> None:
    holder = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(64, 64)])})
    weight = holder["blocks"][0].weight.detach()
    quantise(holder, ("blocks",), BASES["int8"], torch.float32)
    layer = holder["blocks"][0].eval()
    BASES["int8"].set(layer, weight)
    x = torch.randn(3, 64).requires_grad_()
    middle = x * 2
    kept = weakref.ref(middle)
    y = layer(middle)
    del middle
    gc.collect()
    assert kept() is None
    y.sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    plugin = resolve("gardo.policies", "flux")
    settings = plugin.Settings(path="builtin:flux", size=(16, 16), text_tokens=8, base="nf4")
    with pytest.raises(FieldError, match=r"^model\.base: transformer_blocks\.0\.norm1\.linear: row"
                       r"s of 96 weights are no whole blocks of 64; use int8$"):  # fmt: skip
        plugin(settings, dtype=torch.float32, device=CPU, defer=True)
