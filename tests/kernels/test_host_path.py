"""Which way a call takes to its kernels: straight where nobody looks on, else by a custom op."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from gardo_kernels import nearest_cosine, policy_loss, sde_step
from gardo_kernels._examples import On, op_modules
from tests.kernels.launches import recorded
from tests.kernels.policy_problem import CLIP, of_kernels
from tests.kernels.row_losses import DEVICE

HERE = On("triton", torch.device(DEVICE))
LAUNCHES = {"policy_loss": 2, "nft_loss": 2, "awm_loss": 2, "sde_step": 1, "nearest_cosine": 2,
            "philox": 1, "qk_norm_rope": 2, "adaln_modulate": 2, "gated_residual": 2,
            "residual_adaln": 2, "gelu": 2}  # fmt: skip
CUSTOM = sorted(LAUNCHES.keys() - {"philox"})


class Seen(TorchDispatchMode):
    """The ops of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gardo":
            self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def results_of(name: str) -> list[torch.Tensor]:
    return [result for _, results in op_modules()[name].examples(HERE) for result in results]


@pytest.mark.parametrize("name", CUSTOM)
def test_both_ways_give_the_same_bits(name):
    plain = results_of(name)
    with Seen() as seen:
        shown = results_of(name)
    assert set(seen.ops) - {f"{name}_grad"} == {name}
    assert all(torch.equal(a, b) for a, b in zip(plain, shown, strict=True))


@pytest.mark.parametrize("name", CUSTOM)
def test_a_plain_call_has_no_custom_op(name, monkeypatch):
    """A custom op's Python, from which no call of its implementation comes."""

    def called(*_: object, **__: object) -> None:
        raise AssertionError("a custom op was called")

    monkeypatch.setattr(torch._library.custom_ops.CustomOpDef, "__call__", called)
    assert results_of(name)
    with pytest.raises(AssertionError, match="custom op"), Seen():
        results_of(name)


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches_of_a_plain_call(name):
    with recorded() as launches:
        next(op_modules()[name].examples(HERE))
    assert len(launches) == LAUNCHES[name]


def loss_of(v, others, options):
    return policy_loss(v, *others, **options, **CLIP, backend="triton").loss


def given():
    (v, *others), options = of_kernels(rows=3, dtype=torch.float32, shape=(40,))
    others = [x.to(DEVICE) for x in others]
    return v.to(DEVICE), others, {name: x.to(DEVICE) for name, x in options.items()}


def test_a_compiler_and_a_tracer_see_the_op():
    v, others, options = given()
    targets = []

    def keep(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(lambda v: loss_of(v, others, options), fullgraph=True, backend=keep)(v)
    assert "gardo.policy_loss.default" in targets
    traced = make_fx(lambda v: loss_of(v, others, options))(v)
    assert "gardo.policy_loss.default" in [str(node.target) for node in traced.graph.nodes]


def test_a_gradient_of_the_gradient_is_refused():
    v, others, options = given()
    v.requires_grad_()
    weight = torch.ones((), device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(loss_of(v, others, options), v, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_nothing_but_v_is_differentiated():
    v, (v_old, u), options = given()
    assert not loss_of(v, (v_old.requires_grad_(), u), options).requires_grad
    x = v_old.detach().requires_grad_()
    assert not any(d.requires_grad for d in nearest_cosine(x, backend="triton"))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_step_of_which_only_the_velocity_is_used(backend):
    """x weighs nothing then: its gradient is 0 in its own shape."""
    v, uncond, x = torch.randn(3, 2, 3, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for tensor in (v, uncond, x):
        tensor.requires_grad_()
    table, step_R = torch.zeros(1, 6, device=DEVICE), torch.zeros(2, dtype=torch.int64)
    out = sde_step(x, v, table, step_R.to(DEVICE), uncond=uncond, guidance=3.0, backend=backend)
    out.velocity.sum().backward()
    assert x.grad is None or torch.equal(x.grad, torch.zeros_like(x))
    torch.testing.assert_close(v.grad, torch.full_like(v, 3.0))
    torch.testing.assert_close(uncond.grad, torch.full_like(v, -2.0))
