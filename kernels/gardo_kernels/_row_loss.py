"""What the losses over rows share: clipped term, gated KL, checks, pieces of kernels, registration.

A loss sums over each row in two stages, so that its bits do not depend on who comes first: every
program writes the sums of CHUNK elements of a row, then one program adds a row's chunks in order.

Shapes: R rows, N elements of a row, S statistics of a row.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels._launch import check_like, check_rows, check_samples

CHUNK, BLOCK = 4096, 1024  # elements of a program of the sums, and at a time
ROWS_AT_A_TIME = 64


# ---- references ----------------------------------------------------------------------------------


def log_bounds(clip_low: float, clip_high: float) -> tuple[float, float]:
    """log(1 - clip_low), -inf from 1 on: no ratio is as low; and log(1 + clip_high).

    Rows are clipped by their log-ratio: in fp32 a ratio near 1 is a multiple of 2^-23 or 2^-24, a
    hundredth of a clip range of 1e-5, and so is 1 + clip_high.
    """
    return math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)


def clipped_term_ref(
    advantage_R: Tensor, log_ratio_R: Tensor, ratio_R: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """max(-A ratio, -A clamp(ratio)), and the rows that the clip switches off above and below."""
    log_low, log_high = log_bounds(clip_low, clip_high)
    high_R = ((advantage_R > 0) & (log_ratio_R > log_high)).detach()
    low_R = ((advantage_R < 0) & (log_ratio_R < log_low)).detach()
    kept_R = torch.where(high_R, 1 + clip_high, torch.where(low_R, 1 - clip_low, ratio_R))
    return -advantage_R * kept_R, high_R, low_R


def gated_kl_ref(
    v_RN: Tensor, v_ref_RN: Tensor | None, gate_R: Tensor, kl_scale_R: Tensor
) -> tuple[Tensor, Tensor]:
    """mean_b(gate_b kl_b), and the KL of each row; zeros where v_ref is None.

    What v_ref holds in rows of gate 0 does not matter, NaN included.
    """
    if v_ref_RN is None:
        kl_R = torch.zeros_like(gate_R)
    else:
        kl_R = kl_scale_R * gated_difference(v_RN, v_ref_RN, gate_R).square().mean(1)
    return (gate_R * kl_R).mean(), kl_R


def gated_difference(v_RN: Tensor, v_ref_RN: Tensor, gate_R: Tensor) -> Tensor:
    """v - v_ref, 0 in rows of gate 0."""
    return torch.where(gate_R[:, None] != 0, v_RN - v_ref_RN, 0.0)


# ---- inputs --------------------------------------------------------------------------------------


def check_tensors(
    op: str, v: Tensor, samples: dict[str, Tensor | None], rows: dict[str, Tensor | None]
) -> None:
    """v is [R, ...]; `samples` are like it and `rows` one value a row of it, or None."""
    check_samples(op, "v", v)
    for name, tensor in samples.items():
        if tensor is not None:
            check_like(op, name, tensor, "v", v)
    for name, tensor in rows.items():
        if tensor is not None:
            check_rows(op, name, tensor, "v", v)


def check_positive(op: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{op}: {name} is {value}; it must be positive")


def check_not_negative(op: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{op}: {name} is {value}; it must not be negative")


def check_kl(op: str, beta: float, gate: Tensor | None, v_ref: Tensor | None) -> None:
    """beta must not be negative, and 0 where every row has a KL but none a reference."""
    check_not_negative(op, beta=beta)
    if beta > 0 and v_ref is None and gate is None:
        raise ValueError(
            f"{op}: beta is {beta} but v_ref is None; pass v_ref, or beta=0, or the gate"
        )


def constant_samples(dtype: torch.dtype | None, *tensors: Tensor | None) -> list[Any]:
    """[R, N] each, without gradient, contiguous, in dtype (None: as it is); None stays None."""
    return [None if x is None else x.detach().flatten(1).to(dtype or x.dtype).contiguous()
            for x in tensors]  # fmt: skip


def constant_rows(v: Tensor, dtype: torch.dtype, *values: Tensor | None) -> list[Tensor]:
    """[R] each, without gradient, in dtype, as the references take them; None is ones."""
    ones_R = torch.ones(v.shape[0], dtype=dtype, device=v.device)
    return [ones_R if x is None else x.detach().to(dtype) for x in values]


def kernel_rows(*values: Tensor | None) -> list[Tensor | None]:
    """[R] each, without gradient, contiguous; what a kernel can read as it is, is not copied."""
    readable = (torch.float32, torch.bool)
    return [
        None if x is None else (x if x.dtype in readable else x.float()).detach().contiguous()
        for x in values
    ]


# ---- pieces of kernels ---------------------------------------------------------------------------


@triton.jit
def load_fp32(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_rows(ptr, row, inside):
    """The values of these rows, fp32: 1 where there is no tensor, 0 outside."""
    values = inside.to(tl.float32)
    if ptr is not None:
        values = tl.load(ptr + row, mask=inside, other=0).to(tl.float32)
    return values


@triton.jit
def is_on(value, BLOCK: tl.constexpr):
    """A row's value is not 0, as a mask of a block (the interpreter masks none with a scalar)."""
    return tl.zeros((BLOCK,), tl.float32) + value != 0


@triton.jit
def is_gated(gate_ptr, row, BLOCK: tl.constexpr):
    """The row has a reference, as a mask of a block: without a gate every row has."""
    gate = 1.0
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + row).to(tl.float32)
    return is_on(gate, BLOCK)


@triton.jit
def error_where(v, other_ptr, at, mask):
    """v - other, 0 outside the mask: there nothing is read, what stands there does not matter."""
    return tl.where(mask, v - load_fp32(other_ptr, at, mask), 0.0)


@triton.jit
def kl_pull(v, v_ref_ptr, kl_weight, kl, at, inside, BLOCK: tl.constexpr):
    """kl_weight (v - v_ref), which shows what of v_ref is not finite, as the loss does.

    v_ref is read where the row's weight is not 0, or its KL not finite.
    """
    mask = inside & is_on(kl_weight + 0.0 * kl, BLOCK)
    return kl_weight * error_where(v, v_ref_ptr, at, mask)


@triton.jit
def within(x, low, high):
    """x clamped; NaN stays, which tl.minimum, tl.maximum and tl.clamp drop on a GPU."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def sum_chunks(sums_ptr, row, inside, chunks, COLUMN: tl.constexpr, COLUMNS: tl.constexpr):
    """One column of sums[row, column, chunk], added over the chunks, always in the same order."""
    AT_A_TIME: tl.constexpr = 16
    at = sums_ptr + (row.to(tl.int64) * COLUMNS + COLUMN)[:, None] * chunks
    total = tl.zeros((row.shape[0], AT_A_TIME), tl.float32)
    for first in range(0, chunks, AT_A_TIME):
        chunk = first + tl.arange(0, AT_A_TIME)[None, :]
        total += tl.load(at + chunk, mask=inside[:, None] & (chunk < chunks), other=0.0)
    return tl.sum(total, 1)


@triton.jit
def exp_near_0(x):
    """exp with all digits near 0, where ratios are: there the GPU's own loses the last two bits."""
    series = 1.0 + x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24))))
    return tl.where(tl.abs(x) < 0.03, series, tl.exp(x))


@triton.jit
def clipped_term(advantage, log_ratio, ratio, log_low, log_high, clip_low, clip_high):
    """`clipped_term_ref`, the bounds given as `log_bounds` too."""
    high = (advantage > 0) & (log_ratio > log_high)
    low = (advantage < 0) & (log_ratio < log_low)
    kept = tl.where(high, 1.0 + clip_high, tl.where(low, 1.0 - clip_low, ratio))
    return -advantage * kept, high, low


# ---- registration --------------------------------------------------------------------------------


def empty_results(v_RN: Tensor, statistics: int, flags: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a loss op returns, not yet written."""
    R = v_RN.shape[0]
    return (
        v_RN.new_empty((), dtype=torch.float32),
        v_RN.new_empty(statistics, R, dtype=torch.float32),
        v_RN.new_empty(flags, R, dtype=torch.bool),
    )


def register_row_loss(
    loss_op: Any, grad_op: Any, *, statistics: int, flags: int, tensors: int, constants: int = 0
) -> None:
    """Shapes and gradient of a loss op: (loss [], rows [statistics, R], flags [flags, R] bool).

    Its gradient goes to its first input, v [R, N]. `grad_op` takes the first `tensors` inputs of
    the loss op, the rows, the gradient of the loss, and the last `constants` inputs of the loss op.
    Nothing else is kept for the backward pass.
    """

    def fake_loss(v_RN: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
        return empty_results(v_RN, statistics, flags)

    def fake_grad(v_RN: Tensor, *_: object) -> Tensor:
        return torch.empty_like(v_RN)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:tensors], output[1])
        ctx.constants = inputs[len(inputs) - constants :]
        ctx.without_gradient = len(inputs) - 1
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # of rows and flags: two launches for nothing

    def backward(ctx: Any, upstream: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        grad_RN = grad_op(*ctx.saved_tensors, upstream.float(), *ctx.constants)
        return grad_RN, *[None] * ctx.without_gradient

    loss_op.register_fake(fake_loss)
    grad_op.register_fake(fake_grad)
    loss_op.register_autograd(backward, setup_context=keep)
