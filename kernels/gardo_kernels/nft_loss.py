"""DiffusionNFT's loss: the forward process, implicit positive and negative policies, a gated KL.

For row b of R, freshly noised at time t: x_t = (1 - t) x0 + t noise, with preference r in [0, 1]
and strength b,

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

With e = x_t - t v_old - x0 and s = t b (v - v_old) the two errors are e - s and e + s. Three
launches as in `policy_loss`; no fp64, no atomics, no host synchronisation.

Shapes: R rows, N elements (any dimensions after the first).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels._launch import (
    Backend,
    block_and_row,
    choose_backend,
    compute_dtype,
    grid_of_rows,
    launch,
)
from gardo_kernels._row_loss import (
    BLOCK,
    CHUNK,
    ROWS_AT_A_TIME,
    check_kl,
    check_positive,
    check_tensors,
    constant_rows,
    constant_samples,
    empty_results,
    error_where,
    gated_kl_ref,
    is_gated,
    kernel_rows,
    kl_pull,
    load_fp32,
    load_rows,
    register_row_loss,
    sum_chunks,
)


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
    t_R: Tensor, r_R: Tensor, gate_R: Tensor, beta: float, policy_scale: float, floor: float,
    b: float,
) -> NftLoss:  # fmt: skip
    """The formula in plain torch, all tensors in one dtype; autograd gives the gradient."""

    def branch(v_branch_RN: Tensor) -> tuple[Tensor, Tensor]:
        error_RN = x_t_RN - t_R[:, None] * v_branch_RN - x0_RN
        weight_R = error_RN.detach().abs().mean(1).clamp(min=floor)
        return error_RN.square().mean(1) / weight_R, weight_R

    plus_R, weight_plus_R = branch(b * v_RN + (1 - b) * v_old_RN)
    minus_R, weight_minus_R = branch((1 + b) * v_old_RN - b * v_RN)
    policy_R = policy_scale * (r_R * plus_R + (1 - r_R) * minus_R) / b
    kl, kl_R = gated_kl_ref(v_RN, v_ref_RN, gate_R, torch.ones_like(gate_R))
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

STATISTICS = 9  # policy, KL, both weights, both weighted errors, and the gradient's three scalars


@triton.jit
def _nft_loss_sums_kernel(
    v_ptr, v_old_ptr, x_t_ptr, x0_ptr, v_ref_ptr, t_ptr, gate_ptr, sums_ptr, elements, chunks, b,
    HAS_REF: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[row, :, chunk] = sums of |e - s|, (e - s)^2, |e + s|, (e + s)^2, (v - v_ref)^2."""
    chunk, row = block_and_row(elements, CHUNK)
    gated = is_gated(gate_ptr, row, BLOCK)
    t = tl.load(t_ptr + row)
    plus_1 = tl.zeros((BLOCK,), tl.float32)
    plus_2 = tl.zeros((BLOCK,), tl.float32)
    minus_1 = tl.zeros((BLOCK,), tl.float32)
    minus_2 = tl.zeros((BLOCK,), tl.float32)
    error_2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        element = chunk * CHUNK + start + tl.arange(0, BLOCK)
        inside = element < elements
        at = row * elements + element
        v = load_fp32(v_ptr, at, inside)
        v_old = load_fp32(v_old_ptr, at, inside)
        x_t = load_fp32(x_t_ptr, at, inside)
        x0 = load_fp32(x0_ptr, at, inside)
        e = (x_t - x0) - t * v_old  # in this order: at small t x_t - x0 is exact or nearly
        s = t * b * (v - v_old)
        plus_1 += tl.abs(e - s)
        plus_2 += (e - s) * (e - s)
        minus_1 += tl.abs(e + s)
        minus_2 += (e + s) * (e + s)
        if HAS_REF:
            error = error_where(v, v_ref_ptr, at, inside & gated)
            error_2 += error * error
    at = sums_ptr + row * 5 * chunks + chunk
    tl.store(at, tl.sum(plus_1))
    tl.store(at + chunks, tl.sum(plus_2))
    tl.store(at + 2 * chunks, tl.sum(minus_1))
    tl.store(at + 3 * chunks, tl.sum(minus_2))
    tl.store(at + 4 * chunks, tl.sum(error_2))


@triton.jit
def _nft_loss_rows_kernel(
    sums_ptr, t_ptr, r_ptr, gate_ptr, rows_ptr, loss_ptr, rows, elements, chunks, b, beta,
    policy_scale, floor, ROWS: tl.constexpr,
):  # fmt: skip
    """rows[statistic, row] and the loss, by one program, in the order of chunks and rows."""
    policy_sum, kl_sum = 0.0, 0.0
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        t = load_rows(t_ptr, row, inside)
        r = load_rows(r_ptr, row, inside)
        gate = load_rows(gate_ptr, row, inside)
        weight_plus = sum_chunks(sums_ptr, row, inside, chunks, 0, 5) / elements
        weight_minus = sum_chunks(sums_ptr, row, inside, chunks, 2, 5) / elements
        weight_plus = tl.where(weight_plus < floor, floor, weight_plus)  # NaN stays
        weight_minus = tl.where(weight_minus < floor, floor, weight_minus)
        plus = sum_chunks(sums_ptr, row, inside, chunks, 1, 5) / elements / weight_plus
        minus = sum_chunks(sums_ptr, row, inside, chunks, 3, 5) / elements / weight_minus
        kl = sum_chunks(sums_ptr, row, inside, chunks, 4, 5) / elements
        policy = policy_scale * (r * plus + (1.0 - r) * minus) / b
        policy_sum += tl.sum(tl.where(inside, policy, 0.0))
        kl_sum += tl.sum(gate * kl)
        scale = 2.0 * t * policy_scale / (rows * 1.0 * elements)
        at = rows_ptr + row
        tl.store(at, policy, mask=inside)
        tl.store(at + rows, kl, mask=inside)
        tl.store(at + 2 * rows, weight_plus, mask=inside)
        tl.store(at + 3 * rows, weight_minus, mask=inside)
        tl.store(at + 4 * rows, plus, mask=inside)
        tl.store(at + 5 * rows, minus, mask=inside)
        tl.store(at + 6 * rows, -scale * r / weight_plus, mask=inside)
        tl.store(at + 7 * rows, scale * (1.0 - r) / weight_minus, mask=inside)
        tl.store(at + 8 * rows, beta * gate * (2.0 / (rows * 1.0 * elements)), mask=inside)
    tl.store(loss_ptr, policy_sum / rows + beta * kl_sum / rows)


@triton.jit
def _nft_loss_bwd_kernel(
    v_ptr, v_old_ptr, x_t_ptr, x0_ptr, v_ref_ptr, t_ptr, rows_ptr, upstream_ptr, grad_ptr,
    rows, elements, b, HAS_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad = upstream (plus (e - s) + minus (e + s) + kl_weight (v - v_ref)), BLOCK of a row."""
    block, row = block_and_row(elements, BLOCK)
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    at = row * elements + element
    upstream, t = tl.load(upstream_ptr), tl.load(t_ptr + row)
    plus = upstream * tl.load(rows_ptr + 6 * rows + row)
    minus = upstream * tl.load(rows_ptr + 7 * rows + row)
    kl_weight = upstream * tl.load(rows_ptr + 8 * rows + row)
    v = load_fp32(v_ptr, at, inside)
    v_old = load_fp32(v_old_ptr, at, inside)
    x_t = load_fp32(x_t_ptr, at, inside)
    x0 = load_fp32(x0_ptr, at, inside)
    e = (x_t - x0) - t * v_old
    s = t * b * (v - v_old)
    grad = plus * (e - s) + minus * (e + s)
    if HAS_REF:
        kl = tl.load(rows_ptr + rows + row)
        grad += kl_pull(v, v_ref_ptr, kl_weight, kl, at, inside, BLOCK)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


# ---- ops -----------------------------------------------------------------------------------------


@torch.library.custom_op("gardo::nft_loss", mutates_args=())
def _nft_loss_op(
    v_RN: Tensor, v_old_RN: Tensor, x_t_RN: Tensor, x0_RN: Tensor, v_ref_RN: Tensor | None,
    t_R: Tensor, r_R: Tensor, gate_R: Tensor | None, beta: float, policy_scale: float,
    floor: float, b: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss [] and the rows [STATISTICS, R], fp32, and flags; all inputs contiguous."""
    R, N = v_RN.shape
    chunks = triton.cdiv(N, CHUNK)
    sums_R5C = v_RN.new_empty(R, 5, chunks, dtype=torch.float32)
    loss, rows_SR, flags_FR = empty_results(v_RN, STATISTICS, 0)
    launch(
        _nft_loss_sums_kernel, grid_of_rows(R, N, CHUNK),
        v_RN, v_old_RN, x_t_RN, x0_RN, v_ref_RN, t_R, gate_R, sums_R5C, N, chunks, b,
        HAS_REF=v_ref_RN is not None, CHUNK=CHUNK, BLOCK=BLOCK,
    )  # fmt: skip
    launch(
        _nft_loss_rows_kernel, (1,),
        sums_R5C, t_R, r_R, gate_R, rows_SR, loss, R, N, chunks, b,
        beta if v_ref_RN is not None else 0.0, policy_scale, floor, ROWS=ROWS_AT_A_TIME,
    )  # fmt: skip
    return loss, rows_SR, flags_FR


@torch.library.custom_op("gardo::nft_loss_grad", mutates_args=())
def _nft_loss_grad_op(
    v_RN: Tensor, v_old_RN: Tensor, x_t_RN: Tensor, x0_RN: Tensor, v_ref_RN: Tensor | None,
    t_R: Tensor, rows_SR: Tensor, upstream: Tensor, b: float,
) -> Tensor:  # fmt: skip
    """dL/dv [R, N] in the dtype of v."""
    R, N = v_RN.shape
    grad_RN = torch.empty_like(v_RN)
    launch(
        _nft_loss_bwd_kernel, grid_of_rows(R, N, BLOCK),
        v_RN, v_old_RN, x_t_RN, x0_RN, v_ref_RN, t_R, rows_SR, upstream, grad_RN, R, N, b,
        HAS_REF=v_ref_RN is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return grad_RN


register_row_loss(
    _nft_loss_op, _nft_loss_grad_op, statistics=STATISTICS, flags=0, tensors=6, constants=1
)


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    *,
    r: Tensor,
    b: float,
    gate: Tensor | None = None,
    v_ref: Tensor | None = None,
    beta: float = 0.0,
    policy_scale: float = 5.0,
    floor: float = 1e-5,
    backend: Backend = "auto",
) -> NftLoss:
    """Loss of a micro-batch with a gradient to v, and the statistics of each row.

    v, v_old, x_t, x0, v_ref: [R, ...] of equal shape, any floating dtype; v_old is the sampling
    (old) velocity at x_t. t, r: [R] in [0, 1], the noising time and `nft_preference` of the
    advantage. b > 0. gate: [R] bool or the weight of each row's KL, None means 1 for every row;
    rows of gate 0 need no reference, whatever v_ref holds there. The KL is averaged over all R
    rows: a mean over other rows is asked for by weights. v_ref None leaves the KL out, which is
    right for a micro-batch without gated rows. Only v receives a gradient.

    Arithmetic and results are fp32 (fp64 where v, v_old, x_t or x0 is fp64).

    ValueError for shapes, dtypes or devices that do not fit, b or floor not positive, beta
    negative, and beta > 0 with neither v_ref nor a gate. Source: arXiv 2509.16117.
    """
    op = "nft_loss"
    samples = {"v_old": v_old, "x_t": x_t, "x0": x0, "v_ref": v_ref}
    row_values = {"t": t, "r": r, "gate": gate}
    check_tensors(op, v, samples, row_values)
    check_positive(op, b=b, floor=floor)
    check_kl(op, beta, gate, v_ref)
    dtype = compute_dtype(v, v_old, x_t, x0)
    kernels = choose_backend(op, backend, v, v_old, x_t, x0) == "triton"
    values = row_values.values()
    inputs = [
        *constant_samples(None if kernels else dtype, *samples.values()),
        *(kernel_rows(*values) if kernels else constant_rows(v, dtype, *values)),
        *(beta, policy_scale, floor, b),
    ]
    if not kernels:
        return nft_loss_ref(v.flatten(1).to(dtype), *inputs)
    loss, rows_SR, _ = _nft_loss_op(v.flatten(1).contiguous(), *inputs)
    return NftLoss(loss, *rows_SR.unbind(0)[:6])
