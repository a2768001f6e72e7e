"""The problems of the ops without a backward pass: the sampler's step, the nearest neighbours.

Shapes: R rows; P groups of G samples with D features, B samples in all.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

import gardo_kernels as ops
from gardo.flow import flux_sigmas, transitions

from . import released
from .cases import NOISE_LEVEL, SEED, STEPS, Call, Case, Outputs, Problem, TorchCall


class SdeStep(Problem):
    """A sampler step of fp32 latents with its noise; the model gets the next ones in its dtype.

    The eager way draws from torch's generator: Philox word by word, as the op's reference has it,
    would be a straw man. So the ways are compared on noise that they are given, all but ours, which
    draws the same inside.
    """

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
        inside = import_module("gardo_kernels.sde_step")._sde_step_triton

        def call() -> Outputs:
            out = inside(
                self.x, self.v, self.table.table_TK, self.step_R, self.seed, self.sample_R,
                None, None, 1.0, self.case.dtype, self.recorded, False, False,
            )  # fmt: skip
            return {"x": out.x, "model_input": out.model_input}

        return {**self.ways(), "triton": call}

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


class NearestCosine(Problem):
    """Groups of equal size, or `unequal` ones; fp32 features as the encoder's pooling gives them.

    The eager way is one batched matrix product, without a loop; for groups of unequal size it is
    the whole Gram matrix, masked.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        P, G, D = case.shape
        self.e_BD = self.randn(P * G, D, dtype=case.dtype)
        self.group_B = torch.arange(P, device=device).repeat_interleave(G)
        if case.layout == "unequal":  # a third of the samples change their group
            others = torch.randint(P, (P * G,), generator=self.generator, device=device)
            moves = torch.rand(P * G, generator=self.generator, device=device) < 1 / 3
            self.group_B = torch.where(moves, others, self.group_B)
        self.given_group = None if P == 1 else self.group_B

    @property
    def least_bytes(self) -> int:
        return self.case.elements * self.size

    def torch_call(self, e_BD: Tensor) -> Outputs:
        P, G, _ = self.case.shape
        n_BD = torch.nn.functional.normalize(e_BD.float(), dim=1)
        if self.case.layout == "unequal":
            same_BB = self.group_B[:, None] == self.group_B[None, :]
            distance_BB = (1 - n_BD @ n_BD.T).masked_fill(~same_BB, torch.inf)
            return {"nearest": distance_BB.fill_diagonal_(torch.inf).amin(1)}
        n_PGD = n_BD.view(P, G, -1)
        distance_PGG = 1 - n_PGD @ n_PGD.mT
        itself_GG = torch.eye(G, dtype=torch.bool, device=e_BD.device)
        return {"nearest": distance_PGG.masked_fill(itself_GG, torch.inf).amin(2).flatten()}

    def _op(self, e_BD: Tensor, backend: str) -> Outputs:
        nearest_B, _ = ops.nearest_cosine(e_BD, self.given_group, backend=backend)
        return {"nearest": nearest_B}

    def ways(self, compiled: TorchCall | None = None, checked: bool = False) -> dict[str, Call]:
        ways: dict[str, Call] = {
            "released": lambda: {"nearest": released.nearest_neighbour(self.e_BD, self.group_B)},
            "eager": lambda: self.torch_call(self.e_BD),
            "triton": lambda: self._op(self.e_BD, "triton"),
        }
        if compiled is not None:
            ways["compiled"] = lambda: compiled(self.e_BD)
        return ways

    def exact(self) -> Outputs:
        n_BD = torch.nn.functional.normalize(self.e_BD.double(), dim=1)
        nearest_B = torch.zeros(len(n_BD), dtype=torch.float64, device=self.device)
        for group in self.group_B.unique():
            index_G = (self.group_B == group).nonzero()[:, 0]
            distance_GG = (1 - n_BD[index_G] @ n_BD[index_G].T).fill_diagonal_(torch.inf)
            if len(index_G) > 1:
                nearest_B[index_G] = distance_GG.amin(1)
        return {"nearest": nearest_B}

    def tolerance(self, way: str, output: str) -> float:
        return 1e-5  # distances near 1 of fp32 products; random features have no near twins
