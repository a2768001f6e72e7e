"""What the losses over rows share: clipped term, gated KL, checks, pieces of kernels, launches.

A loss sums over each row in two stages, so that its bits do not depend on who comes first: every
program of the forward launch stores the sums of a chunk of a row; the last to do so, as its ticket
says, adds each row's chunks in order and makes of them what the loss returns. Nobody waits for it
but the launch's end, so it waits for memory once and not once a sum, where one tile holds all.

The losses import this module as `shared`. Shapes: R rows, N elements of a row, C chunks of it, S
statistics of a row or sums, F flags of a row.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from gardo_kernels._launch import (
    Backend,
    block_and_row,
    cdiv,
    check_like,
    check_rows,
    check_samples,
    choose_backend,
    compute_dtype,
    grid_of_rows,
    launch,
    looked_on,
    ticket,
)
from gardo_kernels._launch_shape import LaunchShape, launch_shape, leaves_idle

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
    clipped_high_R = ((advantage_R > 0) & (log_ratio_R > log_high)).detach()
    clipped_low_R = ((advantage_R < 0) & (log_ratio_R < log_low)).detach()
    clamped_R = torch.where(
        clipped_high_R, 1 + clip_high, torch.where(clipped_low_R, 1 - clip_low, ratio_R)
    )
    return -advantage_R * clamped_R, clipped_high_R, clipped_low_R


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
    """v is [R, ...]; `samples` are like it and `rows` one value a row of it, or None.

    What fits is found so in one pass; the checks that have words are called for what does not.
    """
    check_samples(op, "v", v)
    shape, of_row, device = v.shape, v.shape[:1], v.device
    for name, x in samples.items():
        if x is not None and not (
            x.shape == shape and x.device == device and x.is_floating_point()
        ):
            check_like(op, name, x, "v", v)
    for name, x in rows.items():
        if x is not None and not (x.shape == of_row and x.device == device):
            check_rows(op, name, x, "v", v)


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


def prepared(
    op: str, backend: Backend, widest: tuple[Tensor, ...],
    samples: Iterable[Tensor | None], rows: Iterable[Tensor | None],
) -> tuple[bool, list[Any]]:  # fmt: skip
    """Whether the kernels run, and v, the samples [R, N] and the rows [R] as they are then taken.

    `widest` is v and what the arithmetic's dtype depends on. The kernels read contiguous tensors of
    any shape and dtype, and None; the references take [R, N], all in one dtype and without a
    gradient but v, and ones for a row that is None.
    """
    v = widest[0]
    if choose_backend(op, backend, *widest) == "triton":
        taken = [None if x is None else x.contiguous() for x in samples]
        return True, [v.contiguous(), *taken, *map(_kernel_row, rows)]
    dtype = compute_dtype(*widest)
    ones_R = torch.ones(v.shape[0], dtype=dtype, device=v.device)
    taken = [None if x is None else x.detach().flatten(1).to(dtype).contiguous() for x in samples]
    rows_R = [ones_R if x is None else x.detach().to(dtype) for x in rows]
    return False, [v.flatten(1).to(dtype), *taken, *rows_R]


def _kernel_row(x: Tensor | None) -> Tensor | None:
    """[R] as a kernel can read it; what it can read as it is, is not copied."""
    if x is None:
        return None
    return (x if x.dtype in (torch.float32, torch.bool) else x.float()).contiguous()


# ---- pieces of kernels ---------------------------------------------------------------------------


@triton.jit
def elements_at(row, start, elements, BLOCK: tl.constexpr):
    """Where BLOCK elements of the row lie, from `start` on, and which of them are inside it."""
    element = start + tl.arange(0, BLOCK)
    return row * elements + element, element < elements


@triton.jit
def elements_of(elements, BLOCK: tl.constexpr):
    """The row of this program in `grid_of_rows`, and `elements_at` of its block."""
    block, row = block_and_row(elements, BLOCK)
    at, inside = elements_at(row, block * BLOCK, elements, BLOCK)
    return row, at, inside


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
def clamp(x, least, most):
    """x from least to most; NaN stays, which tl.minimum, tl.maximum and tl.clamp drop on a GPU."""
    x = tl.where(x < least, least, x)
    return tl.where(x > most, most, x)


@triton.jit
def is_last(ticket_ptr):
    """Whether all other programs have stored their sums, so that this one may read them.

    The thread that stores a program's sums, scalars, draws its ticket: the release covers them. The
    others get the ticket from it behind a barrier: the acquire covers their loads. It is left at 0.
    """
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last


@triton.jit
def row_means(sums_ptr, row, rows, elements, chunks, SUMS: tl.constexpr, CHUNKS: tl.constexpr):
    """Each sum of these rows over the chunks, added always in the same order, / elements.

    The first CHUNKS of all sums without a loop: so they come together, with the rows' own values.
    """
    chunk = tl.arange(0, CHUNKS)
    totals = ()
    for SUM in tl.static_range(SUMS):
        totals += (_load_sums(sums_ptr, SUM, chunk, row, chunks, rows),)  # type: ignore[assignment]
    for first in range(CHUNKS, chunks, CHUNKS):
        more = ()
        for SUM in tl.static_range(SUMS):
            loaded = _load_sums(sums_ptr, SUM, first + chunk, row, chunks, rows)
            more += (totals[SUM] + loaded,)  # type: ignore[assignment]
        totals = more
    means = ()
    for SUM in tl.static_range(SUMS):
        means += (tl.sum(totals[SUM], 0) / elements,)  # type: ignore[assignment]
    return means


@triton.jit
def _load_sums(sums_ptr, SUM: tl.constexpr, chunk, row, chunks, rows):
    """sums[SUM, chunk, row], 0 outside, fp32 [CHUNKS, ROWS]; from L2, where all programs meet."""
    at = (SUM * chunks + chunk[:, None]) * rows + row[None, :]  # int32, as for the rows
    mask = (chunk < chunks)[:, None] & (row < rows)[None, :]
    return tl.load(sums_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def exp_near_0(x):
    """exp with all digits near 0, where ratios are: there the GPU's own loses the last two bits."""
    series = 1.0 + x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24))))
    return tl.where(tl.abs(x) < 0.03, series, tl.exp(x))


@triton.jit
def clipped_term(advantage, log_ratio, ratio, log_low, log_high, clip_low, clip_high):
    """`clipped_term_ref`, the bounds given as `log_bounds` too."""
    clipped_high = (advantage > 0) & (log_ratio > log_high)
    clipped_low = (advantage < 0) & (log_ratio < log_low)
    clamped = tl.where(clipped_high, 1.0 + clip_high, tl.where(clipped_low, 1.0 - clip_low, ratio))
    return -advantage * clamped, clipped_high, clipped_low


# ---- launches ------------------------------------------------------------------------------------

Results = tuple[Tensor, Tensor, Tensor]  # loss [], rows [S, R], flags [F, R] bool
CHUNKED = LaunchShape(rows=32)
UNCHUNKED = CHUNKED._replace(chunk=CHUNKED.block)
TILE = 256  # rows x chunks of each sum at a time: with more, fewer programs fit a multiprocessor


def default_shape(R: int, N: int, device: torch.device) -> LaunchShape:
    """Where chunks of several blocks would leave multiprocessors idle, a chunk is a block."""
    return UNCHUNKED if leaves_idle(R, N, CHUNKED.chunk, device) else CHUNKED


def layout(op: str, v_RN: Tensor) -> tuple[int, int, LaunchShape]:
    """R, N and the shape of the op's launches over them."""
    R, device = v_RN.shape[0], v_RN.device
    N = v_RN.numel() // R
    return R, N, launch_shape(op, R, N, device, default_shape(R, N, device))


def launch_loss(
    op: str, kernel: Any, v_RN: Tensor, results: Results, sums: int, **arguments: Any
) -> Results:
    """Fills the results of `empty_results`, by way of so many sums of every chunk of every row."""
    R, N, shape = layout(op, v_RN)
    C, ROWS = cdiv(N, shape.chunk), min(shape.rows, 1 << (R - 1).bit_length())
    loss, rows_SR, flags_FR = results
    if flags_FR.shape[0]:
        arguments["flags_ptr"] = flags_FR
    launch(
        kernel, grid_of_rows(R, N, shape.chunk), shape, v_ptr=v_RN, **arguments,
        sums_ptr=v_RN.new_empty(sums, C, R, dtype=torch.float32), ticket_ptr=ticket(v_RN.device),
        rows_ptr=rows_SR, loss_ptr=loss, rows=R, elements=N, chunks=C, CHUNK=shape.chunk,
        BLOCK=shape.block, ROWS_AT_A_TIME=ROWS, CHUNKS_AT_A_TIME=max(TILE // ROWS, 1),
    )  # fmt: skip
    return results


def launch_gradient(
    op: str, kernel: Any, v_RN: Tensor, rows_SR: Tensor, upstream: Tensor, **arguments: Any
) -> Tensor:
    """The gradient of v [R, N] in its dtype."""
    R, N, shape = layout(op, v_RN)
    grad_RN = torch.empty_like(v_RN)
    launch(
        kernel, grid_of_rows(R, N, shape.block), shape, v_ptr=v_RN, **arguments, rows_ptr=rows_SR,
        upstream_ptr=upstream, grad_ptr=grad_RN, rows=R, elements=N, BLOCK=shape.block,
    )  # fmt: skip
    return grad_RN


def empty_results(v_RN: Tensor, statistics: int, flags: int) -> Results:
    """What a loss returns, not yet written."""
    R = v_RN.shape[0]
    return (
        v_RN.new_empty((), dtype=torch.float32),
        v_RN.new_empty(statistics, R, dtype=torch.float32),
        v_RN.new_empty(flags, R, dtype=torch.bool),
    )


# ---- autograd ------------------------------------------------------------------------------------


class RowLoss:
    """A loss whose gradient goes to its first input, v, from two functions that launch kernels.

    `loss` makes `Results` of contiguous inputs; `gradient` makes that of v of the first `tensors`
    inputs of the loss, its rows, the gradient of the loss and the last `constants` inputs. Nothing
    else is kept for the backward pass. Both are custom ops too, gardo::NAME and gardo::NAME_grad,
    for what looks on.
    """

    def __init__(
        self, name: str, loss: Callable[..., Results], gradient: Callable[..., Tensor], *,
        statistics: int, flags: int, tensors: int, constants: int = 0,
    ) -> None:  # fmt: skip
        self.loss, self.gradient = loss, gradient
        self.tensors, self.constants = tensors, constants
        self.op = torch.library.custom_op(f"gardo::{name}", loss, mutates_args=())
        grad_op = torch.library.custom_op(f"gardo::{name}_grad", gradient, mutates_args=())

        def backward(ctx: Any, upstream: Tensor, *_: object) -> tuple[Tensor | None, ...]:
            grad_RN = grad_op(*ctx.saved_tensors, upstream, *ctx.constants)
            return grad_RN, *[None] * ctx.without_gradient

        self.op.register_fake(lambda v_RN, *_: empty_results(v_RN, statistics, flags))
        grad_op.register_fake(lambda v_RN, *_: torch.empty_like(v_RN))
        self.op.register_autograd(backward, setup_context=self.save)

    def __call__(self, v_RN: Tensor, *others: Any) -> Results:
        if looked_on():
            detached = (x.detach() if isinstance(x, Tensor) else x for x in others)
            return self.op(v_RN, *detached)
        return _Launches.apply(v_RN, self, others)

    def save(self, ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        ctx.save_for_backward(*inputs[: self.tensors], output[1])
        ctx.constants = inputs[len(inputs) - self.constants :]
        ctx.without_gradient = len(inputs) - 1
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # of rows and flags: two launches for nothing


class _Launches(torch.autograd.Function):
    """`RowLoss` where nobody looks on. All inputs but v come as one tuple, which autograd does not
    look into."""

    @staticmethod
    def forward(ctx: Any, v_RN: Tensor, row_loss: RowLoss, others: tuple[Any, ...]) -> Results:
        results = row_loss.loss(v_RN, *others)
        row_loss.save(ctx, (v_RN, *others), results)
        ctx.gradient = row_loss.gradient
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: object) -> tuple[Tensor, None, None]:
        return ctx.gradient(*ctx.saved_tensors, upstream, *ctx.constants), None, None
