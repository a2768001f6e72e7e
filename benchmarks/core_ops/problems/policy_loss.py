"""`policy_loss` on what the released script's step gives."""

from __future__ import annotations

import torch
from torch import Tensor

import gardo_kernels as ops
from gardo.flow import flux_sigmas, transitions

from .. import released
from ..cases import NOISE_LEVEL, STEPS, Case, Outputs
from ._trained import BETA, Trained


def widest_gap(log_ratio_R: Tensor) -> float:
    """A clip range in the widest gap between |log ratios|: no rounding moves a row across it."""
    size_R = log_ratio_R.abs().sort().values
    if len(size_R) == 1:
        return 2 * float(size_R[0])
    gap = int((size_R[1:] - size_R[:-1]).argmax())
    return float(size_R[gap : gap + 2].mean())


class PolicyLoss(Trained):
    """`u` for ours; the latents x, x' and the old log-probability for the released script."""

    special = (((3, 1024, 64), torch.float32, "tiny"),)
    every_size = True

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        sigmas_T = flux_sigmas(STEPS, 1024)
        table = transitions(sigmas_T, "flow", NOISE_LEVEL).to(device)
        R = case.shape[0]
        step_R = torch.randint(STEPS - 1, (R,), generator=self.generator, device=device)
        names = ("h", "B", "A", "std", "u_scale", "kl_flow_grpo")
        self.row = {name: table.rows(step_R, name) for name in names}

        def spread(name: str) -> Tensor:
            return self.row[name].view(-1, *[1] * (len(case.shape) - 1))

        sigmas_T = sigmas_T.float().to(device)
        self.schedule = released.Schedule(1000 * sigmas_T[:-1], sigmas_T, NOISE_LEVEL)
        self.timestep_R = self.schedule.timesteps_T[step_R]
        z = self.randn(*case.shape)
        self.u = self.laid_out(spread("u_scale") * z)
        if case.layout == "tiny":  # no cancellation in the sum: log-ratios of about 1e-7
            self.v = self.moved(1e-6 * self.randn(*case.shape).abs() * self.u.float().sign())
        self.x = self.randn(*case.shape)
        # w = v_old + u is what the sampler's noise amounts to: from the u that was kept
        w = self.v_old.float() + self.u.float()
        self.x_next = spread("A") * self.x + spread("B") * w
        _, self.log_prob_old_R, _, _ = released.sde_step(
            self.schedule, self.v_old, self.timestep_R, self.x, self.x_next
        )
        self.clip = 1.0
        self.clip = widest_gap(self.exact()["log_ratio"])

    def loss(self, v: Tensor, *, backend: str, dtype: torch.dtype | None = None) -> Outputs:
        v_old, u, v_ref = self.wide(dtype, self.v_old, self.u, self.given_ref)
        out = ops.policy_loss(
            v, v_old, u, advantage=self.advantage_R, h=self.row["h"], B=self.row["B"],
            gate=self.gate_R, v_ref=v_ref, kl_scale=self.row["kl_flow_grpo"], clip_low=self.clip,
            clip_high=self.clip, beta=BETA, backend=backend,
        )  # fmt: skip
        return {"loss": out.loss, "log_ratio": out.log_ratio_R}

    def released_loss(self, v: Tensor) -> Outputs:
        out = released.policy_loss(
            self.schedule, v, self.x, self.x_next, self.v_ref, timestep_R=self.timestep_R,
            log_prob_old_R=self.log_prob_old_R, advantage_R=self.advantage_R,
            gated_R=self.gated_R, clip=self.clip, beta=BETA,
        )  # fmt: skip
        return {"loss": out.loss, "log_ratio": out.log_ratio_R}
