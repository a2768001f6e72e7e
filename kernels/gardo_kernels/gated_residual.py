"""A gated residual: what a sub-layer gives, weighed by the time embedding, joins the stream.

For token l of sample b,

    z = x + gate_b y

and with the gradient g of z,

    dx = g        dy = g gate_b        dgate_b = sum_l g y

Source: adaLN-Zero of DiT, arXiv 2212.09748; both residuals of diffusers' FluxTransformerBlock and
JointTransformerBlock, and the one of FluxSingleTransformerBlock.

dx is g itself: nothing is launched for it. The sum over tokens is wanted in full fine-tuning alone:
a program adds up a chunk of tokens, then torch adds the chunks; no atomics, so equal bits. Only
then does the backward pass need y.

Least traffic, an element: forward x and y read, z written; backward g read, dy written; with the
sum y read too and 4 bytes for each chunk of tokens. One launch each; two more with the sum.

Shapes: B samples, L tokens, D width, C chunks of tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels import _block_op as shared
from gardo_kernels._block_op import BlockOp, Needs, launch, wrap_triton
from gardo_kernels._examples import Examples, On
from gardo_kernels._launch import (
    Backend,
    block_and_row,
    cdiv,
    check_like,
    choose_backend,
    compute_dtype,
)
from gardo_kernels._launch_shape import LaunchShape, launch_shape


def gated_residual_ref(x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor) -> Tensor:
    """The formula in plain torch, differentiable; fp32 (fp64 for fp64) inside, the dtype of x."""
    dtype = compute_dtype(x_BLD, y_BLD)
    z_BLD = x_BLD.to(dtype) + gate_BD.to(dtype)[:, None] * y_BLD.to(dtype)
    return z_BLD.to(x_BLD.dtype)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _gated_residual_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, z_ptr, tokens, width, gate_row_stride, BLOCK: tl.constexpr
):
    """BLOCK elements of one token of one sample."""
    block, row = block_and_row(width, BLOCK)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    gate_at = row // tokens * gate_row_stride + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(z_ptr + at, (x + gate * y).to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_residual_bwd_kernel(
    upstream_ptr, y_ptr, gate_ptr, grad_ptr, sums_ptr, tokens, chunks, width, gate_row_stride,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of CHUNK tokens of one sample: dy, and sums[sample, chunk] = sum of g y."""
    block, row = block_and_row(width, BLOCK)
    sample = row // chunks
    chunk = row % chunks
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate_at = sample * gate_row_stride + column
    gate = tl.load(gate_ptr + gate_at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for index in range(CHUNK):
        token = chunk * CHUNK + index
        here = inside & (token < tokens)
        at = (sample * tokens + token) * width + column
        g = tl.load(upstream_ptr + at, mask=here, other=0.0).to(tl.float32)
        if grad_ptr is not None:
            tl.store(grad_ptr + at, (g * gate).to(grad_ptr.dtype.element_ty), mask=here)
        if sums_ptr is not None:
            total += g * tl.load(y_ptr + at, mask=here, other=0.0).to(tl.float32)
    if sums_ptr is not None:
        tl.store(sums_ptr + row * width + column, total, mask=inside)


# ---- op ------------------------------------------------------------------------------------------


def _shape(y_BLD: Tensor) -> LaunchShape:
    B, L, D = y_BLD.shape
    return launch_shape("gated_residual", B * L, D, y_BLD.device, shared.TOKENS)


def _launch(y_BLD: Tensor, gate_BD: Tensor, x_BLD: Tensor) -> Tensor:
    y_BLD, gate_BD, x_BLD = y_BLD.contiguous(), shared.rows_of(gate_BD), x_BLD.contiguous()
    B, L, D = x_BLD.shape
    shape, z_BLD = _shape(y_BLD), torch.empty_like(x_BLD)
    launch(
        wrap_triton(_gated_residual_fwd_kernel), (B * L * cdiv(D, shape.block),), shape,
        x_ptr=x_BLD, y_ptr=y_BLD, gate_ptr=gate_BD, z_ptr=z_BLD, tokens=L, width=D,
        gate_row_stride=gate_BD.stride(0), BLOCK=shape.block,
    )  # fmt: skip
    return z_BLD


def _launch_gradient(
    upstream_BLD: Tensor, y_BLD: Tensor | None, gate_BD: Tensor, for_y: bool
) -> tuple[Tensor, Tensor]:
    """dy [B, L, D] in the dtype of the upstream gradient, and dgate [B, D] fp32 where y is given.

    Empty where not asked for.
    """
    upstream_BLD, gate_BD = upstream_BLD.contiguous(), shared.rows_of(gate_BD)
    B, L, D = upstream_BLD.shape
    shape = _shape(upstream_BLD)
    chunk = 1 if y_BLD is None else min(shape.rows, L)
    C = cdiv(L, chunk)
    grad_BLD = torch.empty_like(upstream_BLD) if for_y else upstream_BLD.new_empty(0)
    sums_BCD = upstream_BLD.new_empty(
        0 if y_BLD is None else (B, C, D), dtype=torch.float32
    )  # fmt: skip
    launch(
        wrap_triton(_gated_residual_bwd_kernel), (B * C * cdiv(D, shape.block),), shape,
        upstream_ptr=upstream_BLD, y_ptr=None if y_BLD is None else y_BLD.contiguous(),
        gate_ptr=gate_BD, grad_ptr=grad_BLD if for_y else None,
        sums_ptr=None if y_BLD is None else sums_BCD, tokens=L, chunks=C, width=D,
        gate_row_stride=gate_BD.stride(0), CHUNK=chunk, BLOCK=shape.block,
    )  # fmt: skip
    return grad_BLD, sums_BCD if y_BLD is None else sums_BCD.sum(1)


def _backward(
    gradient: Any, needs: Needs, upstream_BLD: Tensor, y_BLD: Tensor | None, gate_BD: Tensor,
    _x: None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    for_y, for_gate = needs[:2]
    if not for_y and not for_gate:
        return None, None, upstream_BLD
    grad_BLD, sums_BD = gradient(upstream_BLD, y_BLD, gate_BD, for_y)
    return grad_BLD, sums_BD.to(gate_BD.dtype) if for_gate else None, upstream_BLD


_gated_residual = BlockOp(
    "gated_residual", _launch, _launch_gradient, keep=lambda needs: (needs[1], True, False),
    backward=_backward,
)  # fmt: skip


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: Backend = "auto") -> Tensor:
    """x + gate y, [B, L, D] in the dtype of x.

    x, y: [B, L, D]; gate: [B, D], also as a part of a wider tensor (`chunk`). All floating, of any
    dtype. Differentiable in all three, once; a gradient that nothing asks for is not computed.

    Arithmetic is fp32 (fp64 where x or y is fp64), rounded once. ValueError for shapes, dtypes or
    devices that do not fit. Source: arXiv 2212.09748.
    """
    op = "gated_residual"
    shared.check_tokens(op, "x", x)
    check_like(op, "y", y, "x", x)
    shared.check_modulation(op, "gate", gate, "x", x)
    if choose_backend(op, backend, x, y) == "torch":
        return gated_residual_ref(x, y, gate)
    return _gated_residual(y, gate, x)


def examples(on: On) -> Examples:
    """With the sum over tokens, and without, as under LoRA; see `_examples.py`."""
    x, y, gate, weight = on.samples(4)
    x, y, weight = (t.view(2, on.rows // 2, on.elements) for t in (x, y, weight))
    for name, trained in (("", True), ("frozen", False)):
        gate_BD = gate[:2].detach().clone().requires_grad_(trained)
        x_BLD, y_BLD = (t.detach().clone().requires_grad_() for t in (x, y))
        z = gated_residual(x_BLD, y_BLD, gate_BD, backend=on.backend)
        leaves = [x_BLD, y_BLD, gate_BD][: 2 + trained]
        grads = torch.autograd.grad((z * weight).sum(), leaves)
        yield name, [z.detach(), *grads]
