"""Clipped policy-gradient loss with a gated KL term, for flow-matching policies.

With delta = v - v_old and u = (std / B) z, the sampler's noise in velocity units, row b has

    log_ratio = h B^2 [ 2 mean(u delta) - q mean(delta^2) ]    (delta form: 0 on-policy)
    ratio     = exp(log_ratio)
    policy    = weight max(-A ratio, -A clamp(ratio, 1 - clip_low, 1 + clip_high))
    A         = clamp(advantage, +-adv_clip)
    kl        = kl_scale mean((v - v_ref)^2) where gate_b is not 0, else 0

    loss      = mean_b (policy_b + beta gate_b kl_b)

h, B and kl_scale are read from each row's denoise step (`gardo.flow.transitions`). Means are over
the N elements of a sample, not sums, so clip ranges are 1e-4 to 1e-5. The difference of two
log-probabilities would subtract numbers of order 1 and keep 1e-7 of error, up to a hundredth of the
clip range; the delta form has nothing to cancel.

q is 1 (`quadratic`) and weight 1, except in GRPO-Guard. Its normalised ratio is exp(mean(z (mu -
mu_old))) of the step's means, mu - mu_old = B delta: with h = 1 / (2 std) and q = 0 that is the
formula above, because h B^2 2 u = B z. Its weight is 1 / -dt.

The gradient is two scalars a row times two differences:

    dL/dv = -(weight A ratio act) (2 h B^2) / (R N) (u - q delta)
            + beta gate (2 kl_scale) / (R N) (v - v_ref)

act = 0 where clipping is active (A > 0 and log_ratio > log(1 + clip_high), or A < 0 and log_ratio <
log(1 - clip_low)), else 1.

Sources: Flow-GRPO, arXiv 2505.05470, eq. 5; the gate: GARDO, arXiv 2512.24138, eq. 7; GRPO-Guard,
arXiv 2510.22319.

Least traffic: v, v_old, u, and v_ref of gated rows, once for the row sums and once for the
gradient, which is written. Called once for each micro-batch by `gardo.algorithms`.

Three launches: partial sums of CHUNK elements of a row in each program; one program that adds them
in a fixed order and makes every row's statistics, the loss and the gradient's two scalars; the
gradient. No atomics, no host synchronisation, the same bits every time. Nothing is kept for the
backward pass but the inputs and the rows.

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
    check_not_negative,
    check_tensors,
    clipped_term,
    clipped_term_ref,
    constant_rows,
    constant_samples,
    empty_results,
    error_where,
    exp_near_0,
    gated_difference,
    gated_kl_ref,
    is_gated,
    kernel_rows,
    kl_pull,
    load_fp32,
    load_rows,
    log_bounds,
    register_row_loss,
    sum_chunks,
    within,
)


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """`loss` carries the gradient to v; everything else is detached and one value a row.

    loss [] fp32; loss_R the policy term, weight included; ratio_R and log_ratio_R against the
    sampling policy; kl_R before gate and beta, 0 in rows without a reference; clipped_high_R,
    clipped_low_R bool: rows whose gradient the clip has switched off.
    """

    loss: Tensor
    loss_R: Tensor
    ratio_R: Tensor
    log_ratio_R: Tensor
    kl_R: Tensor
    clipped_high_R: Tensor
    clipped_low_R: Tensor


def policy_loss_ref(
    v_RN: Tensor, v_old_RN: Tensor, u_RN: Tensor, v_ref_RN: Tensor | None,
    advantage_R: Tensor, h_R: Tensor, B_R: Tensor, weight_R: Tensor, gate_R: Tensor,
    kl_scale_R: Tensor, clip_low: float, clip_high: float, beta: float, adv_clip: float,
    quadratic: bool,
) -> PolicyLoss:  # fmt: skip
    """The formula in plain torch, all tensors in one dtype; autograd gives the gradient."""
    advantage_R = advantage_R.clamp(-adv_clip, adv_clip)
    delta_RN = v_RN - v_old_RN
    gain_R = 2 * (u_RN * delta_RN).mean(1)
    if quadratic:
        gain_R = gain_R - delta_RN.square().mean(1)
    log_ratio_R = h_R * B_R.square() * gain_R
    ratio_R = log_ratio_R.exp()
    term_R, high_R, low_R = clipped_term_ref(advantage_R, log_ratio_R, ratio_R, clip_low, clip_high)
    policy_R = weight_R * term_R
    kl, kl_R = gated_kl_ref(v_RN, v_ref_RN, gate_R, kl_scale_R)
    return PolicyLoss(
        loss=policy_R.mean() + beta * kl,
        loss_R=policy_R.detach(),
        ratio_R=ratio_R.detach(),
        log_ratio_R=log_ratio_R.detach(),
        kl_R=kl_R.detach(),
        clipped_high_R=high_R,
        clipped_low_R=low_R,
    )


@torch.no_grad()
def policy_loss_grad_ref(
    v: Tensor, v_old: Tensor, u: Tensor, *, advantage: Tensor, h: Tensor, B: Tensor,
    weight: Tensor | None = None, gate: Tensor | None = None, v_ref: Tensor | None = None,
    kl_scale: Tensor | None = None, clip_low: float = 1e-4, clip_high: float = 1e-4,
    beta: float = 0.0, adv_clip: float = 5.0, quadratic: bool = True,
) -> Tensor:  # fmt: skip
    """dL/dv in closed form: [R, ...] fp32, or fp64 for fp64 inputs. Arguments as `policy_loss`."""
    out = policy_loss(
        v, v_old, u, advantage=advantage, h=h, B=B, clip_low=clip_low, clip_high=clip_high,
        adv_clip=adv_clip, quadratic=quadratic, backend="torch",
    )  # fmt: skip
    dtype = compute_dtype(v, v_old, u)
    v_RN, v_old_RN, u_RN, v_ref_RN = constant_samples(dtype, v, v_old, u, v_ref)
    advantage_R, h_R, B_R, weight_R, gate_R, kl_scale_R = constant_rows(
        v, dtype, advantage, h, B, weight, gate, kl_scale
    )
    R, N = v_RN.shape
    moving_R = out.ratio_R.masked_fill(out.clipped_high_R | out.clipped_low_R, 0.0)
    policy_weight_R = weight_R * advantage_R.clamp(-adv_clip, adv_clip) * moving_R
    policy_weight_R = policy_weight_R * 2 * h_R * B_R.square() / (R * N)
    direction_RN = u_RN - (v_RN - v_old_RN) if quadratic else u_RN
    grad_RN = -policy_weight_R[:, None] * direction_RN
    if v_ref_RN is not None:
        kl_weight_R = beta * gate_R * 2 * kl_scale_R / (R * N)
        grad_RN = grad_RN + kl_weight_R[:, None] * gated_difference(v_RN, v_ref_RN, gate_R)
    return grad_RN.view(v.shape)


# ---- kernels -------------------------------------------------------------------------------------

STATISTICS = 6  # policy, ratio, log-ratio, KL, and the gradient's two scalars
FLAGS = 2  # clipped high, clipped low


@triton.jit
def _policy_loss_sums_kernel(
    v_ptr, v_old_ptr, u_ptr, v_ref_ptr, gate_ptr, sums_ptr, elements, chunks,
    HAS_REF: tl.constexpr, QUADRATIC: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[row, :, chunk] = a chunk's sums of delta (2 u - q delta) and (v - v_ref)^2."""
    chunk, row = block_and_row(elements, CHUNK)
    gated = is_gated(gate_ptr, row, BLOCK)
    gain = tl.zeros((BLOCK,), tl.float32)
    error_2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        element = chunk * CHUNK + start + tl.arange(0, BLOCK)
        inside = element < elements
        at = row * elements + element
        v = load_fp32(v_ptr, at, inside)
        delta = v - load_fp32(v_old_ptr, at, inside)
        pull = 2.0 * load_fp32(u_ptr, at, inside)
        if QUADRATIC:
            pull -= delta
        gain += pull * delta
        if HAS_REF:
            error = error_where(v, v_ref_ptr, at, inside & gated)
            error_2 += error * error
    at = sums_ptr + row * 2 * chunks + chunk
    tl.store(at, tl.sum(gain))
    tl.store(at + chunks, tl.sum(error_2))


@triton.jit
def _policy_loss_rows_kernel(
    sums_ptr, advantage_ptr, h_ptr, B_ptr, weight_ptr, gate_ptr, kl_scale_ptr, rows_ptr, flags_ptr,
    loss_ptr, rows, elements, chunks, log_low, log_high, clip_low, clip_high, beta, adv_clip,
    ROWS: tl.constexpr,
):  # fmt: skip
    """rows[statistic, row] and the loss, by one program, in the order of chunks and rows."""
    policy_sum, kl_sum = 0.0, 0.0
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        advantage = load_rows(advantage_ptr, row, inside)
        advantage = within(advantage, -adv_clip, adv_clip)
        B = load_rows(B_ptr, row, inside)
        strength = load_rows(h_ptr, row, inside) * B * B
        weight = load_rows(weight_ptr, row, inside)
        gate = load_rows(gate_ptr, row, inside)
        kl_scale = load_rows(kl_scale_ptr, row, inside)
        log_ratio = strength * (sum_chunks(sums_ptr, row, inside, chunks, 0, 2) / elements)
        ratio = exp_near_0(log_ratio)
        term, high, low = clipped_term(
            advantage, log_ratio, ratio, log_low, log_high, clip_low, clip_high
        )
        policy = weight * term
        kl = kl_scale * (sum_chunks(sums_ptr, row, inside, chunks, 1, 2) / elements)
        policy_sum += tl.sum(policy)  # rows outside weigh 0
        kl_sum += tl.sum(gate * kl)
        moves = weight * advantage * tl.where(high | low, 0.0, ratio)
        scale = 2.0 / (rows * 1.0 * elements)
        at = rows_ptr + row
        tl.store(at, policy, mask=inside)
        tl.store(at + rows, ratio, mask=inside)
        tl.store(at + 2 * rows, log_ratio, mask=inside)
        tl.store(at + 3 * rows, kl, mask=inside)
        tl.store(at + 4 * rows, moves * (strength * scale), mask=inside)
        tl.store(at + 5 * rows, beta * gate * (kl_scale * scale), mask=inside)
        tl.store(flags_ptr + row, high, mask=inside)
        tl.store(flags_ptr + rows + row, low, mask=inside)
    tl.store(loss_ptr, policy_sum / rows + beta * kl_sum / rows)


@triton.jit
def _policy_loss_bwd_kernel(
    v_ptr, v_old_ptr, u_ptr, v_ref_ptr, rows_ptr, upstream_ptr, grad_ptr, rows, elements,
    HAS_REF: tl.constexpr, QUADRATIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad = upstream (kl_weight (v - v_ref) - policy_weight (u - q delta)), BLOCK of a row."""
    block, row = block_and_row(elements, BLOCK)
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    at = row * elements + element
    upstream = tl.load(upstream_ptr)
    policy_weight = upstream * tl.load(rows_ptr + 4 * rows + row)
    kl_weight = upstream * tl.load(rows_ptr + 5 * rows + row)
    v = load_fp32(v_ptr, at, inside)
    direction = load_fp32(u_ptr, at, inside)
    if QUADRATIC:
        direction -= v - load_fp32(v_old_ptr, at, inside)
    grad = -policy_weight * direction
    if HAS_REF:
        kl = tl.load(rows_ptr + 3 * rows + row)
        grad += kl_pull(v, v_ref_ptr, kl_weight, kl, at, inside, BLOCK)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


# ---- ops -----------------------------------------------------------------------------------------


@torch.library.custom_op("gardo::policy_loss", mutates_args=())
def _policy_loss_op(
    v_RN: Tensor, v_old_RN: Tensor, u_RN: Tensor, v_ref_RN: Tensor | None,
    advantage_R: Tensor, h_R: Tensor, B_R: Tensor, weight_R: Tensor | None,
    gate_R: Tensor | None, kl_scale_R: Tensor | None, clip_low: float, clip_high: float,
    beta: float, adv_clip: float, quadratic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss [] and the rows [STATISTICS, R], fp32, and flags; all inputs contiguous."""
    R, N = v_RN.shape
    chunks = triton.cdiv(N, CHUNK)
    sums_R2C = v_RN.new_empty(R, 2, chunks, dtype=torch.float32)
    loss, rows_SR, flags_FR = empty_results(v_RN, STATISTICS, FLAGS)
    launch(
        _policy_loss_sums_kernel, grid_of_rows(R, N, CHUNK),
        v_RN, v_old_RN, u_RN, v_ref_RN, gate_R, sums_R2C, N, chunks,
        HAS_REF=v_ref_RN is not None, QUADRATIC=quadratic, CHUNK=CHUNK, BLOCK=BLOCK,
    )  # fmt: skip
    launch(
        _policy_loss_rows_kernel, (1,),
        sums_R2C, advantage_R, h_R, B_R, weight_R, gate_R, kl_scale_R, rows_SR, flags_FR, loss,
        R, N, chunks, *log_bounds(clip_low, clip_high), clip_low, clip_high,
        beta if v_ref_RN is not None else 0.0, adv_clip, ROWS=ROWS_AT_A_TIME,
    )  # fmt: skip
    return loss, rows_SR, flags_FR


@torch.library.custom_op("gardo::policy_loss_grad", mutates_args=())
def _policy_loss_grad_op(
    v_RN: Tensor, v_old_RN: Tensor, u_RN: Tensor, v_ref_RN: Tensor | None,
    rows_SR: Tensor, upstream: Tensor, quadratic: bool,
) -> Tensor:  # fmt: skip
    """dL/dv [R, N] in the dtype of v."""
    R, N = v_RN.shape
    grad_RN = torch.empty_like(v_RN)
    launch(
        _policy_loss_bwd_kernel, grid_of_rows(R, N, BLOCK),
        v_RN, v_old_RN, u_RN, v_ref_RN, rows_SR, upstream, grad_RN, R, N,
        HAS_REF=v_ref_RN is not None, QUADRATIC=quadratic, BLOCK=BLOCK,
    )  # fmt: skip
    return grad_RN


register_row_loss(
    _policy_loss_op,
    _policy_loss_grad_op,
    statistics=STATISTICS,
    flags=FLAGS,
    tensors=4,
    constants=1,
)


def policy_loss(
    v: Tensor,
    v_old: Tensor,
    u: Tensor,
    *,
    advantage: Tensor,
    h: Tensor,
    B: Tensor,
    weight: Tensor | None = None,
    gate: Tensor | None = None,
    v_ref: Tensor | None = None,
    kl_scale: Tensor | None = None,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    beta: float = 0.0,
    adv_clip: float = 5.0,
    quadratic: bool = True,
    backend: Backend = "auto",
) -> PolicyLoss:
    """Loss of a micro-batch with a gradient to v, and the statistics of each row.

    v, v_old, u, v_ref: [R, ...] of equal shape, any floating dtypes. v is the trained velocity,
    v_old the sampling one, u = u_scale z. advantage, h, B, weight, kl_scale: [R]; weight None means
    1; kl_scale None means 1 (a squared velocity error). gate: [R] bool or the weight of each row's
    KL, None means 1 for every row; rows of gate 0 need no reference, whatever v_ref holds there.
    The KL is averaged over all R rows: a mean over other rows is asked for by weights. v_ref None
    leaves the KL out, which is right for a micro-batch without gated rows. quadratic False leaves
    mean(delta^2) out of the log-ratio (GRPO-Guard). Only v receives a gradient.

    Arithmetic and results are fp32 (fp64 where v, v_old or u is fp64); velocities and advantages
    without unit, KL in nats a mean element.

    ValueError for shapes, dtypes or devices that do not fit, for negative clip ranges or beta, and
    for beta > 0 with neither v_ref nor a gate: a KL to every row was asked for and has no
    reference. Sources: Flow-GRPO, arXiv 2505.05470, eq. 5; GARDO, arXiv 2512.24138, eq. 7;
    GRPO-Guard, arXiv 2510.22319.
    """
    op = "policy_loss"
    row_values = {
        "advantage": advantage, "h": h, "B": B, "weight": weight, "gate": gate, "kl_scale": kl_scale
    }  # fmt: skip
    check_tensors(op, v, {"v_old": v_old, "u": u, "v_ref": v_ref}, row_values)
    check_not_negative(op, clip_low=clip_low, clip_high=clip_high, adv_clip=adv_clip)
    check_kl(op, beta, gate, v_ref)
    dtype = compute_dtype(v, v_old, u)
    kernels = choose_backend(op, backend, v, v_old, u) == "triton"
    values = row_values.values()
    inputs = [
        *constant_samples(None if kernels else dtype, v_old, u, v_ref),
        *(kernel_rows(*values) if kernels else constant_rows(v, dtype, *values)),
        *(clip_low, clip_high, beta, adv_clip, quadratic),
    ]
    if not kernels:
        return policy_loss_ref(v.flatten(1).to(dtype), *inputs)
    loss, rows_SR, flags_FR = _policy_loss_op(v.flatten(1).contiguous(), *inputs)
    policy_R, ratio_R, log_ratio_R, kl_R, *_ = rows_SR.unbind(0)
    return PolicyLoss(loss, policy_R, ratio_R, log_ratio_R, kl_R, *flags_FR.unbind(0))
