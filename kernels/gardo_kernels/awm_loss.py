"""AWM's loss: the flow-matching error of fresh noise as a likelihood, clipped, with a gated KL.

For row b of R, freshly noised, target = noise - x0, the same for the trained and the old velocity,

    l       = mean((v - target)^2)                 l_old the same of v_old
    log p   = -w c(l),    c(l) = ((l + 1e-10)^p - 1e-10^p) / p
    ratio   = exp(log p - log p_old)
    policy  = max(-A ratio, -A clamp(ratio, 1 - clip_low, 1 + clip_high))
    A       = clamp(advantage, +-adv_clip)
    kl      = mean((v - v_ref)^2) where gate_b is not 0, else 0
    ema     = mean((v - v_ema)^2)

    loss    = mean_b (policy_b + beta gate_b kl_b + ema_beta ema_b)

The transforms are rows of one table: p = 1, where c(l) = l, with w = 1, t or t^2 ("uniform", "t",
"t2"); p = 1/2 with w = t / 2 ("huber": w c(l) = t (sqrt(l + 1e-10) - 1e-5)); any p with w = t
("ghuber", AWM takes 1/4).

Subtracting two errors of order 1 would keep 1e-7 of error. With u = target - v_old and
delta = v - v_old the difference is the delta form of `policy_loss`,

    gain = l_old - l = 2 mean(u delta) - mean(delta^2),

exactly 0 for equal velocities, and log p - log p_old = w gain where p = 1. Else, with x = -gain /
(l_old + 1e-10), nothing cancels in

    log p - log p_old = -w (l_old + 1e-10)^p expm1(p log1p(x)) / p.

The gradient has a scalar a row for each difference, and does not need v_old:

    dL/dv = (A ratio act) w (l + 1e-10)^(p - 1) (2 / (R N)) (v - target)
            + beta gate (2 / (R N)) (v - v_ref) + ema_beta (2 / (R N)) (v - v_ema)

act as in `policy_loss`. Source: AWM, arXiv 2509.25050, and its released code; the gate: GARDO,
arXiv 2512.24138.

Least traffic: v, v_old, target, v_ema, and v_ref of gated rows for the row sums; for the gradient
the same without v_old, and the gradient written. Called once for each micro-batch by
`gardo.algorithms`. Two launches as in `policy_loss`.

Shapes: R rows, N elements (any dimensions after the first).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels import _row_loss as shared
from gardo_kernels._examples import Examples, On, with_gradient
from gardo_kernels._launch import Backend, block_and_row, compute_dtype

EPSILON = tl.constexpr(1e-10)

TRANSFORMS: dict[str, tuple[Callable[[Tensor], Tensor | None], float | None]] = {  # w(t); p
    "uniform": (lambda t: None, 1.0),  # None: 1 for every row
    "t": (lambda t: t, 1.0),
    "t2": (torch.square, 1.0),
    "huber": (lambda t: t / 2, 0.5),
    "ghuber": (lambda t: t, None),  # None: the argument `power`
}


@dataclass(frozen=True, eq=False)
class AwmLoss:
    """`loss` carries the gradient to v; everything else is detached and one value a row.

    loss [] fp32; loss_R the policy term; ratio_R and log_ratio_R against the old velocity; kl_R
    before gate and beta, 0 in rows without a reference; ema_R before ema_beta, 0 without v_ema;
    clipped_high_R, clipped_low_R bool: rows whose gradient the clip has switched off.
    """

    loss: Tensor
    loss_R: Tensor
    ratio_R: Tensor
    log_ratio_R: Tensor
    kl_R: Tensor
    ema_R: Tensor
    clipped_high_R: Tensor
    clipped_low_R: Tensor


def _curved_gain_ref(gain_R: Tensor, l_R: Tensor, l_old_R: Tensor, power: float) -> Tensor:
    """c(l_old) - c(l) from gain = l_old - l, which keeps its digits where l is near l_old."""
    base_R = l_old_R + EPSILON.value
    near_R = gain_R.abs() < base_R / 4
    near_log_R = torch.log1p(torch.where(near_R, -gain_R / base_R, 0.0))
    log_R = torch.where(near_R, near_log_R, ((l_R + EPSILON.value) / base_R).log())
    return -base_R.pow(power) * torch.expm1(power * log_R) / power


def awm_loss_ref(
    v_RN: Tensor, target_RN: Tensor, v_ref_RN: Tensor | None, v_ema_RN: Tensor | None,
    v_old_RN: Tensor, advantage_R: Tensor, w_R: Tensor, gate_R: Tensor, power: float,
    clip_low: float, clip_high: float, beta: float, ema_beta: float, adv_clip: float,
) -> AwmLoss:  # fmt: skip
    """The formula in plain torch, all tensors in one dtype; autograd gives the gradient."""
    advantage_R = advantage_R.clamp(-adv_clip, adv_clip)
    delta_RN, u_RN = v_RN - v_old_RN, target_RN - v_old_RN
    gain_R = 2 * (u_RN * delta_RN).mean(1) - delta_RN.square().mean(1)
    if power != 1:
        l_R, l_old_R = (v_RN - target_RN).square().mean(1), u_RN.square().mean(1)
        gain_R = _curved_gain_ref(gain_R, l_R, l_old_R, power)
    log_ratio_R = w_R * gain_R
    ratio_R = log_ratio_R.exp()
    policy_R, clipped_high_R, clipped_low_R = shared.clipped_term_ref(
        advantage_R, log_ratio_R, ratio_R, clip_low, clip_high
    )
    kl, kl_R = shared.gated_kl_ref(v_RN, v_ref_RN, gate_R, torch.ones_like(gate_R))
    ema_R = torch.zeros_like(policy_R)
    if v_ema_RN is not None:
        ema_R = (v_RN - v_ema_RN).square().mean(1)
    return AwmLoss(
        loss=policy_R.mean() + beta * kl + ema_beta * ema_R.mean(),
        loss_R=policy_R.detach(),
        ratio_R=ratio_R.detach(),
        log_ratio_R=log_ratio_R.detach(),
        kl_R=kl_R.detach(),
        ema_R=ema_R.detach(),
        clipped_high_R=clipped_high_R,
        clipped_low_R=clipped_low_R,
    )


# ---- kernels -------------------------------------------------------------------------------------

# rows[statistic, row]: what is reported, in the order of AwmLoss; the gradient's three scalars
POLICY, RATIO, LOG_RATIO, KL, EMA = (tl.constexpr(i) for i in range(5))
POLICY_WEIGHT, KL_WEIGHT, EMA_WEIGHT = (tl.constexpr(i) for i in range(5, 8))
REPORTED, STATISTICS, FLAGS = 5, 8, 2  # flags: clipped high, clipped low
# sums[sum, chunk, row]: squares, but for the gain; the last two where p is not 1
GAIN, REFERENCE_2, EMA_2, U_2, ERROR_2 = (tl.constexpr(i) for i in range(5))
SUMS, CURVED_SUMS = tl.constexpr(3), tl.constexpr(5)


@triton.jit
def _awm_loss_fwd_kernel(
    v_ptr, target_ptr, v_ref_ptr, v_ema_ptr, v_old_ptr, advantage_ptr, w_ptr, gate_ptr, sums_ptr,
    ticket_ptr, rows_ptr, flags_ptr, loss_ptr, rows, elements, chunks, power, log_low, log_high,
    clip_low, clip_high, beta, ema_beta, adv_clip, CURVED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr, ROWS_AT_A_TIME: tl.constexpr, CHUNKS_AT_A_TIME: tl.constexpr,
):  # fmt: skip
    """sums[:, chunk, row] = sums of delta (2 u - delta), (v - v_ref)^2, (v - v_ema)^2.

    For p not 1 also those of l_old and l: u^2, (v - target)^2. The last program goes on to the
    rows.
    """
    chunk, row = block_and_row(elements, CHUNK)
    gated = shared.is_gated(gate_ptr, row, BLOCK)
    gain = tl.zeros((BLOCK,), tl.float32)
    reference_2 = tl.zeros((BLOCK,), tl.float32)
    ema_2 = tl.zeros((BLOCK,), tl.float32)
    u_2 = tl.zeros((BLOCK,), tl.float32)
    error_2 = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        at, inside = shared.elements_at(row, chunk * CHUNK + start, elements, BLOCK)
        v = shared.load_fp32(v_ptr, at, inside)
        v_old = shared.load_fp32(v_old_ptr, at, inside)
        target = shared.load_fp32(target_ptr, at, inside)
        delta, u = v - v_old, target - v_old
        gain += delta * (2.0 * u - delta)
        if CURVED:
            u_2 += u * u
            error_2 += (v - target) * (v - target)
        if v_ref_ptr is not None:
            reference = shared.error_where(v, v_ref_ptr, at, inside & gated)
            reference_2 += reference * reference
        if v_ema_ptr is not None:
            ema = v - shared.load_fp32(v_ema_ptr, at, inside)
            ema_2 += ema * ema
    here = sums_ptr + chunk * rows + row
    tl.store(here + chunks * rows * GAIN, tl.sum(gain))
    tl.store(here + chunks * rows * REFERENCE_2, tl.sum(reference_2))
    tl.store(here + chunks * rows * EMA_2, tl.sum(ema_2))
    if CURVED:
        tl.store(here + chunks * rows * U_2, tl.sum(u_2))
        tl.store(here + chunks * rows * ERROR_2, tl.sum(error_2))
    if shared.is_last(ticket_ptr):
        _awm_loss_rows(
            advantage_ptr, w_ptr, gate_ptr, sums_ptr, rows_ptr, flags_ptr, loss_ptr, rows, elements,
            chunks, power, log_low, log_high, clip_low, clip_high, beta, ema_beta, adv_clip, CURVED,
            ROWS_AT_A_TIME, CHUNKS_AT_A_TIME,
        )  # fmt: skip


@triton.jit
def _curved_gain(gain, l, l_old, power):
    """`_curved_gain_ref`; series where log and exp - 1 would cancel (their next terms: 2^-24)."""
    base = l_old + EPSILON
    x = -gain / base
    z = x / (2.0 + x)
    z_2 = z * z
    near = 2.0 * z * (1.0 + z_2 * (1.0 / 3 + z_2 * (1.0 / 5 + z_2 * (1.0 / 7))))
    y = power * tl.where(tl.abs(x) < 0.25, near, tl.log((l + EPSILON) / base))
    near = y * (1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6)))))
    expm1 = tl.where(tl.abs(y) < 0.25, near, tl.exp(y) - 1.0)
    return -tl.exp(power * tl.log(base)) * expm1 / power


@triton.jit
def _awm_loss_rows(
    advantage_ptr, w_ptr, gate_ptr, sums_ptr, rows_ptr, flags_ptr, loss_ptr, rows, elements, chunks,
    power, log_low, log_high, clip_low, clip_high, beta, ema_beta, adv_clip,
    CURVED: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """rows[statistic, row] and the loss, by one program, in the order of chunks and rows."""
    policy_sum, kl_sum, ema_sum = 0.0, 0.0, 0.0
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        advantage = shared.load_rows(advantage_ptr, row, inside)
        advantage = shared.clamp(advantage, -adv_clip, adv_clip)
        w = shared.load_rows(w_ptr, row, inside)
        gate = shared.load_rows(gate_ptr, row, inside)
        means = shared.row_means(
            sums_ptr, row, rows, elements, chunks, CURVED_SUMS if CURVED else SUMS, CHUNKS
        )
        gain, kl, ema = means[GAIN], means[REFERENCE_2], means[EMA_2]
        if CURVED:
            l_old, l = means[U_2], means[ERROR_2]
            gain = _curved_gain(gain, l, l_old, power)
            curve = tl.exp((power - 1.0) * tl.log(l + EPSILON))
        else:
            curve = 1.0
        log_ratio = w * gain
        ratio = shared.exp_near_0(log_ratio)
        policy, clipped_high, clipped_low = shared.clipped_term(
            advantage, log_ratio, ratio, log_low, log_high, clip_low, clip_high
        )
        policy_sum += tl.sum(policy)  # rows outside have no advantage
        kl_sum += tl.sum(gate * kl)
        ema_sum += tl.sum(ema)
        moves = advantage * tl.where(clipped_high | clipped_low, 0.0, ratio)
        scale = 2.0 / (rows * 1.0 * elements)
        here = rows_ptr + row
        tl.store(here + rows * POLICY, policy, mask=inside)
        tl.store(here + rows * RATIO, ratio, mask=inside)
        tl.store(here + rows * LOG_RATIO, log_ratio, mask=inside)
        tl.store(here + rows * KL, kl, mask=inside)
        tl.store(here + rows * EMA, ema, mask=inside)
        tl.store(here + rows * POLICY_WEIGHT, moves * w * curve * scale, mask=inside)
        tl.store(here + rows * KL_WEIGHT, beta * gate * scale, mask=inside)
        tl.store(here + rows * EMA_WEIGHT, ema_beta * scale, mask=inside)
        tl.store(flags_ptr + row, clipped_high, mask=inside)
        tl.store(flags_ptr + rows + row, clipped_low, mask=inside)
    tl.store(loss_ptr, policy_sum / rows + beta * kl_sum / rows + ema_beta * ema_sum / rows)


@triton.jit
def _awm_loss_bwd_kernel(
    v_ptr, target_ptr, v_ref_ptr, v_ema_ptr, rows_ptr, upstream_ptr, grad_ptr, rows, elements,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """grad = upstream (sum over target, reference, EMA of weight (v - it)), BLOCK of a row."""
    row, at, inside = shared.elements_of(elements, BLOCK)
    upstream = tl.load(upstream_ptr)
    policy_weight = upstream * tl.load(rows_ptr + rows * POLICY_WEIGHT + row)
    v = shared.load_fp32(v_ptr, at, inside)
    grad = policy_weight * (v - shared.load_fp32(target_ptr, at, inside))
    if v_ref_ptr is not None:
        kl_weight = upstream * tl.load(rows_ptr + rows * KL_WEIGHT + row)
        kl = tl.load(rows_ptr + rows * KL + row)
        grad += shared.kl_pull(v, v_ref_ptr, kl_weight, kl, at, inside, BLOCK)
    if v_ema_ptr is not None:
        ema_weight = upstream * tl.load(rows_ptr + rows * EMA_WEIGHT + row)
        grad += ema_weight * (v - shared.load_fp32(v_ema_ptr, at, inside))
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


# ---- op ------------------------------------------------------------------------------------------


def _launch_loss(
    v_RN: Tensor, target_RN: Tensor, v_ref_RN: Tensor | None, v_ema_RN: Tensor | None,
    v_old_RN: Tensor, advantage_R: Tensor, w_R: Tensor | None, gate_R: Tensor | None,
    power: float, clip_low: float, clip_high: float, beta: float, ema_beta: float, adv_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss [] and the rows [STATISTICS, R], fp32, and flags; all inputs contiguous."""
    log_low, log_high = shared.log_bounds(clip_low, clip_high)
    return shared.launch_loss(
        "awm_loss", _awm_loss_fwd_kernel, v_RN, shared.empty_results(v_RN, STATISTICS, FLAGS),
        (CURVED_SUMS if power != 1 else SUMS).value, target_ptr=target_RN, v_ref_ptr=v_ref_RN,
        v_ema_ptr=v_ema_RN, v_old_ptr=v_old_RN, advantage_ptr=advantage_R, w_ptr=w_R,
        gate_ptr=gate_R, power=power, log_low=log_low, log_high=log_high, clip_low=clip_low,
        clip_high=clip_high, beta=beta if v_ref_RN is not None else 0.0, ema_beta=ema_beta,
        adv_clip=adv_clip, CURVED=power != 1,
    )  # fmt: skip


def _launch_gradient(
    v_RN: Tensor, target_RN: Tensor, v_ref_RN: Tensor | None, v_ema_RN: Tensor | None,
    rows_SR: Tensor, upstream: Tensor,
) -> Tensor:  # fmt: skip
    """dL/dv [R, N] in the dtype of v."""
    return shared.launch_gradient(
        "awm_loss", _awm_loss_bwd_kernel, v_RN, rows_SR, upstream, target_ptr=target_RN,
        v_ref_ptr=v_ref_RN, v_ema_ptr=v_ema_RN,
    )  # fmt: skip


_awm_loss = shared.RowLoss(
    "awm_loss", _launch_loss, _launch_gradient, statistics=STATISTICS, flags=FLAGS, tensors=4
)


def awm_loss(
    v: Tensor,
    v_old: Tensor,
    target: Tensor,
    *,
    advantage: Tensor,
    t: Tensor,
    transform: str = "uniform",
    power: float = 0.25,
    gate: Tensor | None = None,
    v_ref: Tensor | None = None,
    beta: float = 0.0,
    v_ema: Tensor | None = None,
    ema_beta: float = 0.0,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    adv_clip: float = 5.0,
    backend: Backend = "auto",
) -> AwmLoss:
    """Loss of a micro-batch with a gradient to v, and the statistics of each row.

    v, v_old, target, v_ref, v_ema: [R, ...] of equal shape, any floating dtypes. v is the trained
    velocity at the noised sample and v_old the one of before this iteration's updates; on the first
    of them it may be v, detached: every ratio is then 1. target = noise - x0. advantage, t: [R], t
    the noising time in [0, 1]. transform: a key of TRANSFORMS; power is p of "ghuber" alone. gate:
    [R] bool or the weight of each row's KL, None means 1 for every row; rows of gate 0 need no
    reference, whatever v_ref holds there. The KL is averaged over all R rows: a mean over other
    rows is asked for by weights. v_ref None leaves the KL out, which is right for a micro-batch
    without gated rows. v_ema is a velocity to stay near in every row. Only v receives a gradient.

    Arithmetic and results are fp32 (fp64 where v, v_old or target is fp64). The advantage is used
    as it is, up to the clamp: AWM divides it by 5 before.

    ValueError for shapes, dtypes or devices that do not fit, for negative clip ranges or betas,
    power not positive, an unknown transform, beta > 0 with neither v_ref nor a gate, and ema_beta >
    0 without v_ema. Source: arXiv 2509.25050.
    """
    op, samples = "awm_loss", {"target": target, "v_ref": v_ref, "v_ema": v_ema, "v_old": v_old}
    shared.check_tensors(op, v, samples, {"advantage": advantage, "t": t, "gate": gate})
    if transform not in TRANSFORMS:
        raise ValueError(
            f"{op}: transform {transform!r} is unknown; choose {', '.join(TRANSFORMS)}"
        )
    shared.check_positive(op, power=power)
    shared.check_not_negative(
        op, clip_low=clip_low, clip_high=clip_high, ema_beta=ema_beta, adv_clip=adv_clip
    )
    shared.check_kl(op, beta, gate, v_ref)
    if ema_beta > 0 and v_ema is None:
        raise ValueError(
            f"{op}: ema_beta is {ema_beta} but v_ema is None; pass v_ema or ema_beta=0"
        )
    weigh, p = TRANSFORMS[transform]
    widest = (v, v_old, target)
    row_values = (advantage, weigh(t.to(compute_dtype(*widest))), gate)
    kernels, inputs = shared.prepared(op, backend, widest, samples.values(), row_values)
    inputs += (power if p is None else p, clip_low, clip_high, beta, ema_beta, adv_clip)
    if not kernels:
        return awm_loss_ref(*inputs)
    loss, rows_SR, flags_FR = _awm_loss(*inputs)
    return AwmLoss(loss, *rows_SR.unbind(0)[:REPORTED], *flags_FR.unbind(0))


def examples(on: On) -> Examples:
    """With all that is optional, curved; see `_examples.py`. The target is fp32, as noise is."""
    v_old, moved, target, v_ref, v_ema = on.samples(5)
    v, t = (v_old + 0.1 * moved).requires_grad_(), on.row_values(0.2, 0.8)
    out = awm_loss(
        v, v_old, target.float(), advantage=t - 0.5, t=t, transform="ghuber", gate=t, v_ref=v_ref,
        beta=0.1, v_ema=v_ema, ema_beta=0.1, backend=on.backend,
    )  # fmt: skip
    yield "", with_gradient(out, v)
