"""DiffusionNFT's loss: the forward process, implicit positive and negative policies, a gated KL.

For row b of R, freshly noised at time t: x_t = (1 - t) x0 + t noise, with preference r in [0, 1]
and strength b,

    v+ = b v + (1 - b) v_old        v- = (1 + b) v_old - b v        x0(+-) = x_t - t v(+-)
    weight(+-) = max(mean |x0(+-) - x0|, floor), without gradient
    L(+-)      = mean((x0(+-) - x0)^2) / weight(+-)
    policy     = policy_scale (r L+ + (1 - r) L-) / b
    kl         = mean((v - v_ref)^2) where gate_b is not 0, else 0

    loss       = mean_b policy_b + beta sum_b gate_b kl_b / D
    D          = R ("batch") or max(number of gated rows, 1) ("gated")

Means are over the N elements of a sample. policy_scale is the range of the clamped advantages, 5 in
the release. Source: DiffusionNFT, arXiv 2509.16117, and its released code; the gate: GARDO, arXiv
2512.24138.

Least traffic: v, v_old, x_t, x0, and v_ref of gated rows, once for the row sums and once for the
gradient, which is written. Called once for each micro-batch by `gardo.algorithms`.

Shapes: R rows, N elements (any dimensions after the first).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gardo_kernels._gated_kl import Reduction, check_kl_options, gated_kl_ref
from gardo_kernels._launch import (
    Backend,
    check_like,
    check_rows,
    check_samples,
    choose_backend,
    compute_dtype,
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
    v_RN: Tensor,
    v_old_RN: Tensor,
    x_t_RN: Tensor,
    x0_RN: Tensor,
    t_R: Tensor,
    *,
    r_R: Tensor,
    b: float,
    gate_R: Tensor,
    v_ref_RN: Tensor | None,
    beta: float,
    policy_scale: float,
    reduction: Reduction,
    floor: float,
) -> NftLoss:
    """The formula in plain torch, all tensors in one dtype; autograd gives the gradient."""

    def branch(v_branch_RN: Tensor) -> tuple[Tensor, Tensor]:
        error_RN = x_t_RN - t_R[:, None] * v_branch_RN - x0_RN
        weight_R = error_RN.detach().abs().mean(1).clamp(min=floor)
        return error_RN.square().mean(1) / weight_R, weight_R

    plus_R, weight_plus_R = branch(b * v_RN + (1 - b) * v_old_RN)
    minus_R, weight_minus_R = branch((1 + b) * v_old_RN - b * v_RN)
    policy_R = policy_scale * (r_R * plus_R + (1 - r_R) * minus_R) / b
    loss = policy_R.mean()
    kl_R = torch.zeros_like(policy_R)
    if v_ref_RN is not None:
        kl, kl_R = gated_kl_ref(v_RN, v_ref_RN, gate_R, torch.ones_like(gate_R), reduction)
        loss = loss + beta * kl
    return NftLoss(
        loss=loss,
        policy_R=policy_R.detach(),
        kl_R=kl_R.detach(),
        weight_plus_R=weight_plus_R,
        weight_minus_R=weight_minus_R,
        loss_plus_R=plus_R.detach(),
        loss_minus_R=minus_R.detach(),
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
    reduction: Reduction = "batch",
    floor: float = 1e-5,
    backend: Backend = "auto",
) -> NftLoss:
    """Loss of a micro-batch with a gradient to v, and the statistics of each row.

    v, v_old, x_t, x0, v_ref: [R, ...] of equal shape, any floating dtype; v_old is the sampling
    (old) velocity at x_t. t, r: [R] in [0, 1], the noising time and `nft_preference` of the
    advantage. b > 0. gate: [R] bool or weight, None means every row; rows of gate 0 need no
    reference, whatever v_ref holds there. v_ref None leaves the KL out, which is right for a
    micro-batch without gated rows. Only v receives a gradient.

    Arithmetic and results are fp32 (fp64 where v, v_old, x_t or x0 is fp64).

    ValueError for shapes, dtypes or devices that do not fit, b or floor not positive, beta
    negative, an unknown reduction, and beta > 0 with neither v_ref nor a gate. Source: arXiv
    2509.16117.
    """
    op = "nft_loss"
    check_samples(op, "v", v)
    for name, tensor in (("v_old", v_old), ("x_t", x_t), ("x0", x0), ("v_ref", v_ref)):
        if tensor is not None:
            check_like(op, name, tensor, "v", v)
    for name, tensor in (("t", t), ("r", r), ("gate", gate)):
        if tensor is not None:
            check_rows(op, name, tensor, "v", v)
    for name, value in (("b", b), ("floor", floor)):
        if not value > 0:
            raise ValueError(f"{op}: {name} is {value}; it must be positive")
    check_kl_options(op, beta, reduction, gate, v_ref)
    choose_backend(op, backend)

    dtype = compute_dtype(v, v_old, x_t, x0)
    v_old_RN, x_t_RN, x0_RN = (x.detach().flatten(1).to(dtype) for x in (v_old, x_t, x0))
    t_R, r_R = t.detach().to(dtype), r.detach().to(dtype)
    return nft_loss_ref(
        v.flatten(1).to(dtype),
        v_old_RN,
        x_t_RN,
        x0_RN,
        t_R,
        r_R=r_R,
        b=b,
        gate_R=torch.ones_like(t_R) if gate is None else gate.detach().to(dtype),
        v_ref_RN=None if v_ref is None else v_ref.detach().flatten(1).to(dtype),
        beta=beta,
        policy_scale=policy_scale,
        reduction=reduction,
        floor=floor,
    )
