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

Shapes: R rows, N elements (any dimensions after the first).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gardo_kernels._launch import (
    Backend,
    check_like,
    check_rows,
    check_samples,
    choose_backend,
    compute_dtype,
)

Reduction = Literal["batch", "gated"]


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


def gated_kl_ref(
    v_RN: Tensor, v_ref_RN: Tensor, gate_R: Tensor, kl_scale_R: Tensor, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    """The gated KL, reduced, and the KL of each row.

    What v_ref holds in rows of gate 0 does not matter, NaN included.
    """
    has_reference_R = gate_R != 0
    difference_RN = torch.where(has_reference_R[:, None], v_RN - v_ref_RN, 0.0)
    kl_R = kl_scale_R * difference_RN.square().mean(1)
    return (gate_R * kl_R).sum() / kl_rows(gate_R, reduction), kl_R


def kl_rows(gate_R: Tensor, reduction: Reduction) -> Tensor:
    """What the sum of gated KLs is divided by: all rows, or the gated ones (at least 1)."""
    if reduction == "batch":
        return torch.full_like(gate_R[0], gate_R.shape[0])
    return (gate_R != 0).sum().clamp(min=1).to(gate_R.dtype)


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
        gate_R, kl_scale_R = _gate_and_scale(gate, kl_scale, v_RN)
        difference_RN = torch.where(gate_R[:, None] != 0, v_RN - v_ref.flatten(1).to(dtype), 0.0)
        kl_weight_R = beta * gate_R / kl_rows(gate_R, reduction) * 2 * kl_scale_R / N
        grad_RN = grad_RN + kl_weight_R[:, None] * difference_RN
    return grad_RN.view(v.shape)


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
    choose_backend(op, backend)

    dtype = compute_dtype(v, v_old, u)
    v_RN = v.flatten(1).to(dtype)
    gate_R, kl_scale_R = _gate_and_scale(gate, kl_scale, v_RN)
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


def check_kl_options(
    op: str, beta: float, reduction: Reduction, gate: Tensor | None, v_ref: Tensor | None
) -> None:
    """What the losses with a gated KL refuse in its settings."""
    if not beta >= 0:
        raise ValueError(f"{op}: beta is {beta}; it must not be negative")
    if reduction not in ("batch", "gated"):
        raise ValueError(f"{op}: reduction {reduction!r} is unknown; choose batch or gated")
    if beta > 0 and v_ref is None and gate is None:
        raise ValueError(
            f"{op}: beta is {beta} but v_ref is None; pass v_ref, or beta=0, or the gate"
        )


def _gate_and_scale(
    gate: Tensor | None, kl_scale: Tensor | None, v_RN: Tensor
) -> tuple[Tensor, Tensor]:
    ones_R = torch.ones(v_RN.shape[0], dtype=v_RN.dtype, device=v_RN.device)
    gate_R = ones_R if gate is None else gate.detach().to(v_RN.dtype)
    return gate_R, ones_R if kl_scale is None else kl_scale.detach().to(v_RN.dtype)
