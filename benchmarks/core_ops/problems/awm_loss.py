"""`awm_loss` on freshly noised images, the ratio as the release clips it."""

from __future__ import annotations

import torch
from torch import Tensor

import gardo_kernels as ops

from .. import released
from ..cases import Case, Outputs
from ._trained import BETA, Trained


class AwmLoss(Trained):
    inputs_again = 2  # not v_old

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.target = self.like_case()
        self.t_R = 0.1 + 0.8 * torch.rand(case.shape[0], generator=self.generator, device=device)
        self.clip = 1.0  # the release's
        self.unit_advantage_R = self.advantage_R.clamp(-5.0, 5.0) / 5.0

    def loss(self, v: Tensor, *, backend: str, dtype: torch.dtype | None = None) -> Outputs:
        v_old, target, v_ref = self.wide(dtype, self.v_old, self.target, self.given_ref)
        out = ops.awm_loss(
            v, v_old, target, advantage=self.unit_advantage_R, t=self.t_R, transform="uniform",
            gate=self.gate_R, v_ref=v_ref, beta=BETA, clip_low=self.clip, clip_high=self.clip,
            backend=backend,
        )  # fmt: skip
        return {"loss": out.loss}

    def released_loss(self, v: Tensor) -> Outputs:
        out = released.awm_loss(
            v, self.v_old, self.target, self.v_ref, advantage_R=self.advantage_R,
            gated_R=self.gated_R, clip=self.clip, beta=BETA,
        )  # fmt: skip
        return {"loss": out.loss}
