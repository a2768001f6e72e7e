"""A gated residual and the adaLN behind it: what an attention leaves for the feed-forward.

For token l of sample b, over its D elements,

    z = x + gate_b y
    n = (z - mean(z)) / sqrt(mean((z - mean(z))^2) + eps)
    m = n (1 + scale_b) + shift_b

where z, the stream, is what `gated_residual` gives and m what `adaln_modulate` makes of it: z is
rounded as it is stored, and the norm is taken of that. With their gradients dz' and g, and
h = g (1 + scale_b),

    dz = dz' + (h - mean(h) - n mean(h n)) / sqrt(variance + eps)
    dx = dz                 dy = dz gate_b          dgate_b = sum_l dz y
    dscale_b = sum_l g n    dshift_b = sum_l g

Source: adaLN-Zero of DiT, arXiv 2212.09748; the residual behind the attention and `norm2` of
diffusers' FluxTransformerBlock and JointTransformerBlock.

A token is one program's, so z is normed where it is made (see `_layer_norm.py`). The sums over
tokens are wanted in full fine-tuning alone (under LoRA the modulation comes from frozen layers): a
program adds up a chunk of tokens, then torch adds the chunks; no atomics, so equal bits. Only then
does the backward pass need y.

Least traffic, an element: forward x and y read, z and m written; backward z, dz' and g read, dx and
dy written; with the sums y read too and 12 bytes for each chunk of tokens. One launch each; two
more with the sums.

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
from gardo_kernels._launch import Backend, cdiv, check_like, choose_backend, compute_dtype
from gardo_kernels._layer_norm import normalised, normalised_gradient, token_shape
from gardo_kernels.adaln_modulate import adaln_modulate_ref
from gardo_kernels.gated_residual import gated_residual_ref


def residual_adaln_ref(
    x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Both formulas in plain torch, differentiable; fp32 (fp64 for fp64) inside, the dtype of x."""
    sum_BLD = gated_residual_ref(x_BLD.to(compute_dtype(x_BLD, y_BLD)), y_BLD, gate_BD)
    z_BLD = sum_BLD.to(x_BLD.dtype)
    # the value of z; the gradient that comes back by it is not rounded before it meets the other
    stored_BLD = sum_BLD + (z_BLD - sum_BLD).detach()
    return z_BLD, adaln_modulate_ref(stored_BLD, scale_BD, shift_BD, eps).to(x_BLD.dtype)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _residual_adaln_fwd_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, z_ptr, m_ptr, tokens, width, gate_row_stride,
    scale_row_stride, shift_row_stride, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of one sample."""
    sample = (tl.program_id(0) // tokens).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + sample * gate_row_stride + column, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + sample * scale_row_stride + column, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + sample * shift_row_stride + column, mask=inside, other=0.0)
    z = (x + gate.to(tl.float32) * y).to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + at, z, mask=inside)
    n, _ = normalised(z.to(tl.float32), inside, width, eps)
    m = n * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
    tl.store(m_ptr + at, m.to(m_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _residual_adaln_bwd_kernel(
    upstream_z_ptr, upstream_m_ptr, z_ptr, y_ptr, gate_ptr, scale_ptr, grad_x_ptr, grad_y_ptr,
    sums_ptr, tokens, chunks, width, gate_row_stride, scale_row_stride, eps,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """CHUNK tokens of one sample: dx, dy, and sums[sample, chunk] = sums of dz y, of g n and of g.

    Without the gradient of a result that was not used, and without the sum for which there is no y.
    """
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    column = tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_ptr + sample * gate_row_stride + column, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + sample * scale_row_stride + column, mask=inside, other=0.0)
    factor = 1.0 + scale.to(tl.float32)
    gate_sum = tl.zeros((BLOCK,), tl.float32)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    shift_sum = tl.zeros((BLOCK,), tl.float32)
    for index in range(CHUNK):
        token = chunk * CHUNK + index
        here = inside & (token < tokens)
        at = (sample * tokens + token) * width + column
        grad = tl.zeros((BLOCK,), tl.float32)
        if upstream_z_ptr is not None:
            grad += tl.load(upstream_z_ptr + at, mask=here, other=0.0).to(tl.float32)
        if upstream_m_ptr is not None:
            z = tl.load(z_ptr + at, mask=here, other=0.0).to(tl.float32)
            g = tl.load(upstream_m_ptr + at, mask=here, other=0.0).to(tl.float32)
            n, inverse = normalised(z, inside, width, eps)
            grad += normalised_gradient(g * factor, n, inverse, width)
            scale_sum += g * n
            shift_sum += g
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + at, grad.to(grad_x_ptr.dtype.element_ty), mask=here)
        if grad_y_ptr is not None:
            grad_y = grad * gate.to(tl.float32)
            tl.store(grad_y_ptr + at, grad_y.to(grad_y_ptr.dtype.element_ty), mask=here)
        if y_ptr is not None:
            gate_sum += grad * tl.load(y_ptr + at, mask=here, other=0.0).to(tl.float32)
    if sums_ptr is not None:
        at = tl.program_id(0).to(tl.int64) * 3 * width + column
        tl.store(sums_ptr + at, gate_sum, mask=inside)
        tl.store(sums_ptr + at + width, scale_sum, mask=inside)
        tl.store(sums_ptr + at + 2 * width, shift_sum, mask=inside)


# ---- op ------------------------------------------------------------------------------------------


def _launch(
    x_BLD: Tensor, y_BLD: Tensor, gate_BD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x_BLD, y_BLD = x_BLD.contiguous(), y_BLD.contiguous()
    gate_BD, scale_BD, shift_BD = (shared.rows_of(t) for t in (gate_BD, scale_BD, shift_BD))
    B, L, D = x_BLD.shape
    shape = token_shape("residual_adaln", x_BLD)
    z_BLD, m_BLD = torch.empty_like(x_BLD), torch.empty_like(x_BLD)
    launch(
        wrap_triton(_residual_adaln_fwd_kernel), (B * L,), shape, x_ptr=x_BLD, y_ptr=y_BLD,
        gate_ptr=gate_BD, scale_ptr=scale_BD, shift_ptr=shift_BD, z_ptr=z_BLD, m_ptr=m_BLD,
        tokens=L, width=D, gate_row_stride=gate_BD.stride(0), scale_row_stride=scale_BD.stride(0),
        shift_row_stride=shift_BD.stride(0), eps=eps, BLOCK=shape.block,
    )  # fmt: skip
    return z_BLD, m_BLD


def _launch_gradient(
    upstream_z_BLD: Tensor | None, upstream_m_BLD: Tensor | None, z_BLD: Tensor,
    y_BLD: Tensor | None, gate_BD: Tensor, scale_BD: Tensor, eps: float, for_x: bool, for_y: bool,
    summed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx and dy [B, L, D] in the dtype of z, and the sums [B, 3, D] fp32 for gate, scale and shift.

    Empty where not asked for.
    """
    upstream_z_BLD, upstream_m_BLD, y_BLD = (
        None if t is None else t.contiguous() for t in (upstream_z_BLD, upstream_m_BLD, y_BLD)
    )
    gate_BD, scale_BD = shared.rows_of(gate_BD), shared.rows_of(scale_BD)
    B, L, D = z_BLD.shape
    shape = token_shape("residual_adaln", z_BLD)
    chunk = min(shape.rows, L) if summed else 1
    C = cdiv(L, chunk)
    grad_x_BLD, grad_y_BLD = (
        torch.empty_like(z_BLD) if wanted else z_BLD.new_empty(0) for wanted in (for_x, for_y)
    )
    sums_BC3D = z_BLD.new_empty((B, C, 3, D) if summed else 0, dtype=torch.float32)
    launch(
        wrap_triton(_residual_adaln_bwd_kernel), (B * C,), shape, upstream_z_ptr=upstream_z_BLD,
        upstream_m_ptr=upstream_m_BLD, z_ptr=z_BLD, y_ptr=y_BLD, gate_ptr=gate_BD,
        scale_ptr=scale_BD, grad_x_ptr=grad_x_BLD if for_x else None,
        grad_y_ptr=grad_y_BLD if for_y else None, sums_ptr=sums_BC3D if summed else None, tokens=L,
        chunks=C, width=D, gate_row_stride=gate_BD.stride(0), scale_row_stride=scale_BD.stride(0),
        eps=eps, CHUNK=chunk, BLOCK=shape.block,
    )  # fmt: skip
    return grad_x_BLD, grad_y_BLD, sums_BC3D.sum(1) if summed else sums_BC3D


def _backward(
    gradient: Any, needs: Needs, upstream_z_BLD: Tensor | None, upstream_m_BLD: Tensor | None,
    _x: None, y_BLD: Tensor | None, gate_BD: Tensor, scale_BD: Tensor, _shift: None, z_BLD: Tensor,
    eps: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    for_x, for_y, *modulation = needs[:5]
    summed = any(modulation)
    grad_x_BLD, grad_y_BLD, sums_B3D = gradient(
        upstream_z_BLD, upstream_m_BLD, z_BLD, y_BLD, gate_BD, scale_BD, eps, for_x, for_y, summed
    )
    if not summed:
        return grad_x_BLD, grad_y_BLD
    return grad_x_BLD, grad_y_BLD, *sums_B3D.to(gate_BD.dtype).unbind(1)


_residual_adaln = BlockOp(
    "residual_adaln", _launch, _launch_gradient,
    keep=lambda needs: (False, needs[2], True, True, False, True), backward=_backward,
)  # fmt: skip


def residual_adaln(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """z = x + gate y, and LayerNorm(z) (1 + scale) + shift: both [B, L, D] in the dtype of x.

    x, y: [B, L, D]; gate, scale, shift: [B, D], also as parts of a wider tensor (`chunk`). All
    floating, of any dtype. eps: added to the variance. Differentiable in all five, once, by either
    result or by both; a gradient that nothing asks for is not computed.

    Arithmetic is fp32 (fp64 where x or y is fp64); each result is rounded once, and the norm is of
    the rounded z. ValueError for shapes, dtypes or devices that do not fit. Source: arXiv
    2212.09748.
    """
    op = "residual_adaln"
    shared.check_tokens(op, "x", x)
    check_like(op, "y", y, "x", x)
    for name, rows in (("gate", gate), ("scale", scale), ("shift", shift)):
        shared.check_modulation(op, name, rows, "x", x)
    if choose_backend(op, backend, x, y) == "torch":
        return residual_adaln_ref(x, y, gate, scale, shift, eps)
    z, m = _residual_adaln(x, y, gate, scale, shift, eps)
    return z, m


def examples(on: On) -> Examples:
    """With the sums over tokens, and without, as under LoRA; see `_examples.py`."""
    x, y, *weights, gate, scale, shift = on.samples(7)
    x, y, *weights = (t.view(2, on.rows // 2, on.elements) for t in (x, y, *weights))
    modulation = tuple(t[:2] for t in (gate, scale, shift))
    for name, trained in (("", (x, y, *modulation)), ("frozen", (x, y))):
        leaves = [t.detach().clone().requires_grad_() for t in trained]
        frozen = modulation[len(leaves) - 2 :]
        results = residual_adaln(*leaves, *frozen, backend=on.backend)
        grads = torch.autograd.grad(results, leaves, weights)
        yield name, [*(t.detach() for t in results), *grads]
