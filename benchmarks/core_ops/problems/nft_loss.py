"""`nft_loss` on freshly noised images."""

from __future__ import annotations

import torch
from torch import Tensor

import gardo_kernels as ops

from .. import released
from ..cases import Case, Outputs
from ._trained import BETA, Trained


class NftLoss(Trained):
    inputs = inputs_again = 4
    b = 0.1

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.x0 = self.like_case()
        noise = self.randn(*case.shape)
        self.t_R = 0.1 + 0.8 * torch.rand(case.shape[0], generator=self.generator, device=device)
        t = self.t_R.view(-1, *[1] * (len(case.shape) - 1))
        self.x_t = self.laid_out((1 - t) * self.x0.float() + t * noise)

    def loss(self, v: Tensor, *, backend: str, dtype: torch.dtype | None = None) -> Outputs:
        v_old, x_t, x0, v_ref = self.wide(dtype, self.v_old, self.x_t, self.x0, self.given_ref)
        out = ops.nft_loss(
            v, v_old, x_t, x0, self.t_R, advantage=self.advantage_R, b=self.b,
            gate=self.gate_R, v_ref=v_ref, beta=BETA, backend=backend,
        )  # fmt: skip
        return {"loss": out.loss}

    def released_loss(self, v: Tensor) -> Outputs:
        out = released.nft_loss(
            v, self.v_old, self.x_t, self.x0, self.t_R, self.v_ref, advantage_R=self.advantage_R,
            gated_R=self.gated_R, b=self.b, beta=BETA,
        )  # fmt: skip
        return {"loss": out.loss}
