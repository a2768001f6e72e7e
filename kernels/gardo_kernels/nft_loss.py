"""DiffusionNFT's loss: the forward process, implicit positive and negative policies, a gated KL.

For row b of R, freshly noised at time t: x_t = (1 - t) x0 + t noise, with the strength b,

    r  = clamp(clamp(A, +-adv_clip) / (2 adv_clip) + 1/2, 0, 1)        the preference
    v+ = b v + (1 - b) v_old        v- = (1 + b) v_old - b v        x0(+-) = x_t - t v(+-)
    weight(+-) = max(mean |x0(+-) - x0|, floor), without gradient
    L(+-)      = mean((x0(+-) - x0)^2) / weight(+-)
    policy     = policy_scale (r L+ + (1 - r) L-) / b
    kl         = mean((v - v_ref)^2) where gate_b is not 0, else 0

    loss       = mean_b (policy_b + beta gate_b kl_b)

Means are over the N elements of a sample. policy_scale is the range of the clamped advantages, 5 in
the release. Source: DiffusionNFT, arXiv 2509.16117, and its released code; the gate: GARDO, arXiv
2512.24138.

Least traffic: v, v_old, x_t, x0, and v_ref of gated rows, once for the row sums and once for the
gradient, which is written. Called once for each micro-batch by `gardo.algorithms`.

With e = x_t - t v_old - x0 and s = t b (v - v_old) the two errors are e - s and e + s. Two launches
as in `policy_loss`, with one integer atomic a program; no fp64, no host synchronisation.

Shapes: R rows, N elements (any dimensions after the first).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels import _row_loss as shared
from gardo_kernels._examples import Examples, On, with_gradient
from gardo_kernels._launch import Backend, block_and_row


@dataclass(frozen=True, eq=False)
class NftLoss:
    """`loss` carries the gradient to v; everything else is detached and one value a row.

    loss []; policy_R with policy_scale and 1 / b in it; kl_R before gate and beta, 0 in rows
    without a reference; the weights and the weighted errors of the positive and the negative
    branch.
    """

    loss: Tensor
    policy_R: Tensor
    kl_R: Tensor
    weight_plus_R: Tensor
    weight_minus_R: Tensor
    loss_plus_R: Tensor
    loss_minus_R: Tensor


def nft_preference(advantage: Tensor, adv_clip: float = 5.0) -> Tensor:
    """r = clamp(clamp(A, +-adv_clip) / (2 adv_clip) + 1/2, 0, 1), in the shape and dtype of A.

    ValueError for adv_clip not positive. Source: DiffusionNFT's released code (adv_clip 5).
    """
    if not adv_clip > 0:
        raise ValueError(f"nft_preference: adv_clip is {adv_clip}; it must be positive")
    return (advantage.clamp(-adv_clip, adv_clip) / (2 * adv_clip) + 0.5).clamp(0.0, 1.0)


def nft_loss_ref(
    v_RN: Tensor, v_old_RN: Tensor, x_t_RN: Tensor, x0_RN: Tensor, v_ref_RN: Tensor | None,
    t_R: Tensor, advantage_R: Tensor, gate_R: Tensor, beta: float, adv_clip: float,
    policy_scale: float, floor: float, b: float,
) -> NftLoss:  # fmt: skip
    """The formula in plain torch, all tensors in one dtype; autograd gives the gradient."""
    r_R = nft_preference(advantage_R, adv_clip)

    def branch(v_branch_RN: Tensor) -> tuple[Tensor, Tensor]:
        error_RN = x_t_RN - t_R[:, None] * v_branch_RN - x0_RN
        weight_R = error_RN.detach().abs().mean(1).clamp(min=floor)
        return error_RN.square().mean(1) / weight_R, weight_R

    plus_R, weight_plus_R = branch(b * v_RN + (1 - b) * v_old_RN)
    minus_R, weight_minus_R = branch((1 + b) * v_old_RN - b * v_RN)
    policy_R = policy_scale * (r_R * plus_R + (1 - r_R) * minus_R) / b
    kl, kl_R = shared.gated_kl_ref(v_RN, v_ref_RN, gate_R, torch.ones_like(gate_R))
    return NftLoss(
        loss=policy_R.mean() + beta * kl,
        policy_R=policy_R.detach(),
        kl_R=kl_R.detach(),
        weight_plus_R=weight_plus_R,
        weight_minus_R=weight_minus_R,
        loss_plus_R=plus_R.detach(),
        loss_minus_R=minus_R.detach(),
    )


# ---- kernels -------------------------------------------------------------------------------------

# rows[statistic, row]: what is reported, in the order of NftLoss; the gradient's three scalars
POLICY, KL, WEIGHT_PLUS, WEIGHT_MINUS, LOSS_PLUS, LOSS_MINUS = (tl.constexpr(i) for i in range(6))
PULL_PLUS, PULL_MINUS, KL_WEIGHT = (tl.constexpr(i) for i in range(6, 9))
REPORTED, STATISTICS, FLAGS = 6, 9, 0
# sums[sum, chunk, row]: of absolute values and squares
PLUS_1, PLUS_2, MINUS_1, MINUS_2, ERROR_2 = (tl.constexpr(i) for i in range(5))
SUMS = tl.constexpr(5)


@triton.jit
def _errors(v, at, inside, v_old_ptr, x_t_ptr, x0_ptr, t, b):
    """e and s: the errors of the two branches are e - s and e + s."""
    v_old = shared.load_fp32(v_old_ptr, at, inside)
    x_t = shared.load_fp32(x_t_ptr, at, inside)
    x0 = shared.load_fp32(x0_ptr, at, inside)
    e = (x_t - x0) - t * v_old  # in this order: at small t x_t - x0 is exact or nearly
    return e, t * b * (v - v_old)


@triton.jit
def _nft_loss_fwd_kernel(
    v_ptr, v_old_ptr, x_t_ptr, x0_ptr, v_ref_ptr, t_ptr, advantage_ptr, gate_ptr, sums_ptr,
    ticket_ptr, rows_ptr, loss_ptr, rows, elements, chunks, b, beta, adv_clip, policy_scale, floor,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ROWS_AT_A_TIME: tl.constexpr,
    CHUNKS_AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """sums[:, chunk, row] = sums of |e - s|, (e - s)^2, |e + s|, (e + s)^2, (v - v_ref)^2; the last
    program goes on to the rows."""
    chunk, row = block_and_row(elements, CHUNK)
    gated = shared.is_gated(gate_ptr, row, BLOCK)
    t = tl.load(t_ptr + row)
    plus_1 = tl.zeros((BLOCK,), tl.float32)
    plus_2 = tl.zeros((BLOCK,), tl.float32)
    minus_1 = tl.zeros((BLOCK,), tl.float32)
    minus_2 = tl.zeros((BLOCK,), tl.float32)
    error_2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        at, inside = shared.elements_at(row, chunk * CHUNK + start, elements, BLOCK)
        v = shared.load_fp32(v_ptr, at, inside)
        e, s = _errors(v, at, inside, v_old_ptr, x_t_ptr, x0_ptr, t, b)
        plus_1 += tl.abs(e - s)
        plus_2 += (e - s) * (e - s)
        minus_1 += tl.abs(e + s)
        minus_2 += (e + s) * (e + s)
        if v_ref_ptr is not None:
            error = shared.error_where(v, v_ref_ptr, at, inside & gated)
            error_2 += error * error
    here = sums_ptr + chunk * rows + row
    tl.store(here + chunks * rows * PLUS_1, tl.sum(plus_1))
    tl.store(here + chunks * rows * PLUS_2, tl.sum(plus_2))
    tl.store(here + chunks * rows * MINUS_1, tl.sum(minus_1))
    tl.store(here + chunks * rows * MINUS_2, tl.sum(minus_2))
    tl.store(here + chunks * rows * ERROR_2, tl.sum(error_2))
    if shared.is_last(ticket_ptr):
        _nft_loss_rows(
            t_ptr, advantage_ptr, gate_ptr, sums_ptr, rows_ptr, loss_ptr, rows, elements, chunks, b,
            beta, adv_clip, policy_scale, floor, ROWS_AT_A_TIME, CHUNKS_AT_A_TIME,
        )  # fmt: skip


@triton.jit
def _nft_loss_rows(
    t_ptr, advantage_ptr, gate_ptr, sums_ptr, rows_ptr, loss_ptr, rows, elements, chunks, b, beta,
    adv_clip, policy_scale, floor, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """rows[statistic, row] and the loss, by one program, in the order of chunks and rows."""
    policy_sum, kl_sum = 0.0, 0.0
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        t = shared.load_rows(t_ptr, row, inside)
        advantage = shared.load_rows(advantage_ptr, row, inside)
        advantage = shared.clamp(advantage, -adv_clip, adv_clip)
        r = shared.clamp(advantage / (2.0 * adv_clip) + 0.5, 0.0, 1.0)
        gate = shared.load_rows(gate_ptr, row, inside)
        plus_1, plus_2, minus_1, minus_2, kl = shared.row_means(
            sums_ptr, row, rows, elements, chunks, SUMS, CHUNKS
        )
        weight_plus = tl.where(plus_1 < floor, floor, plus_1)  # NaN stays
        weight_minus = tl.where(minus_1 < floor, floor, minus_1)
        loss_plus, loss_minus = plus_2 / weight_plus, minus_2 / weight_minus
        policy = policy_scale * (r * loss_plus + (1.0 - r) * loss_minus) / b
        policy_sum += tl.sum(tl.where(inside, policy, 0.0))
        kl_sum += tl.sum(gate * kl)
        scale = 2.0 * t * policy_scale / (rows * 1.0 * elements)
        here = rows_ptr + row
        tl.store(here + rows * POLICY, policy, mask=inside)
        tl.store(here + rows * KL, kl, mask=inside)
        tl.store(here + rows * WEIGHT_PLUS, weight_plus, mask=inside)
        tl.store(here + rows * WEIGHT_MINUS, weight_minus, mask=inside)
        tl.store(here + rows * LOSS_PLUS, loss_plus, mask=inside)
        tl.store(here + rows * LOSS_MINUS, loss_minus, mask=inside)
        tl.store(here + rows * PULL_PLUS, -scale * r / weight_plus, mask=inside)
        tl.store(here + rows * PULL_MINUS, scale * (1.0 - r) / weight_minus, mask=inside)
        kl_weight = beta * gate * (2.0 / (rows * 1.0 * elements))
        tl.store(here + rows * KL_WEIGHT, kl_weight, mask=inside)
    tl.store(loss_ptr, policy_sum / rows + beta * kl_sum / rows)


@triton.jit
def _nft_loss_bwd_kernel(
    v_ptr, v_old_ptr, x_t_ptr, x0_ptr, v_ref_ptr, t_ptr, rows_ptr, upstream_ptr, grad_ptr,
    rows, elements, b, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad = upstream (plus (e - s) + minus (e + s) + kl_weight (v - v_ref)), BLOCK of a row."""
    row, at, inside = shared.elements_of(elements, BLOCK)
    upstream, t = tl.load(upstream_ptr), tl.load(t_ptr + row)
    plus = upstream * tl.load(rows_ptr + rows * PULL_PLUS + row)
    minus = upstream * tl.load(rows_ptr + rows * PULL_MINUS + row)
    kl_weight = upstream * tl.load(rows_ptr + rows * KL_WEIGHT + row)
    v = shared.load_fp32(v_ptr, at, inside)
    e, s = _errors(v, at, inside, v_old_ptr, x_t_ptr, x0_ptr, t, b)
    grad = plus * (e - s) + minus * (e + s)
    if v_ref_ptr is not None:
        kl = tl.load(rows_ptr + rows * KL + row)
        grad += shared.kl_pull(v, v_ref_ptr, kl_weight, kl, at, inside, BLOCK)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


# ---- op ------------------------------------------------------------------------------------------


def _launch_loss(
    v_RN: Tensor, v_old_RN: Tensor, x_t_RN: Tensor, x0_RN: Tensor, v_ref_RN: Tensor | None,
    t_R: Tensor, advantage_R: Tensor, gate_R: Tensor | None, beta: float, adv_clip: float,
    policy_scale: float, floor: float, b: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss [] and the rows [STATISTICS, R], fp32, and flags; all inputs contiguous."""
    return shared.launch_loss(
        "nft_loss", _nft_loss_fwd_kernel, v_RN, shared.empty_results(v_RN, STATISTICS, FLAGS),
        SUMS.value, v_old_ptr=v_old_RN, x_t_ptr=x_t_RN, x0_ptr=x0_RN, v_ref_ptr=v_ref_RN,
        t_ptr=t_R, advantage_ptr=advantage_R, gate_ptr=gate_R, b=b,
        beta=beta if v_ref_RN is not None else 0.0, adv_clip=adv_clip, policy_scale=policy_scale,
        floor=floor,
    )  # fmt: skip


def _launch_gradient(
    v_RN: Tensor, v_old_RN: Tensor, x_t_RN: Tensor, x0_RN: Tensor, v_ref_RN: Tensor | None,
    t_R: Tensor, rows_SR: Tensor, upstream: Tensor, b: float,
) -> Tensor:  # fmt: skip
    """dL/dv [R, N] in the dtype of v."""
    return shared.launch_gradient(
        "nft_loss", _nft_loss_bwd_kernel, v_RN, rows_SR, upstream, v_old_ptr=v_old_RN,
        x_t_ptr=x_t_RN, x0_ptr=x0_RN, v_ref_ptr=v_ref_RN, t_ptr=t_R, b=b,
    )  # fmt: skip


_nft_loss = shared.RowLoss(
    "nft_loss", _launch_loss, _launch_gradient, statistics=STATISTICS, flags=FLAGS, tensors=6,
    constants=1,
)  # fmt: skip


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    *,
    advantage: Tensor,
    b: float,
    gate: Tensor | None = None,
    v_ref: Tensor | None = None,
    beta: float = 0.0,
    adv_clip: float = 5.0,
    policy_scale: float = 5.0,
    floor: float = 1e-5,
    backend: Backend = "auto",
) -> NftLoss:
    """Loss of a micro-batch with a gradient to v, and the statistics of each row.

    v, v_old, x_t, x0, v_ref: [R, ...] of equal shape, any floating dtype; v_old is the sampling
    (old) velocity at x_t. t: [R] in [0, 1], the noising time. advantage: [R], of which the loss
    takes `nft_preference`. b > 0. gate: [R] bool or the weight of each row's KL, None means 1 for
    every row; rows of gate 0 need no reference, whatever v_ref holds there. The KL is averaged over
    all R rows: a mean over other rows is asked for by weights. v_ref None leaves the KL out, which
    is right for a micro-batch without gated rows. Only v receives a gradient.

    Arithmetic and results are fp32 (fp64 where v, v_old, x_t or x0 is fp64).

    ValueError for shapes, dtypes or devices that do not fit, b, adv_clip or floor not positive,
    beta negative, and beta > 0 with neither v_ref nor a gate. Source: arXiv 2509.16117.
    """
    op, samples = "nft_loss", {"v_old": v_old, "x_t": x_t, "x0": x0, "v_ref": v_ref}
    row_values = {"t": t, "advantage": advantage, "gate": gate}
    shared.check_tensors(op, v, samples, row_values)
    shared.check_positive(op, b=b, adv_clip=adv_clip, floor=floor)
    shared.check_kl(op, beta, gate, v_ref)
    kernels, inputs = shared.prepared(
        op, backend, (v, v_old, x_t, x0), samples.values(), row_values.values()
    )
    inputs += (beta, adv_clip, policy_scale, floor, b)
    if not kernels:
        return nft_loss_ref(*inputs)
    loss, rows_SR, _ = _nft_loss(*inputs)
    return NftLoss(loss, *rows_SR.unbind(0)[:REPORTED])


def examples(on: On) -> Examples:
    """With a reference, weighted; see `_examples.py`."""
    v_old, moved, x_t, x0, v_ref = on.samples(5)
    v, t = (v_old + 0.1 * moved).requires_grad_(), on.row_values(0.2, 0.8)
    out = nft_loss(
        v, v_old, x_t, x0, t, advantage=10 * t - 5, b=1.0, gate=t, v_ref=v_ref, beta=0.1,
        policy_scale=1.0, backend=on.backend,
    )  # fmt: skip
    yield "", with_gradient(out, v)
