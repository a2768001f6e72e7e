"""Fused arithmetic of RL fine-tuning for flow models: one op a file, from formula to op.

Every op takes `backend="auto" | "triton" | "torch"`; the plain-torch references run anywhere torch
does. `auto` runs the Triton kernels on an NVIDIA GPU and the references elsewhere. `win_rate` is
library calls alone, which are right for a sort.
"""

from gardo_kernels._launch import Backend, kernels_run_on
from gardo_kernels._trial import triton_trouble
from gardo_kernels.awm_loss import AwmLoss, awm_loss
from gardo_kernels.nearest_cosine import nearest_cosine
from gardo_kernels.nft_loss import NftLoss, nft_loss, nft_preference
from gardo_kernels.philox import (
    Seed,
    philox4x32,
    random_bits,
    random_normal,
    random_uniform,
    seed_tensor,
)
from gardo_kernels.policy_loss import PolicyLoss, policy_loss
from gardo_kernels.sde_step import STEP_COLUMNS, Step, sde_step
from gardo_kernels.win_rate import win_rate

__all__ = [
    "STEP_COLUMNS",
    "AwmLoss",
    "Backend",
    "NftLoss",
    "PolicyLoss",
    "Seed",
    "Step",
    "awm_loss",
    "kernels_run_on",
    "nearest_cosine",
    "nft_loss",
    "nft_preference",
    "philox4x32",
    "policy_loss",
    "random_bits",
    "random_normal",
    "random_uniform",
    "sde_step",
    "seed_tensor",
    "triton_trouble",
    "win_rate",
]
