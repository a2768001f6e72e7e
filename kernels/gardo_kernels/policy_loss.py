"""Clipped policy-gradient loss with a gated KL term, for flow-matching policies.

With delta = v - v_old and u = (std / B) z, the sampler's noise in velocity units, row b has

    log_ratio = h B^2 [ 2 mean(u delta) - mean(delta^2) ]    (delta form: 0 on-policy)
    ratio     = exp(log_ratio)
    policy    = max(-A ratio, -A clamp(ratio, 1 - clip_low, 1 + clip_high))
    A         = clamp(advantage, +-adv_clip)
    kl        = kl_scale mean((v - v_ref)^2) where gate_b is not 0, else 0

    loss      = mean_b policy_b + beta sum_b gate_b kl_b / D
    D         = R ("batch") or max(number of gated rows, 1) ("gated")

h, B and kl_scale are read from each row's denoise step (`gardo.flow.transitions`). Means are over
the N elements of a sample, not sums, so clip ranges are 1e-4 to 1e-5. The difference of two
log-probabilities would subtract numbers of order 1 and keep 1e-7 of error, up to a hundredth of the
clip range; the delta form has nothing to cancel.

The gradient is two scalars a row times two differences:

    dL/dv = -(A ratio act) (2 h B^2) / (R N) (u - delta)
            + beta gate / D (2 kl_scale / N) (v - v_ref)

act = 0 where clipping is active (A > 0 and ratio > 1 + clip_high, or A < 0 and ratio < 1 -
clip_low), else 1.

Sources: Flow-GRPO, arXiv 2505.05470, eq. 5; the gate: GARDO, arXiv 2512.24138, eq. 7.

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

from gardo_kernels._gated_kl import (
    BLOCK,
    CHUNK,
    ROWS_AT_A_TIME,
    Reduction,
    check_kl_options,
    count_kl_rows,
    gate_and_scale,
    gated_kl_ref,
    kl_rows,
    sum_chunks,
)
from gardo_kernels._launch import (
    Backend,
    check_like,
    check_rows,
    check_samples,
    choose_backend,
    compute_dtype,
)


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """`loss` carries the gradient to v; everything else is detached and one value a row.

    loss [] fp32; loss_R the policy term; ratio_R and log_ratio_R against the sampling policy; kl_R
    before gate and beta, 0 in rows without a reference; clipped_high_R, clipped_low_R bool: rows
    whose gradient the clip has switched off.
    """

    loss: Tensor
    loss_R: Tensor
    ratio_R: Tensor
    log_ratio_R: Tensor
    kl_R: Tensor
    clipped_high_R: Tensor
    clipped_low_R: Tensor


def policy_loss_ref(
    v_RN: Tensor,
    v_old_RN: Tensor,
    u_RN: Tensor,
    *,
    advantage_R: Tensor,
    h_R: Tensor,
    B_R: Tensor,
    gate_R: Tensor,
    v_ref_RN: Tensor | None,
    kl_scale_R: Tensor,
    clip_low: float,
    clip_high: float,
    beta: float,
    reduction: Reduction,
    adv_clip: float,
) -> PolicyLoss:
    """The formula in plain torch, all tensors in one dtype; autograd gives the gradient."""
    advantage_R = advantage_R.clamp(-adv_clip, adv_clip)
    delta_RN = v_RN - v_old_RN
    log_ratio_R = h_R * B_R.square() * (2 * (u_RN * delta_RN).mean(1) - delta_RN.square().mean(1))
    ratio_R = log_ratio_R.exp()
    clamped_R = ratio_R.clamp(1 - clip_low, 1 + clip_high)
    policy_R = torch.maximum(-advantage_R * ratio_R, -advantage_R * clamped_R)
    loss = policy_R.mean()
    kl_R = torch.zeros_like(policy_R)
    if v_ref_RN is not None:
        kl, kl_R = gated_kl_ref(v_RN, v_ref_RN, gate_R, kl_scale_R, reduction)
        loss = loss + beta * kl
    return PolicyLoss(
        loss=loss,
        loss_R=policy_R.detach(),
        ratio_R=ratio_R.detach(),
        log_ratio_R=log_ratio_R.detach(),
        kl_R=kl_R.detach(),
        clipped_high_R=((advantage_R > 0) & (ratio_R > 1 + clip_high)).detach(),
        clipped_low_R=((advantage_R < 0) & (ratio_R < 1 - clip_low)).detach(),
    )


@torch.no_grad()
def policy_loss_grad_ref(
    v: Tensor,
    v_old: Tensor,
    u: Tensor,
    *,
    advantage: Tensor,
    h: Tensor,
    B: Tensor,
    gate: Tensor | None = None,
    v_ref: Tensor | None = None,
    kl_scale: Tensor | None = None,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    beta: float = 0.0,
    reduction: Reduction = "batch",
    adv_clip: float = 5.0,
) -> Tensor:
    """dL/dv in closed form: [R, ...] fp32, or fp64 for fp64 inputs. Arguments as `policy_loss`."""
    out = policy_loss(
        v,
        v_old,
        u,
        advantage=advantage,
        h=h,
        B=B,
        clip_low=clip_low,
        clip_high=clip_high,
        adv_clip=adv_clip,
        backend="torch",
    )
    dtype = compute_dtype(v, v_old, u)
    v_RN, v_old_RN, u_RN = (x.flatten(1).to(dtype) for x in (v, v_old, u))
    R, N = v_RN.shape
    act_R = (~(out.clipped_high_R | out.clipped_low_R)).to(dtype)
    policy_scale_R = advantage.to(dtype).clamp(-adv_clip, adv_clip) * out.ratio_R * act_R
    policy_scale_R = policy_scale_R * 2 * h.to(dtype) * B.to(dtype).square() / (R * N)
    grad_RN = -policy_scale_R[:, None] * (u_RN - (v_RN - v_old_RN))
    if v_ref is not None:
        gate_R, kl_scale_R = gate_and_scale(gate, kl_scale, v_RN)
        difference_RN = torch.where(gate_R[:, None] != 0, v_RN - v_ref.flatten(1).to(dtype), 0.0)
        kl_weight_R = beta * gate_R / kl_rows(gate_R, reduction) * 2 * kl_scale_R / N
        grad_RN = grad_RN + kl_weight_R[:, None] * difference_RN
    return grad_RN.view(v.shape)


# ---- kernels -------------------------------------------------------------------------------------

STATISTICS = 8  # policy, ratio, log-ratio, KL, clipped high, clipped low, and the two scalars


@triton.jit
def _policy_loss_sums_kernel(
    v_ptr, v_old_ptr, u_ptr, v_ref_ptr, gate_ptr, sums_ptr, elements, chunks,
    HAS_REF: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums[row, chunk] = sums of u delta, delta^2, (v - v_ref)^2 over a chunk of a row."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    gated = tl.zeros((BLOCK,), tl.float32) + tl.load(gate_ptr + row) != 0
    u_delta = tl.zeros((BLOCK,), tl.float32)
    delta_2 = tl.zeros((BLOCK,), tl.float32)
    error_2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        element = chunk * CHUNK + start + tl.arange(0, BLOCK)
        inside = element < elements
        at = row * elements + element
        v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
        delta = v - tl.load(v_old_ptr + at, mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
        u_delta += u * delta
        delta_2 += delta * delta
        if HAS_REF:  # rows of gate 0 are not read: what stands there does not matter
            v_ref = tl.load(v_ref_ptr + at, mask=inside & gated, other=0.0).to(tl.float32)
            error = tl.where(gated, v - v_ref, 0.0)
            error_2 += error * error
    at = sums_ptr + (row * chunks + chunk) * 3
    tl.store(at, tl.sum(u_delta))
    tl.store(at + 1, tl.sum(delta_2))
    tl.store(at + 2, tl.sum(error_2))


@triton.jit
def _exp(x):
    """exp with all digits near 0, where ratios are: there the GPU's own loses the last two bits."""
    series = 1.0 + x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24))))
    return tl.where(tl.abs(x) < 0.03, series, tl.exp(x))


@triton.jit
def _policy_loss_rows_kernel(
    sums_ptr, advantage_ptr, h_ptr, B_ptr, gate_ptr, kl_scale_ptr, rows_ptr, loss_ptr,
    rows, elements, chunks, clip_low, clip_high, beta, adv_clip,
    GATED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """rows[statistic, row] and the loss, by one program, in the order of chunks and rows."""
    kl_rows = count_kl_rows(gate_ptr, rows, GATED, ROWS)
    policy_sum, kl_sum = 0.0, 0.0
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        u_delta = sum_chunks(sums_ptr, row, inside, chunks, 0, 3)
        delta_2 = sum_chunks(sums_ptr, row, inside, chunks, 1, 3)
        error_2 = sum_chunks(sums_ptr, row, inside, chunks, 2, 3)
        advantage = tl.load(advantage_ptr + row, mask=inside, other=0.0)
        advantage = tl.minimum(tl.maximum(advantage, -adv_clip), adv_clip)
        B = tl.load(B_ptr + row, mask=inside, other=0.0)
        weight = tl.load(h_ptr + row, mask=inside, other=0.0) * B * B
        gate = tl.load(gate_ptr + row, mask=inside, other=0.0)
        kl_scale = tl.load(kl_scale_ptr + row, mask=inside, other=0.0)
        log_ratio = weight * (2.0 * (u_delta / elements) - delta_2 / elements)
        ratio = _exp(log_ratio)
        clamped = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
        policy = tl.maximum(-advantage * ratio, -advantage * clamped)
        high = (advantage > 0) & (ratio > 1.0 + clip_high)
        low = (advantage < 0) & (ratio < 1.0 - clip_low)
        kl = kl_scale * (error_2 / elements)
        policy_sum += tl.sum(tl.where(inside, policy, 0.0))
        kl_sum += tl.sum(gate * kl)
        moves = tl.where(high | low, 0.0, advantage * ratio)
        scale = 2.0 * weight / (rows * 1.0 * elements)
        kl_weight = beta * gate / kl_rows * 2.0 * kl_scale / elements
        at = rows_ptr + row
        tl.store(at, policy, mask=inside)
        tl.store(at + rows, ratio, mask=inside)
        tl.store(at + 2 * rows, log_ratio, mask=inside)
        tl.store(at + 3 * rows, kl, mask=inside)
        tl.store(at + 4 * rows, high.to(tl.float32), mask=inside)
        tl.store(at + 5 * rows, low.to(tl.float32), mask=inside)
        tl.store(at + 6 * rows, moves * scale, mask=inside)
        tl.store(at + 7 * rows, kl_weight, mask=inside)
    tl.store(loss_ptr, policy_sum / rows + beta * kl_sum / kl_rows)


@triton.jit
def _policy_loss_bwd_kernel(
    v_ptr, v_old_ptr, u_ptr, v_ref_ptr, rows_ptr, upstream_ptr, grad_ptr, rows, elements,
    HAS_REF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad = upstream (kl_weight (v - v_ref) - policy_weight (u - delta)), BLOCK of a row."""
    row = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    at = row * elements + element
    upstream = tl.load(upstream_ptr)
    policy_weight = upstream * tl.load(rows_ptr + 6 * rows + row)
    kl_weight = upstream * tl.load(rows_ptr + 7 * rows + row)
    v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
    delta = v - tl.load(v_old_ptr + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = -policy_weight * (u - delta)
    if HAS_REF:
        gated = tl.zeros((BLOCK,), tl.float32) + kl_weight != 0
        v_ref = tl.load(v_ref_ptr + at, mask=inside & gated, other=0.0).to(tl.float32)
        grad += tl.where(gated, kl_weight * (v - v_ref), 0.0)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


# ---- ops -----------------------------------------------------------------------------------------


@torch.library.custom_op("gardo::policy_loss", mutates_args=())
def _policy_loss_op(
    v_RN: Tensor,
    v_old_RN: Tensor,
    u_RN: Tensor,
    v_ref_RN: Tensor | None,
    advantage_R: Tensor,
    h_R: Tensor,
    B_R: Tensor,
    gate_R: Tensor,
    kl_scale_R: Tensor,
    clip_low: float,
    clip_high: float,
    beta: float,
    gated: bool,
    adv_clip: float,
) -> tuple[Tensor, Tensor]:
    """The loss [] and the rows [STATISTICS, R], fp32; rows contiguous, row values fp32."""
    R, N = v_RN.shape
    chunks = triton.cdiv(N, CHUNK)
    sums_RC3 = v_RN.new_empty(R, chunks, 3, dtype=torch.float32)
    rows_SR = v_RN.new_empty(STATISTICS, R, dtype=torch.float32)
    loss = v_RN.new_empty((), dtype=torch.float32)
    _policy_loss_sums_kernel[(chunks, R)](
        v_RN, v_old_RN, u_RN, v_ref_RN, gate_R, sums_RC3, N, chunks,
        HAS_REF=v_ref_RN is not None, CHUNK=CHUNK, BLOCK=BLOCK,
    )  # fmt: skip
    _policy_loss_rows_kernel[(1,)](
        sums_RC3, advantage_R, h_R, B_R, gate_R, kl_scale_R, rows_SR, loss, R, N, chunks,
        clip_low, clip_high, beta if v_ref_RN is not None else 0.0, adv_clip,
        GATED=gated, ROWS=ROWS_AT_A_TIME,
    )  # fmt: skip
    return loss, rows_SR


@torch.library.custom_op("gardo::policy_loss_grad", mutates_args=())
def _policy_loss_grad_op(
    v_RN: Tensor,
    v_old_RN: Tensor,
    u_RN: Tensor,
    v_ref_RN: Tensor | None,
    rows_SR: Tensor,
    upstream: Tensor,
) -> Tensor:
    """dL/dv [R, N] in the dtype of v."""
    R, N = v_RN.shape
    grad_RN = torch.empty_like(v_RN)
    _policy_loss_bwd_kernel[(triton.cdiv(N, BLOCK), R)](
        v_RN, v_old_RN, u_RN, v_ref_RN, rows_SR, upstream, grad_RN, R, N,
        HAS_REF=v_ref_RN is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return grad_RN


@_policy_loss_op.register_fake
def _(v_RN: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows_SR = v_RN.new_empty(STATISTICS, v_RN.shape[0], dtype=torch.float32)
    return v_RN.new_empty((), dtype=torch.float32), rows_SR


@_policy_loss_grad_op.register_fake
def _(v_RN: Tensor, *_: object) -> Tensor:
    return torch.empty_like(v_RN)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, upstream, _rows):  # type: ignore[no-untyped-def]
    v_RN, v_old_RN, u_RN, v_ref_RN, rows_SR = ctx.saved_tensors
    grad_RN = _policy_loss_grad_op(v_RN, v_old_RN, u_RN, v_ref_RN, rows_SR, upstream.float())
    return grad_RN, *[None] * 13


_policy_loss_op.register_autograd(_backward, setup_context=_keep)


def _policy_loss_triton(
    v: Tensor,
    v_old: Tensor,
    u: Tensor,
    v_ref: Tensor | None,
    row_values: tuple[Tensor, ...],
    options: tuple[float, float, float, bool, float],
) -> PolicyLoss:
    """The kernels on inputs of any layout: what is not contiguous is copied."""
    others = (None if t is None else t.detach().flatten(1).contiguous() for t in (v_old, u, v_ref))
    values = (t.detach().float().contiguous() for t in row_values)
    loss, rows_SR = _policy_loss_op(v.flatten(1).contiguous(), *others, *values, *options)
    policy_R, ratio_R, log_ratio_R, kl_R, high_R, low_R, *_ = rows_SR.unbind(0)
    return PolicyLoss(loss, policy_R, ratio_R, log_ratio_R, kl_R, high_R != 0, low_R != 0)


def policy_loss(
    v: Tensor,
    v_old: Tensor,
    u: Tensor,
    *,
    advantage: Tensor,
    h: Tensor,
    B: Tensor,
    gate: Tensor | None = None,
    v_ref: Tensor | None = None,
    kl_scale: Tensor | None = None,
    clip_low: float = 1e-4,
    clip_high: float = 1e-4,
    beta: float = 0.0,
    reduction: Reduction = "batch",
    adv_clip: float = 5.0,
    backend: Backend = "auto",
) -> PolicyLoss:
    """Loss of a micro-batch with a gradient to v, and the statistics of each row.

    v, v_old, u, v_ref: [R, ...] of equal shape, any floating dtype. v is the trained velocity,
    v_old the sampling one, u = u_scale z. advantage, h, B, kl_scale: [R]; kl_scale None means 1 (a
    squared velocity error). gate: [R] bool or weight, None means every row; rows of gate 0 need no
    reference, whatever v_ref holds there. v_ref None leaves the KL out, which is right for a
    micro-batch without gated rows. Only v receives a gradient.

    Arithmetic and results are fp32 (fp64 where v, v_old or u is fp64); velocities and advantages
    without unit, KL in nats a mean element.

    ValueError for shapes, dtypes or devices that do not fit, for negative clip ranges or beta, an
    unknown reduction, and for beta > 0 with neither v_ref nor a gate: a KL to every row was asked
    for and has no reference. Sources: Flow-GRPO, arXiv 2505.05470, eq. 5; GARDO, arXiv 2512.24138,
    eq. 7.
    """
    op = "policy_loss"
    check_samples(op, "v", v)
    for name, tensor in (("v_old", v_old), ("u", u), ("v_ref", v_ref)):
        if tensor is not None:
            check_like(op, name, tensor, "v", v)
    for name, tensor in (
        ("advantage", advantage),
        ("h", h),
        ("B", B),
        ("gate", gate),
        ("kl_scale", kl_scale),
    ):
        if tensor is not None:
            check_rows(op, name, tensor, "v", v)
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high), ("adv_clip", adv_clip)):
        if not value >= 0:
            raise ValueError(f"{op}: {name} is {value}; it must not be negative")
    check_kl_options(op, beta, reduction, gate, v_ref)
    dtype = compute_dtype(v, v_old, u)
    if choose_backend(op, backend, v, v_old, u) == "triton":
        gate_R, kl_scale_R = gate_and_scale(gate, kl_scale, v.flatten(1).float()[:, :1])
        return _policy_loss_triton(
            v, v_old, u, v_ref, (advantage, h, B, gate_R, kl_scale_R),
            (clip_low, clip_high, beta, reduction == "gated", adv_clip),
        )  # fmt: skip
    v_RN = v.flatten(1).to(dtype)
    gate_R, kl_scale_R = gate_and_scale(gate, kl_scale, v_RN)
    return policy_loss_ref(
        v_RN,
        v_old.detach().flatten(1).to(dtype),
        u.detach().flatten(1).to(dtype),
        advantage_R=advantage.detach().to(dtype),
        h_R=h.detach().to(dtype),
        B_R=B.detach().to(dtype),
        gate_R=gate_R,
        v_ref_RN=None if v_ref is None else v_ref.detach().flatten(1).to(dtype),
        kl_scale_R=kl_scale_R,
        clip_low=clip_low,
        clip_high=clip_high,
        beta=beta,
        reduction=reduction,
        adv_clip=adv_clip,
    )
