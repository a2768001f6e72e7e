"""`sde_step` against the released script's step, and torch's own generator."""

from __future__ import annotations

from importlib import import_module
from unittest import mock

import torch
from torch import Tensor

import gardo_kernels as ops
from gardo.flow import flux_sigmas, transitions
from gardo_kernels._launch_shape import LaunchShape

from .. import released
from ..cases import HERE, NOISE_LEVEL, SEED, STEPS, Call, Case, Outputs, Problem, TorchCall


class SdeStep(Problem):
    """A sampler step of fp32 latents with its noise; the model gets the next ones in its dtype.

    The eager way draws from torch's generator: Philox word by word, as the op's reference has it,
    would be a straw man. So the ways are compared on noise that they are given, all but ours, which
    draws the same inside.
    """

    gates = ()
    special = (((16, 1024, 64), torch.bfloat16, "recorded"),)
    every_size = True

    @classmethod
    def launch_shapes(cls, case: Case) -> list[LaunchShape]:
        first = import_module("gardo_kernels.sde_step").default_shape(*case.rows_and_elements, HERE)
        return list(dict.fromkeys([first, *super().launch_shapes(case)]))

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        R = case.shape[0]
        sigmas_T = flux_sigmas(STEPS, 1024)
        self.table = transitions(sigmas_T, "flow", NOISE_LEVEL).to(device)
        self.step_R = torch.randint(STEPS - 1, (R,), generator=self.generator, device=device)
        self.sample_R = torch.arange(R, device=device) + 7
        self.seed = torch.tensor([SEED], device=device)  # a graph cannot copy one from the host
        sigmas_T = sigmas_T.float().to(device)
        self.schedule = released.Schedule(1000 * sigmas_T[:-1], sigmas_T, NOISE_LEVEL)
        self.timestep_R = self.schedule.timesteps_T[self.step_R]
        self.x, self.v = self.randn(*case.shape), self.like_case()
        self.recorded = case.layout == "recorded"  # a step that is trained on keeps u
        self._noise: Tensor | None = None

    @property
    def noise(self) -> Tensor:
        """What Philox gives each row at its step."""
        if self._noise is None:
            noise = torch.empty(self.case.shape, device=self.device)
            for step in range(STEPS):
                rows = (self.step_R == step).nonzero()[:, 0]
                if len(rows):
                    shape = self.case.shape[1:]
                    noise[rows] = ops.random_normal(
                        SEED, self.sample_R[rows], step, shape, backend="torch"
                    )
            self._noise = noise
        return self._noise

    @property
    def least_bytes(self) -> int:
        """v, x and x' in fp32, the model's copy where it is not fp32, and u where it is kept."""
        copy = self.size if self.size < 4 else 0
        return self.case.elements * (self.size + 4 + 4 + copy + 4 * self.recorded)

    def torch_call(self, noise: Tensor | None) -> Outputs:
        shape = (-1, *[1] * (self.x.ndim - 1))
        A, B, std = (self.table.rows(self.step_R, n).view(shape) for n in ("A", "B", "std"))
        noise = torch.randn_like(self.x) if noise is None else noise
        x_next = A * self.x + B * self.v.float() + std * noise
        out = {"x": x_next, "model_input": x_next.to(self.case.dtype)}
        return {**out, "u": std / B * noise} if self.recorded else out

    def _released(self, noise: Tensor | None) -> Outputs:
        x_next, _, _, _ = released.sde_step(
            self.schedule, self.v, self.timestep_R, self.x, noise=noise
        )
        return {"x": x_next, "model_input": x_next.to(self.case.dtype)}

    def _triton(self) -> Outputs:
        out = ops.sde_step(
            self.x, self.v, self.table.table_TK, self.step_R, seed=self.seed,
            sample_id=self.sample_R, model_dtype=self.case.dtype,
            keep_u=self.recorded, backend="triton",
        )  # fmt: skip
        found = {"x": out.x, "model_input": out.model_input}
        return {**found, "u": out.u} if self.recorded else found

    def ways(self, compiled: TorchCall | None = None, checked: bool = False) -> dict[str, Call]:
        noise = self.noise if checked else None
        ways: dict[str, Call] = {
            "released": lambda: self._released(noise),
            "eager": lambda: self.torch_call(noise),
            "triton": self._triton,
        }
        if compiled is not None:
            ways["compiled"] = lambda: compiled(noise)
        return ways

    def as_on_gpu(self) -> dict[str, Call]:
        """On a CPU the op looks at the steps' values first."""
        module, ways = import_module("gardo_kernels.sde_step"), self.ways()

        def call() -> Outputs:
            with mock.patch.object(module, "_check_values"):
                return ways["triton"]()

        return {**ways, "triton": call}

    def exact(self) -> Outputs:
        shape = (-1, *[1] * (self.x.ndim - 1))
        A, B, std = (
            self.table.rows(self.step_R, n).double().view(shape) for n in ("A", "B", "std")
        )
        x_next = A * self.x.double() + B * self.v.double() + std * self.noise.double()
        return {"x": x_next, "model_input": x_next, "u": std / B * self.noise.double()}

    def tolerance(self, way: str, output: str) -> float:
        """fp32 coefficients and normals to 5e-6; the model's copy to half a last place."""
        return 2.0**-7 if output == "model_input" and self.size == 2 else 1e-5
