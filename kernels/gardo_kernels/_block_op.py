"""What the ops of a transformer's blocks share: results, gradients, seen by a compiler.

Between its matrix products a block is bound by memory: each of these ops reads its inputs once and
writes its results once, where eager torch stores every step between. Arithmetic is fp32 and what is
stored is rounded once; eager torch rounds after each of its steps, so in bf16 the two differ by
what eager rounds on its way.

A compiler is shown a `torch.library.triton_op`, which it opens: Inductor places the kernels in its
own code. Registering one imports Inductor, a second that a run without these ops does not spend:
`gardo_kernels` does not import their files.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from gardo_kernels import _launch
from gardo_kernels._launch import INTERPRETED, check_device, check_floating, looked_on
from gardo_kernels._launch_shape import LaunchShape

Needs = tuple[bool, ...]  # of every input: whether it gets a gradient
Results = Tensor | tuple[Tensor, ...]

TOKENS = LaunchShape(rows=16)  # rows: tokens that a program adds up, where a sum is asked for


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton` where somebody looks on; elsewhere it would cost a millisecond.

    By this name torch finds an op's kernels in its source, for the key of its compile cache.
    """
    return torch.library.wrap_triton(kernel) if looked_on() else kernel


def launch(kernel: Any, grid: tuple[int, ...], shape: LaunchShape, **arguments: Any) -> None:
    """`_launch.launch`; nothing for fake tensors in Triton's interpreter, which would read them."""
    if INTERPRETED and any(isinstance(value, FakeTensor) for value in arguments.values()):
        return
    _launch.launch(kernel, grid, shape, **arguments)


class BlockOp:
    """An op from two functions that launch kernels; gardo::NAME, gardo::NAME_grad.

    `forward` makes the result, or a tuple of them, of the inputs, tensors before constants. `keep`
    says, of what needs a gradient, which tensors the backward pass reads, inputs first and then
    results as far as it names them: what is not read comes as None. `backward` gives the gradients
    of the first inputs, from the function `gradient` (as launches, or as the op), what needs one,
    the gradient of each result (None for one that was not used, but not for all of them), the
    tensors that `keep` names, and the constants.
    """

    def __init__(
        self, name: str, forward: Callable[..., Results], gradient: Callable[..., Any], *,
        keep: Callable[[Needs], Needs], backward: Callable[..., tuple[Tensor | None, ...]],
    ) -> None:  # fmt: skip
        self.forward, self.gradient, self.keep, self.backward = forward, gradient, keep, backward
        self.op, self.grad_op = (
            _shown(f"gardo::{name}", forward), _shown(f"gardo::{name}_grad", gradient)
        )  # fmt: skip

        def of_op(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
            return self.gradients(ctx, self.grad_op, upstreams)

        self.op.register_autograd(of_op, setup_context=self.save)

    def __call__(self, *inputs: Any) -> Any:
        return self.op(*inputs) if looked_on() else _Launches.apply(*inputs, self)

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
        ctx.constants, ctx.inputs = inputs[len(tensors) :], len(inputs)
        kept = self.keep(ctx.needs_input_grad[: len(inputs)])
        tensors += output if isinstance(output, tuple) else [output]
        named = tensors[: len(kept)]
        ctx.save_for_backward(*(x if k else None for x, k in zip(named, kept, strict=True)))
        ctx.set_materialize_grads(False)  # zeros for a result that was not used would be a launch

    def gradients(
        self, ctx: Any, gradient: Callable[..., Any], upstreams: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """One for each input."""
        needs = ctx.needs_input_grad[: ctx.inputs]
        if all(upstream is None for upstream in upstreams):
            return (None,) * len(needs)
        grads = self.backward(gradient, needs, *upstreams, *ctx.saved_tensors, *ctx.constants)
        return *grads, *[None] * (len(needs) - len(grads))


class _Launches(torch.autograd.Function):
    """`BlockOp` where nobody looks on."""

    @staticmethod
    def forward(ctx: Any, *inputs_and_op: Any) -> Results:
        *inputs, op = inputs_and_op
        output: Results = op.forward(*inputs)
        op.save(ctx, tuple(inputs), output)
        ctx.op = op
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstreams: Tensor | None) -> tuple[Tensor | None, ...]:
        return *ctx.op.gradients(ctx, ctx.op.gradient, upstreams), None


def _shown(name: str, function: Callable[..., Any]) -> Any:
    """The op as a compiler sees it; opaque where kernels are interpreted, which none can open."""
    if not INTERPRETED:
        return torch.library.triton_op(name, function, mutates_args=())
    op = torch.library.custom_op(name, function, mutates_args=())
    op.register_fake(function)
    return op


def width_of(count: int) -> int:
    """The power of two that holds so many."""
    return int(triton.next_power_of_2(count))


def rows_of(x: Tensor) -> Tensor:
    """[B, D] whose rows are each in one piece; a part of a wider one, as `chunk` gives, is."""
    return x if x.stride(-1) == 1 else x.contiguous()


def check_tokens(op: str, name: str, x: Tensor) -> None:
    """x must be a non-empty floating [B, L, D]."""
    if x.ndim != 3 or x.numel() == 0:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}; pass [samples, tokens, width], none empty"
        )
    check_floating(op, name, x)


def check_modulation(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """x must be a floating [B, D] for `like` [B, L, D], on its device."""
    wanted = (like.shape[0], like.shape[2])
    if x.shape != wanted:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}; pass one row for each sample of "
            f"{like_name}, shape {wanted}"
        )
    check_device(op, name, x, like_name, like)
    check_floating(op, name, x)
