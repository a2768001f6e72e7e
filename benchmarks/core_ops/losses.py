"""The problems of the losses: a call is forward and backward.

Shapes: R rows, N elements of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import gardo_kernels as ops
from gardo.flow import flux_sigmas, transitions

from . import released
from .cases import NOISE_LEVEL, STEPS, Call, Case, Outputs, Problem, TorchCall

BETA = 0.04


def gated_rows(case: Case) -> int:
    return math.ceil(case.gate * case.shape[0])


def widest_gap(log_ratio_R: Tensor) -> float:
    """A clip range in the widest gap between |log ratios|: no rounding moves a row across it."""
    size_R = log_ratio_R.abs().sort().values
    if len(size_R) == 1:
        return 2 * float(size_R[0])
    gap = int((size_R[1:] - size_R[:-1]).argmax())
    return float(size_R[gap : gap + 2].mean())


class Trained(Problem):
    """A loss of velocities: forward, backward, and the outputs that are compared."""

    inputs = 3  # tensors of the case's size, v_ref not among them
    inputs_again = 3  # those that the gradient needs once more

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        R = case.shape[0]
        self.advantage_R = 2 * self.randn(R)
        self.gated_R = torch.arange(R, device=device) < gated_rows(case)
        # the releases average the KL over the gated rows
        self.gate_R = self.gated_R * (R / max(gated_rows(case), 1))
        self.v_old = self.like_case()
        self.v = self.moved(0.05 * self.randn(*case.shape))
        self.v_ref = self.laid_out(self.v_old.float() + 0.1 * self.randn(*case.shape))
        self.given_ref = self.v_ref if gated_rows(case) else None

    def moved(self, delta: Tensor) -> Tensor:
        return self.laid_out(self.v_old.float() + delta).detach().requires_grad_()

    def laid_out(self, values: Tensor) -> Tensor:
        out = self.like_case()
        out.copy_(values)
        return out

    @property
    def least_bytes(self) -> int:
        gated = gated_rows(self.case) / self.case.shape[0]
        return round(self.case.elements * self.size * (self.inputs + 1 + gated))

    @property
    def two_pass_bytes(self) -> int:
        gated = gated_rows(self.case) / self.case.shape[0]
        return round(
            self.case.elements * self.size * (self.inputs + self.inputs_again + 1 + 2 * gated)
        )

    def loss(self, v: Tensor, *, backend: str, dtype: torch.dtype | None = None) -> Outputs:
        raise NotImplementedError

    def released_loss(self, v: Tensor) -> Outputs:
        raise NotImplementedError

    def torch_call(self, v: Tensor) -> Outputs:
        return self.loss(v, backend="torch")

    def trained(self, forward: Callable[[Tensor], Outputs], v: Tensor) -> Call:
        def call() -> Outputs:
            out = forward(v)
            (gradient,) = torch.autograd.grad(out["loss"], v)
            return {**out, "gradient": gradient}

        return call

    def ways(self, compiled: TorchCall | None = None, checked: bool = False) -> dict[str, Call]:
        forward: dict[str, TorchCall] = {
            "released": self.released_loss,
            "eager": self.torch_call,
            "triton": lambda v: self.loss(v, backend="triton"),
        }
        if compiled is not None:
            forward["compiled"] = compiled
        return {name: self.trained(call, self.v) for name, call in forward.items()}

    def exact(self) -> Outputs:
        v = self.v.detach().double().requires_grad_()
        call = self.trained(lambda v: self.loss(v, backend="torch", dtype=torch.float64), v)
        return {name: t.detach() for name, t in call().items()}

    def wide(self, dtype: torch.dtype | None, *some: Tensor | None) -> Iterator[Tensor | None]:
        return (t if t is None or dtype is None else t.to(dtype) for t in some)

    def tolerance(self, way: str, output: str) -> float:
        """fp32 sums for the loss; the gradient is written in the dtype of v: half a last place.

        A difference of log-probabilities of size one leaves 1e-6 of a log-ratio of 1e-4. The
        released matching loss mixes its velocities in their own dtype before it widens them.
        """
        if way == "released":
            if self.case.layout == "tiny" and output == "log_ratio":
                return math.inf
            return 0.05 if self.case.dtype == torch.bfloat16 or output == "log_ratio" else 1e-3
        if output == "gradient":
            # Triton's interpreter cuts where a GPU rounds
            return 2.0**-7 if self.case.dtype == torch.bfloat16 else 1e-5
        return 1e-4


class PolicyLoss(Trained):
    """`u` for ours; the latents x, x' and the old log-probability for the released script."""

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
            v, v_old, x_t, x0, self.t_R, r=ops.nft_preference(self.advantage_R), b=self.b,
            gate=self.gate_R, v_ref=v_ref, beta=BETA, backend=backend,
        )  # fmt: skip
        return {"loss": out.loss}

    def released_loss(self, v: Tensor) -> Outputs:
        out = released.nft_loss(
            v, self.v_old, self.x_t, self.x0, self.t_R, self.v_ref, advantage_R=self.advantage_R,
            gated_R=self.gated_R, b=self.b, beta=BETA,
        )  # fmt: skip
        return {"loss": out.loss}


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
