"""RMSNorm of queries or keys over each head, then rotary embedding, forward and backward.

For one head of one token, over its E elements, in pairs (2 i, 2 i + 1),

    n = x / sqrt(mean(x^2) + eps)           y = n weight
    z_2i   = y_2i   cos_2i   - y_2i+1 sin_2i
    z_2i+1 = y_2i+1 cos_2i+1 + y_2i   sin_2i+1

or z = y without tables (SD3). With the gradient g of z,

    dy_2i   = g_2i   cos_2i   + g_2i+1 sin_2i+1
    dy_2i+1 = g_2i+1 cos_2i+1 - g_2i   sin_2i
    h = dy weight,    dx = (h - n mean(h n)) / sqrt(mean(x^2) + eps),    dweight = sum dy n

Source: RMSNorm, arXiv 1910.07467; rotary embedding, arXiv 2104.09864; diffusers' FluxAttnProcessor
(`norm_q`, then `apply_rotary_emb` of sequence dimension 1 with `use_real_unbind_dim` -1, whose cos
and sin are tables of fp32) and JointAttnProcessor2_0.

A program holds some heads of one token: they share one row of the tables, which comes from memory
once. The sum over rows, wanted where the weight is trained, is a sum of each program over a chunk
of tokens, then torch's over programs; no atomics, so equal bits.

Least traffic, an element: forward x read, z written; backward g and x read, dx written: the norm is
taken again. One launch each; two more with the weight's gradient.

Shapes: B samples, L tokens, H heads, E elements of a head, C chunks of tokens.
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
    check_device,
    check_floating,
    choose_backend,
    compute_dtype,
)
from gardo_kernels._launch_shape import LaunchShape, launch_shape


def qk_norm_rope_ref(
    x_BLHE: Tensor, weight_E: Tensor | None, cos_LE: Tensor | None, sin_LE: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    """The formula in plain torch, differentiable; fp32 (fp64 for fp64) inside, the dtype of x."""
    dtype = compute_dtype(x_BLHE)
    y_BLHE = x_BLHE.to(dtype)
    y_BLHE = y_BLHE * torch.rsqrt(y_BLHE.square().mean(-1, keepdim=True) + eps)
    if weight_E is not None:
        y_BLHE = y_BLHE * weight_E.to(dtype)
    if cos_LE is not None and sin_LE is not None:
        real, imaginary = y_BLHE.unflatten(-1, (-1, 2)).unbind(-1)
        turned_BLHE = torch.stack([-imaginary, real], -1).flatten(-2)
        cos_L1E, sin_L1E = cos_LE.to(dtype)[:, None], sin_LE.to(dtype)[:, None]
        y_BLHE = y_BLHE * cos_L1E + turned_BLHE * sin_L1E
    return y_BLHE.to(x_BLHE.dtype)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _turned(y, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """(-y_2i+1, y_2i) of every pair: multiplied by i, as complex numbers."""
    real, imaginary = tl.split(tl.reshape(y, (HEADS, WIDTH // 2, 2)))
    return tl.reshape(tl.join(-imaginary, real), (HEADS, WIDTH))


@triton.jit
def _normalised(x, eps, E: tl.constexpr):
    """x / sqrt(mean(x^2) + eps), and 1 / sqrt(mean(x^2) + eps), of each head."""
    inverse = tl.rsqrt(tl.sum(x * x, 1) / E + eps)[:, None]
    return x * inverse, inverse


@triton.jit
def _load_row(ptr, start, E: tl.constexpr, WIDTH: tl.constexpr):
    """One row [1, WIDTH], fp32."""
    column = tl.arange(0, WIDTH)[None, :]
    return tl.load(ptr + start + column, mask=column < E, other=0.0).to(tl.float32)


@triton.jit
def _qk_norm_rope_fwd_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, z_ptr, tokens, heads, eps,
    E: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK // WIDTH heads of one token."""
    HEADS: tl.constexpr = BLOCK // WIDTH
    block, row = block_and_row(heads, HEADS)
    head = block * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (column < E)
    at = (row * heads + head) * E + column
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    y, _ = _normalised(x, eps, E)
    if weight_ptr is not None:
        y *= _load_row(weight_ptr, 0, E, WIDTH)
    if cos_ptr is not None:
        token = row % tokens * E
        cos = _load_row(cos_ptr, token, E, WIDTH)
        sin = _load_row(sin_ptr, token, E, WIDTH)
        y = y * cos + _turned(y, HEADS, WIDTH) * sin
    tl.store(z_ptr + at, y.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _qk_norm_rope_bwd_kernel(
    upstream_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, grad_ptr, sums_ptr, rows, tokens, heads, eps,
    E: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK // WIDTH heads of CHUNK tokens: dx, and sums[program] = sum of dy n."""
    HEADS: tl.constexpr = BLOCK // WIDTH
    block, chunk = block_and_row(heads, HEADS)
    head = block * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (head < heads) & (column < E)
    total = tl.zeros((HEADS, WIDTH), tl.float32)
    for index in range(CHUNK):
        row = chunk * CHUNK + index
        here = inside & (row < rows)
        at = (row * heads + head) * E + column
        x = tl.load(x_ptr + at, mask=here, other=0.0).to(tl.float32)
        g = tl.load(upstream_ptr + at, mask=here, other=0.0).to(tl.float32)
        n, inverse = _normalised(x, eps, E)
        if cos_ptr is not None:
            token = row % tokens * E
            cos = _load_row(cos_ptr, token, E, WIDTH)
            sin = _load_row(sin_ptr, token, E, WIDTH)
            g = g * cos - _turned(g * sin, HEADS, WIDTH)
        if sums_ptr is not None:
            total += g * n
        if grad_ptr is not None:
            if weight_ptr is not None:
                g *= _load_row(weight_ptr, 0, E, WIDTH)
            grad = inverse * (g - n * (tl.sum(g * n, 1) / E)[:, None])
            tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=here)
    if sums_ptr is not None:
        column = tl.arange(0, WIDTH)
        at = tl.program_id(0).to(tl.int64) * E + column
        tl.store(sums_ptr + at, tl.sum(total, 0), mask=column < E)


# ---- op ------------------------------------------------------------------------------------------


def _shape(x_BLHE: Tensor) -> tuple[LaunchShape, int, int]:
    """Of the op's launches; the power of two that holds E, and the heads that a program has."""
    B, L, H, E = x_BLHE.shape
    shape = launch_shape("qk_norm_rope", B * L, H * E, x_BLHE.device, shared.TOKENS)
    width = shared.width_of(E)
    return shape, width, min(max(shape.block // width, 1), shared.width_of(H))


def _launch(
    x_BLHE: Tensor, weight_E: Tensor | None, cos_LE: Tensor | None, sin_LE: Tensor | None,
    eps: float,
) -> Tensor:  # fmt: skip
    x_BLHE = x_BLHE.contiguous()
    B, L, H, E = x_BLHE.shape
    shape, width, heads = _shape(x_BLHE)
    z_BLHE = torch.empty_like(x_BLHE)
    launch(
        wrap_triton(_qk_norm_rope_fwd_kernel), (B * L * cdiv(H, heads),), shape, x_ptr=x_BLHE,
        weight_ptr=weight_E, cos_ptr=cos_LE, sin_ptr=sin_LE, z_ptr=z_BLHE, tokens=L, heads=H,
        eps=eps, E=E, WIDTH=width, BLOCK=heads * width,
    )  # fmt: skip
    return z_BLHE


def _launch_gradient(
    upstream_BLHE: Tensor, x_BLHE: Tensor, weight_E: Tensor | None, cos_LE: Tensor | None,
    sin_LE: Tensor | None, eps: float, for_x: bool, for_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx [B, L, H, E] in the dtype of x, and dweight [E] fp32; empty where not asked for."""
    upstream_BLHE, x_BLHE = upstream_BLHE.contiguous(), x_BLHE.contiguous()
    B, L, H, E = x_BLHE.shape
    shape, width, heads = _shape(x_BLHE)
    chunk = shape.rows if for_weight else 1
    programs = cdiv(B * L, chunk) * cdiv(H, heads)
    grad_BLHE = torch.empty_like(x_BLHE) if for_x else x_BLHE.new_empty(0)
    sums_CE = x_BLHE.new_empty((programs, E) if for_weight else 0, dtype=torch.float32)
    launch(
        wrap_triton(_qk_norm_rope_bwd_kernel), (programs,), shape, upstream_ptr=upstream_BLHE,
        x_ptr=x_BLHE, weight_ptr=weight_E, cos_ptr=cos_LE, sin_ptr=sin_LE,
        grad_ptr=grad_BLHE if for_x else None, sums_ptr=sums_CE if for_weight else None,
        rows=B * L, tokens=L, heads=H, eps=eps, E=E, WIDTH=width, CHUNK=chunk, BLOCK=heads * width,
    )  # fmt: skip
    return grad_BLHE, sums_CE.sum(0) if for_weight else sums_CE


def _backward(
    gradient: Any, needs: Needs, upstream_BLHE: Tensor, x_BLHE: Tensor, weight_E: Tensor | None,
    *others: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    for_x, for_weight, *_ = needs
    grad_BLHE, sums_E = gradient(upstream_BLHE, x_BLHE, weight_E, *others, for_x, for_weight)
    return grad_BLHE, None if weight_E is None or not for_weight else sums_E.to(weight_E.dtype)


_qk_norm_rope = BlockOp(
    "qk_norm_rope", _launch, _launch_gradient, keep=lambda _: (True, True, True, True),
    backward=_backward,
)  # fmt: skip


def qk_norm_rope(
    x: Tensor,
    weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Tensor:
    """RMSNorm over E, times weight, turned by the tables: [B, L, H, E] in the dtype of x.

    x: [B, L, H, E], a projection's output by heads; E is even where it is turned. weight: [E], None
    for 1. cos, sin: [L, E], None for no rotary embedding. All floating, of any dtype. eps: added to
    the mean square. Differentiable in x and weight, once; a gradient that nothing asks for is not
    computed.

    Arithmetic is fp32 (fp64 where x is fp64), rounded once. ValueError for shapes, dtypes or
    devices that do not fit. Source: arXiv 1910.07467 and 2104.09864, in diffusers' layout for Flux.
    """
    _check(x, weight, cos, sin)
    weight, cos, sin = (None if t is None else t.contiguous() for t in (weight, cos, sin))
    if choose_backend("qk_norm_rope", backend, x) == "torch":
        return qk_norm_rope_ref(x, weight, cos, sin, eps)
    return _qk_norm_rope(x, weight, cos, sin, eps)


def _check(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
    op = "qk_norm_rope"
    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)}; pass [samples, tokens, heads, elements], none "
            "empty"
        )
    check_floating(op, "x", x)
    _, L, _, E = x.shape
    if (cos is None) != (sin is None):
        raise ValueError(f"{op}: pass cos and sin together; a rotation takes both")
    if cos is not None and E % 2:
        raise ValueError(f"{op}: x has {E} elements a head; pass pairs to turn, or no cos and sin")
    given = {"weight": (weight, (E,)), "cos": (cos, (L, E)), "sin": (sin, (L, E))}
    for name, (tensor, shape) in given.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(tensor.shape)}; for x of shape {tuple(x.shape)} "
                f"pass {shape}"
            )
        check_device(op, name, tensor, "x", x)
        check_floating(op, name, tensor)


def examples(on: On) -> Examples:
    """Turned, with the weight's gradient and without, and as SD3 has it; see `_examples.py`."""
    E = min(on.elements // 2 * 2, 64)
    H, L = on.elements // E, on.rows // 2
    x, weights, turns = (t[:, : H * E] for t in on.samples(3))
    x, weights = (t.reshape(2, L, H, E) for t in (x, weights))
    angle_LE = turns[:L, : E // 2].float().repeat_interleave(2, 1)
    tables, scale_E = (angle_LE.cos(), angle_LE.sin()), 1 + turns[-1, :E] / 4
    for name, rope, trained in (("", tables, True), ("frozen", tables, False), ("sd3", (), True)):
        x_BLHE = x.detach().clone().requires_grad_()
        weight_E = scale_E.detach().clone().requires_grad_(trained)
        z = qk_norm_rope(x_BLHE, weight_E, *rope, backend=on.backend)
        leaves = [x_BLHE, weight_E][: 1 + trained]
        yield name, [z.detach(), *torch.autograd.grad((z * weights).sum(), leaves)]
