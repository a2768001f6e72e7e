"""Compiled blocks: one graph for all blocks of a kind, the same numbers, and no compiler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._inductor.utils import fresh_inductor_cache

from gardo.policies import compiling
from gardo.policies.base import Policy
from gardo.types import no_phase
from tests.engine.policies.built_in import CPU, built_in, inputs, sampled, trained

SUMMED = {"rtol": 1e-4, "atol": 1e-6}  # a gradient's parts are added in another order
FULL = pytest.mark.full
ALL = [
    ("flux", "lora"),
    ("sd3", "full"),
    pytest.param("flux", "full", marks=FULL),
    pytest.param("sd3", "lora", marks=FULL),
]


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks are traced, and run by torch's own operators: the same bits, in seconds."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def with_gradients(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    out = policy.velocity(*inputs(policy))
    out.float().square().mean().backward()
    gradients = {n: p.grad for n, p in policy.trainable().items() if p.grad is not None}
    policy.transformer.zero_grad()
    return out.detach(), gradients


@pytest.mark.parametrize(("family", "weights"), ALL)
def test_compiled_blocks_give_the_same_bits_and_gradients(family: str, weights: str) -> None:
    policy = built_in(family, weights)
    expected, gradients = trained(policy)
    policy.compile_blocks("none")
    out, again = with_gradients(policy)
    assert torch.equal(out, expected) and torch.equal(sampled(policy), expected)
    torch.testing.assert_close(again, gradients, **SUMMED)


@pytest.mark.parametrize("mode", [pytest.param("selective", marks=FULL), "matmuls", "full"])
def test_compiled_blocks_keep_what_they_were_told(mode) -> None:
    policy = built_in("flux", "full")
    expected, gradients = trained(policy)
    policy.checkpoint_activations(mode)
    policy.compile_blocks(mode)
    out, again = with_gradients(policy)
    assert torch.equal(out, expected)
    torch.testing.assert_close(again, gradients, **SUMMED)


def test_blocks_of_a_kind_share_their_graphs() -> None:
    """Two kinds of two blocks: the first of each kind may have inputs of its own kind."""
    policy = built_in("flux", "full")
    policy.compile_blocks("none")
    seen: list[str] = []

    def phase(name: str, *, rows: int = 0):
        seen.append(name)
        return no_phase(name)

    inputs(policy)
    policy.phase = phase
    sampled(policy)
    with_gradients(policy)
    assert policy.compiled is not None
    graphs, seconds = policy.compiled.take()
    assert 4 <= graphs <= 6 and seconds > 0 and seen == ["compile"] * graphs
    for parameter in policy.trainable().values():  # as when slots are exchanged
        parameter.data = parameter.data * 1.01
    sampled(policy)
    with_gradients(policy)
    assert policy.compiled.take() == (0, 0.0)
    policy.compiled.close()


def test_shapes_that_do_not_stand_still_are_an_error() -> None:
    policy = built_in("flux", "full")
    policy.compile_blocks("none")
    limited = torch._dynamo.config.patch(recompile_limit=1)
    with limited, pytest.raises(Exception, match="recompile_limit"):
        for rows in (3, 2, 1):
            x_RX, sigma_R, conditioning = inputs(policy)
            few = {name: value[:rows] for name, value in conditioning.items()}
            with torch.no_grad():
                policy.velocity(x_RX[:rows], sigma_R[:rows], few)


def test_where_no_compiler_is_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    with fresh_inductor_cache(), config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        trouble = compiling.compile_trouble(CPU)
    assert trouble.startswith("torch does not compile here (") and trouble.endswith("needs g++")


def test_where_one_is_nothing_is_said() -> None:
    assert compiling.compile_trouble(CPU) == ""
