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

Two launches. Forward: every program stores partial sums of a chunk of a row and draws a ticket; who
draws the last one adds them in a fixed order and makes every row's statistics, the loss and the
gradient's two scalars. Backward: the gradient. The ticket is the one atomic, an integer; no
floating-point atomics, no host synchronisation, the same bits every time. Nothing is kept for the
backward pass but the inputs and the rows.

Shapes: R rows, N elements (any dimensions after the first).
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels import _row_loss as shared
from gardo_kernels._examples import Examples, On, with_gradient
from gardo_kernels._launch import Backend, block_and_row


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
    term_R, clipped_high_R, clipped_low_R = shared.clipped_term_ref(
        advantage_R, log_ratio_R, ratio_R, clip_low, clip_high
    )
    policy_R = weight_R * term_R
    kl, kl_R = shared.gated_kl_ref(v_RN, v_ref_RN, gate_R, kl_scale_R)
    return PolicyLoss(
        loss=policy_R.mean() + beta * kl,
        loss_R=policy_R.detach(),
        ratio_R=ratio_R.detach(),
        log_ratio_R=log_ratio_R.detach(),
        kl_R=kl_R.detach(),
        clipped_high_R=clipped_high_R,
        clipped_low_R=clipped_low_R,
    )


# ---- kernels -------------------------------------------------------------------------------------

# rows[statistic, row]: what is reported, in the order of PolicyLoss; the gradient's two scalars
POLICY, RATIO, LOG_RATIO, KL = (tl.constexpr(i) for i in range(4))
POLICY_WEIGHT, KL_WEIGHT = (tl.constexpr(i) for i in range(4, 6))
REPORTED, STATISTICS, FLAGS = 4, 6, 2  # flags: clipped high, clipped low
# sums[sum, chunk, row]
GAIN, ERROR_2 = (tl.constexpr(i) for i in range(2))
SUMS = tl.constexpr(2)


@triton.jit
def _policy_loss_fwd_kernel(
    v_ptr, v_old_ptr, u_ptr, v_ref_ptr, advantage_ptr, h_ptr, B_ptr, weight_ptr, gate_ptr,
    kl_scale_ptr, sums_ptr, ticket_ptr, rows_ptr, flags_ptr, loss_ptr, rows, elements, chunks,
    log_low, log_high, clip_low, clip_high, beta, adv_clip, QUADRATIC: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, ROWS_AT_A_TIME: tl.constexpr,
    CHUNKS_AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """sums[:, chunk, row] = a chunk's sums of delta (2 u - q delta) and (v - v_ref)^2; the last
    program goes on to the rows."""
    chunk, row = block_and_row(elements, CHUNK)
    gated = shared.is_gated(gate_ptr, row, BLOCK)
    gain = tl.zeros((BLOCK,), tl.float32)
    error_2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        at, inside = shared.elements_at(row, chunk * CHUNK + start, elements, BLOCK)
        v = shared.load_fp32(v_ptr, at, inside)
        delta = v - shared.load_fp32(v_old_ptr, at, inside)
        pull = 2.0 * shared.load_fp32(u_ptr, at, inside)
        if QUADRATIC:
            pull -= delta
        gain += pull * delta
        if v_ref_ptr is not None:
            error = shared.error_where(v, v_ref_ptr, at, inside & gated)
            error_2 += error * error
    here = sums_ptr + chunk * rows + row
    tl.store(here + chunks * rows * GAIN, tl.sum(gain))
    tl.store(here + chunks * rows * ERROR_2, tl.sum(error_2))
    if shared.is_last(ticket_ptr):
        _policy_loss_rows(
            advantage_ptr, h_ptr, B_ptr, weight_ptr, gate_ptr, kl_scale_ptr, sums_ptr, rows_ptr,
            flags_ptr, loss_ptr, rows, elements, chunks, log_low, log_high, clip_low, clip_high,
            beta, adv_clip, ROWS_AT_A_TIME, CHUNKS_AT_A_TIME,
        )  # fmt: skip


@triton.jit
def _policy_loss_rows(
    advantage_ptr, h_ptr, B_ptr, weight_ptr, gate_ptr, kl_scale_ptr, sums_ptr, rows_ptr, flags_ptr,
    loss_ptr, rows, elements, chunks, log_low, log_high, clip_low, clip_high, beta, adv_clip,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """rows[statistic, row] and the loss, by one program, in the order of chunks and rows."""
    policy_sum, kl_sum = 0.0, 0.0
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        advantage = shared.load_rows(advantage_ptr, row, inside)
        advantage = shared.clamp(advantage, -adv_clip, adv_clip)
        B = shared.load_rows(B_ptr, row, inside)
        strength = shared.load_rows(h_ptr, row, inside) * B * B
        weight = shared.load_rows(weight_ptr, row, inside)
        gate = shared.load_rows(gate_ptr, row, inside)
        kl_scale = shared.load_rows(kl_scale_ptr, row, inside)
        gain, error_2 = shared.row_means(sums_ptr, row, rows, elements, chunks, SUMS, CHUNKS)
        log_ratio = strength * gain
        ratio = shared.exp_near_0(log_ratio)
        term, clipped_high, clipped_low = shared.clipped_term(
            advantage, log_ratio, ratio, log_low, log_high, clip_low, clip_high
        )
        policy = weight * term
        kl = kl_scale * error_2
        policy_sum += tl.sum(policy)  # rows outside weigh 0
        kl_sum += tl.sum(gate * kl)
        moves = weight * advantage * tl.where(clipped_high | clipped_low, 0.0, ratio)
        scale = 2.0 / (rows * 1.0 * elements)
        here = rows_ptr + row
        tl.store(here + rows * POLICY, policy, mask=inside)
        tl.store(here + rows * RATIO, ratio, mask=inside)
        tl.store(here + rows * LOG_RATIO, log_ratio, mask=inside)
        tl.store(here + rows * KL, kl, mask=inside)
        tl.store(here + rows * POLICY_WEIGHT, moves * (strength * scale), mask=inside)
        tl.store(here + rows * KL_WEIGHT, beta * gate * (kl_scale * scale), mask=inside)
        tl.store(flags_ptr + row, clipped_high, mask=inside)
        tl.store(flags_ptr + rows + row, clipped_low, mask=inside)
    tl.store(loss_ptr, policy_sum / rows + beta * kl_sum / rows)


@triton.jit
def _policy_loss_bwd_kernel(
    v_ptr, v_old_ptr, u_ptr, v_ref_ptr, rows_ptr, upstream_ptr, grad_ptr, rows, elements,
    QUADRATIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad = upstream (kl_weight (v - v_ref) - policy_weight (u - q delta)), BLOCK of a row."""
    row, at, inside = shared.elements_of(elements, BLOCK)
    upstream = tl.load(upstream_ptr)
    policy_weight = upstream * tl.load(rows_ptr + rows * POLICY_WEIGHT + row)
    kl_weight = upstream * tl.load(rows_ptr + rows * KL_WEIGHT + row)
    v = shared.load_fp32(v_ptr, at, inside)
    direction = shared.load_fp32(u_ptr, at, inside)
    if QUADRATIC:
        direction -= v - shared.load_fp32(v_old_ptr, at, inside)
    grad = -policy_weight * direction
    if v_ref_ptr is not None:
        kl = tl.load(rows_ptr + rows * KL + row)
        grad += shared.kl_pull(v, v_ref_ptr, kl_weight, kl, at, inside, BLOCK)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


# ---- op ------------------------------------------------------------------------------------------


def _launch_loss(
    v_RN: Tensor, v_old_RN: Tensor, u_RN: Tensor, v_ref_RN: Tensor | None,
    advantage_R: Tensor, h_R: Tensor, B_R: Tensor, weight_R: Tensor | None,
    gate_R: Tensor | None, kl_scale_R: Tensor | None, clip_low: float, clip_high: float,
    beta: float, adv_clip: float, quadratic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss [] and the rows [STATISTICS, R], fp32, and flags; all inputs contiguous."""
    log_low, log_high = shared.log_bounds(clip_low, clip_high)
    return shared.launch_loss(
        "policy_loss", _policy_loss_fwd_kernel, v_RN,
        shared.empty_results(v_RN, STATISTICS, FLAGS), SUMS.value, v_old_ptr=v_old_RN, u_ptr=u_RN,
        v_ref_ptr=v_ref_RN, advantage_ptr=advantage_R, h_ptr=h_R, B_ptr=B_R, weight_ptr=weight_R,
        gate_ptr=gate_R, kl_scale_ptr=kl_scale_R, log_low=log_low, log_high=log_high,
        clip_low=clip_low, clip_high=clip_high, beta=beta if v_ref_RN is not None else 0.0,
        adv_clip=adv_clip, QUADRATIC=quadratic,
    )  # fmt: skip


def _launch_gradient(
    v_RN: Tensor, v_old_RN: Tensor, u_RN: Tensor, v_ref_RN: Tensor | None,
    rows_SR: Tensor, upstream: Tensor, quadratic: bool,
) -> Tensor:  # fmt: skip
    """dL/dv [R, N] in the dtype of v."""
    return shared.launch_gradient(
        "policy_loss", _policy_loss_bwd_kernel, v_RN, rows_SR, upstream, v_old_ptr=v_old_RN,
        u_ptr=u_RN, v_ref_ptr=v_ref_RN, QUADRATIC=quadratic,
    )  # fmt: skip


_policy_loss = shared.RowLoss(
    "policy_loss", _launch_loss, _launch_gradient, statistics=STATISTICS, flags=FLAGS, tensors=4,
    constants=1,
)  # fmt: skip


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
    op, samples = "policy_loss", {"v_old": v_old, "u": u, "v_ref": v_ref}
    row_values = {
        "advantage": advantage, "h": h, "B": B, "weight": weight, "gate": gate, "kl_scale": kl_scale
    }  # fmt: skip
    shared.check_tensors(op, v, samples, row_values)
    shared.check_not_negative(op, clip_low=clip_low, clip_high=clip_high, adv_clip=adv_clip)
    shared.check_kl(op, beta, gate, v_ref)
    kernels, inputs = shared.prepared(
        op, backend, (v, v_old, u), samples.values(), row_values.values()
    )
    inputs += (clip_low, clip_high, beta, adv_clip, quadratic)
    if not kernels:
        return policy_loss_ref(*inputs)
    loss, rows_SR, flags_FR = _policy_loss(*inputs)
    return PolicyLoss(loss, *rows_SR.unbind(0)[:REPORTED], *flags_FR.unbind(0))


def examples(on: On) -> Examples:
    """With everything, and with what may be left out left out; see `_examples.py`."""
    v_old, moved, u, v_ref = on.samples(4)
    rows = on.row_values(0.5, 1.5)
    for name, optional in (("", rows), ("plain", None)):
        v = (v_old + 0.1 * moved).requires_grad_()
        out = policy_loss(
            v, v_old, u, advantage=rows - 1, h=rows, B=-rows, weight=optional, gate=rows > 1,
            v_ref=v_ref, kl_scale=optional, beta=0.1, backend=on.backend,
        )  # fmt: skip
        yield name, with_gradient(out, v)
