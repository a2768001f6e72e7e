"""GELU by its tanh form, forward and backward, also written behind a second tensor.

For each element of a projection's output,

    y = x s,    s = (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)),    u = sqrt(2 / pi) (x + 0.044715 x^3)

and with the gradient g of y,

    dx = g (s + 2 x s (1 - s) u'),    u' = sqrt(2 / pi) (1 + 0.134145 x^2)

With `before` [..., D] the result is [before, y] of width D + N, written once: the input of the last
projection of diffusers' FluxSingleTransformerBlock, which eager torch makes by a GELU and a `cat`.
The gradient of `before` is then a view of the upstream gradient.

Source: arXiv 1606.08415; diffusers' `gelu-approximate` and FluxSingleTransformerBlock.

Least traffic, an element: forward x read, y written; backward g and x read, dx written: s is taken
again. One launch each.

Shapes: R rows (all leading dimensions), N elements of a row, D of `before`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels._block_op import BlockOp, Needs, launch, wrap_triton
from gardo_kernels._examples import Examples, On
from gardo_kernels._launch import (
    Backend,
    block_and_row,
    check_device,
    check_samples,
    choose_backend,
    compute_dtype,
    grid_of_rows,
)
from gardo_kernels._launch_shape import LaunchShape, launch_shape

TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)


def gelu_ref(x: Tensor, before: Tensor | None = None) -> Tensor:
    """The formula in plain torch, differentiable; fp32 (fp64 for fp64) inside, the dtype of x."""
    y = torch.nn.functional.gelu(x.to(compute_dtype(x)), approximate="tanh").to(x.dtype)
    return y if before is None else torch.cat([before.to(x.dtype), y], -1)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _sigmoid(x):
    """s of the formula."""
    return 1.0 / (1.0 + tl.exp(-(x + x * x * x * CUBIC) * TWICE_ROOT))


@triton.jit
def _gelu_fwd_kernel(x_ptr, before_ptr, y_ptr, elements, before, BLOCK: tl.constexpr):
    """BLOCK elements of a row of the result, of which the first `before` are copied."""
    width = before + elements
    block, row = block_and_row(width, BLOCK)
    column = block * BLOCK + tl.arange(0, BLOCK)
    behind = (column >= before) & (column < width)
    x = tl.load(x_ptr + row * elements + (column - before), mask=behind, other=0.0).to(tl.float32)
    y = x * _sigmoid(x)
    if before_ptr is not None:
        copied = column < before
        here = row * before + column
        y = tl.where(copied, tl.load(before_ptr + here, mask=copied, other=0.0).to(tl.float32), y)
    at = row * width + column
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=column < width)


@triton.jit
def _gelu_bwd_kernel(upstream_ptr, x_ptr, grad_ptr, elements, before, BLOCK: tl.constexpr):
    """BLOCK elements of a row; the upstream gradient's begins with `before` that are not ours."""
    block, row = block_and_row(elements, BLOCK)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < elements
    at = row * elements + column
    upstream_at = row * (before + elements) + before + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(upstream_ptr + upstream_at, mask=inside, other=0.0).to(tl.float32)
    s = _sigmoid(x)
    slope = (1.0 + x * x * (3 * CUBIC)) * TWICE_ROOT
    grad = g * (s + x * s * (1.0 - s) * slope)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


# ---- op ------------------------------------------------------------------------------------------


def _layout(x: Tensor) -> tuple[int, int, LaunchShape]:
    """Rows, elements of one, and the shape of the op's launches over them."""
    N = x.shape[-1]
    R = x.numel() // N
    return R, N, launch_shape("gelu", R, N, x.device)


def _launch(x: Tensor, before: Tensor | None) -> Tensor:
    x, D = x.contiguous(), 0 if before is None else before.shape[-1]
    R, N, shape = _layout(x)
    y = x.new_empty(*x.shape[:-1], D + N)
    launch(
        wrap_triton(_gelu_fwd_kernel), grid_of_rows(R, D + N, shape.block), shape, x_ptr=x,
        before_ptr=None if before is None else before.contiguous(), y_ptr=y, elements=N, before=D,
        BLOCK=shape.block,
    )  # fmt: skip
    return y


def _launch_gradient(upstream: Tensor, x: Tensor) -> Tensor:
    """dx in the dtype of x; `upstream` may be wider than x, which is its end."""
    upstream, x = upstream.contiguous(), x.contiguous()
    R, N, shape = _layout(x)
    grad = torch.empty_like(x)
    launch(
        wrap_triton(_gelu_bwd_kernel), grid_of_rows(R, N, shape.block), shape,
        upstream_ptr=upstream, x_ptr=x, grad_ptr=grad, elements=N,
        before=upstream.shape[-1] - N, BLOCK=shape.block,
    )  # fmt: skip
    return grad


def _backward(
    gradient: Any, needs: Needs, upstream: Tensor, x: Tensor, _before: None
) -> tuple[Tensor | None, ...]:
    for_x, for_before = needs
    rest = upstream[..., : upstream.shape[-1] - x.shape[-1]] if for_before else None
    return gradient(upstream, x) if for_x else None, rest


_gelu = BlockOp("gelu", _launch, _launch_gradient, keep=lambda _: (True, False), backward=_backward)


def gelu(x: Tensor, before: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """GELU(x) [..., N], or [before, GELU(x)] [..., D + N], in the dtype of x.

    x: [..., N]; before: [..., D] with the same leading dimensions. Floating, of any dtype.
    Differentiable in both, once; a gradient that nothing asks for is not computed.

    Arithmetic is fp32 (fp64 where x is fp64), rounded once. ValueError for shapes, dtypes or
    devices that do not fit. Source: arXiv 1606.08415, the tanh form.
    """
    op = "gelu"
    check_samples(op, "x", x)
    if before is not None:
        check_samples(op, "before", before)
        if before.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"{op}: before has shape {tuple(before.shape)} but x has {tuple(x.shape)}; pass "
                "them alike in all dimensions but the last"
            )
        check_device(op, "before", before, "x", x)
    if choose_backend(op, backend, x) == "torch":
        return gelu_ref(x, before)
    return _gelu(x, before)


def examples(on: On) -> Examples:
    """Alone, and behind another; see `_examples.py`."""
    x, before, weight, more = on.samples(4)
    for name, leaves in (("", [x]), ("behind", [x, before])):
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        y = gelu(*leaves, backend=on.backend)
        weights = weight if name == "" else torch.cat([more, weight], -1)
        yield name, [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]
