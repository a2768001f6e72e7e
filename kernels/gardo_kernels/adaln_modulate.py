"""LayerNorm without weights, modulated by the time embedding (adaLN), forward and backward.

For token l of sample b, over its D elements,

    n = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps)
    y = n (1 + scale_b) + shift_b

and with the gradient g of y and h = g (1 + scale_b),

    dx       = (h - mean(h) - n mean(h n)) / sqrt(variance + eps)
    dscale_b = sum_l g n
    dshift_b = sum_l g

Source: adaLN-Zero of DiT, arXiv 2212.09748; diffusers' AdaLayerNormZero and the `norm2` of its
FluxTransformerBlock and JointTransformerBlock.

A token is one program's, so x is read once (see `_layer_norm.py`). The sums over tokens are wanted
in full fine-tuning alone (under LoRA scale and shift come from frozen layers): a program adds up a
chunk of tokens, then torch adds the chunks; no atomics, so equal bits.

Least traffic, an element: forward x read, y written; backward g and x read, dx written; with the
sums 8 bytes more for each chunk of tokens. One launch each; two more with the sums.

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
from gardo_kernels._launch import Backend, cdiv, choose_backend, compute_dtype
from gardo_kernels._layer_norm import normalised, normalised_gradient, token_shape


def adaln_modulate_ref(x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float) -> Tensor:
    """The formula in plain torch, differentiable; fp32 (fp64 for fp64) inside, the dtype of x."""
    dtype = compute_dtype(x_BLD)
    n_BLD = torch.nn.functional.layer_norm(x_BLD.to(dtype), x_BLD.shape[-1:], eps=eps)
    y_BLD = n_BLD * (1 + scale_BD.to(dtype)[:, None]) + shift_BD.to(dtype)[:, None]
    return y_BLD.to(x_BLD.dtype)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _adaln_modulate_fwd_kernel(
    x_ptr, scale_ptr, shift_ptr, y_ptr, tokens, width, scale_row_stride, shift_row_stride, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token of one sample."""
    sample = (tl.program_id(0) // tokens).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + sample * scale_row_stride + column, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + sample * shift_row_stride + column, mask=inside, other=0.0)
    n, _ = normalised(x, inside, width, eps)
    y = n * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _adaln_modulate_bwd_kernel(
    upstream_ptr, x_ptr, scale_ptr, grad_ptr, sums_ptr, tokens, chunks, width, scale_row_stride,
    eps, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """CHUNK tokens of one sample: dx, and sums[sample, chunk] = sums of g n and of g."""
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    column = tl.arange(0, BLOCK)
    inside = column < width
    scale = tl.load(scale_ptr + sample * scale_row_stride + column, mask=inside, other=0.0)
    factor = 1.0 + scale.to(tl.float32)
    scale_sum = tl.zeros((BLOCK,), tl.float32)
    shift_sum = tl.zeros((BLOCK,), tl.float32)
    for index in range(CHUNK):
        token = chunk * CHUNK + index
        here = inside & (token < tokens)
        at = (sample * tokens + token) * width + column
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        g = tl.load(upstream_ptr + at, mask=here, other=0.0).to(tl.float32)
        n, inverse = normalised(x, inside, width, eps)
        if grad_ptr is not None:
            grad = normalised_gradient(g * factor, n, inverse, width)
            tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=here)
        if sums_ptr is not None:
            scale_sum += g * n
            shift_sum += g
    if sums_ptr is not None:
        at = tl.program_id(0).to(tl.int64) * 2 * width + column
        tl.store(sums_ptr + at, scale_sum, mask=inside)
        tl.store(sums_ptr + at + width, shift_sum, mask=inside)


# ---- op ------------------------------------------------------------------------------------------


def _launch(x_BLD: Tensor, scale_BD: Tensor, shift_BD: Tensor, eps: float) -> Tensor:
    x_BLD = x_BLD.contiguous()
    scale_BD, shift_BD = shared.rows_of(scale_BD), shared.rows_of(shift_BD)
    B, L, D = x_BLD.shape
    shape, y_BLD = token_shape("adaln_modulate", x_BLD), torch.empty_like(x_BLD)
    launch(
        wrap_triton(_adaln_modulate_fwd_kernel), (B * L,), shape, x_ptr=x_BLD, scale_ptr=scale_BD,
        shift_ptr=shift_BD, y_ptr=y_BLD, tokens=L, width=D, scale_row_stride=scale_BD.stride(0),
        shift_row_stride=shift_BD.stride(0), eps=eps, BLOCK=shape.block,
    )  # fmt: skip
    return y_BLD


def _launch_gradient(
    upstream_BLD: Tensor, x_BLD: Tensor, scale_BD: Tensor, eps: float, for_x: bool, summed: bool
) -> tuple[Tensor, Tensor]:
    """dx [B, L, D] and the sums [B, 2, D] fp32, scale's first; empty where not asked for."""
    upstream_BLD, x_BLD = upstream_BLD.contiguous(), x_BLD.contiguous()
    scale_BD = shared.rows_of(scale_BD)
    B, L, D = x_BLD.shape
    shape = token_shape("adaln_modulate", x_BLD)
    chunk = min(shape.rows, L) if summed else 1
    C = cdiv(L, chunk)
    grad_BLD = torch.empty_like(x_BLD) if for_x else x_BLD.new_empty(0)
    sums_BC2D = x_BLD.new_empty((B, C, 2, D) if summed else 0, dtype=torch.float32)
    launch(
        wrap_triton(_adaln_modulate_bwd_kernel), (B * C,), shape, upstream_ptr=upstream_BLD,
        x_ptr=x_BLD, scale_ptr=scale_BD, grad_ptr=grad_BLD if for_x else None,
        sums_ptr=sums_BC2D if summed else None, tokens=L, chunks=C, width=D,
        scale_row_stride=scale_BD.stride(0), eps=eps, CHUNK=chunk, BLOCK=shape.block,
    )  # fmt: skip
    return grad_BLD, sums_BC2D.sum(1) if summed else sums_BC2D


def _backward(
    gradient: Any, needs: Needs, upstream_BLD: Tensor, x_BLD: Tensor, scale_BD: Tensor,
    _shift_BD: None, eps: float,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    for_x, for_scale, for_shift = needs[:3]
    summed = for_scale or for_shift
    grad_BLD, sums_B2D = gradient(upstream_BLD, x_BLD, scale_BD, eps, for_x, summed)
    if not summed:
        return grad_BLD, None, None
    return grad_BLD, *sums_B2D.to(scale_BD.dtype).unbind(1)


_adaln_modulate = BlockOp(
    "adaln_modulate", _launch, _launch_gradient, keep=lambda needs: (True, True, False),
    backward=_backward,
)  # fmt: skip


def adaln_modulate(
    x: Tensor, scale: Tensor, shift: Tensor, *, eps: float = 1e-6, backend: Backend = "auto"
) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, [B, L, D] in the dtype of x.

    x: [B, L, D]; scale, shift: [B, D], also as parts of a wider tensor (`chunk`). All floating, of
    any dtype. eps: added to the variance. Differentiable in all three, once; a
    gradient that nothing asks for is not computed.

    Arithmetic is fp32 (fp64 where x is fp64), rounded once. ValueError for shapes, dtypes or
    devices that do not fit. Source: arXiv 2212.09748.
    """
    op = "adaln_modulate"
    shared.check_tokens(op, "x", x)
    for name, rows in (("scale", scale), ("shift", shift)):
        shared.check_modulation(op, name, rows, "x", x)
    if choose_backend(op, backend, x) == "torch":
        return adaln_modulate_ref(x, scale, shift, eps)
    return _adaln_modulate(x, scale, shift, eps)


def examples(on: On) -> Examples:
    """With the sums over tokens, and without, as under LoRA; see `_examples.py`."""
    x, scale, shift, weight = on.samples(4)
    x, weight = (t.view(2, on.rows // 2, on.elements) for t in (x, weight))
    for name, trained in (("", (x, scale[:2], shift[:2])), ("frozen", (x,))):
        leaves = [t.detach().clone().requires_grad_() for t in trained]
        frozen = (scale[:2], shift[:2])[len(leaves) - 1 :]
        y = adaln_modulate(*leaves, *frozen, backend=on.backend)
        grads = torch.autograd.grad((y * weight).sum(), leaves)
        yield name, [y.detach(), *grads]
