"""Fused arithmetic of RL fine-tuning for flow models: one op a file, from formula to op.

Every op takes `backend="auto" | "triton" | "torch"`; the plain-torch references run anywhere torch
does. Kernels so far: the random numbers, `policy_loss`, `nft_loss` and `awm_loss`. `auto` takes the
references until the kernels have been measured on a GPU.
"""

from gardo_kernels.awm_loss import AwmLoss, awm_loss
from gardo_kernels.nearest_cosine import nearest_cosine
from gardo_kernels.nft_loss import NftLoss, nft_loss, nft_preference
from gardo_kernels.philox import philox4x32, random_bits, random_normal, random_uniform
from gardo_kernels.policy_loss import PolicyLoss, policy_loss, policy_loss_grad_ref
from gardo_kernels.sde_step import sde_step
from gardo_kernels.win_rate import win_rate

__all__ = [
    "AwmLoss",
    "NftLoss",
    "PolicyLoss",
    "awm_loss",
    "nearest_cosine",
    "nft_loss",
    "nft_preference",
    "philox4x32",
    "policy_loss",
    "policy_loss_grad_ref",
    "random_bits",
    "random_normal",
    "random_uniform",
    "sde_step",
    "win_rate",
]
