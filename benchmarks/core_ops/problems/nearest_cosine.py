"""`nearest_cosine` of many small groups, and of one large one.

Shapes: P groups of G samples with D features, B samples in all.
"""

from __future__ import annotations

from importlib import import_module
from itertools import product

import torch
from torch import Tensor

import gardo_kernels as ops
from gardo_kernels._launch_shape import LaunchShape

from .. import released
from ..cases import Call, Case, Outputs, Problem, TorchCall


class NearestCosine(Problem):
    """Groups of equal size, or `unequal` ones; fp32 features as the encoder's pooling gives them.

    The eager way is one batched matrix product, without a loop; for groups of unequal size it is
    the whole Gram matrix, masked.
    """

    @classmethod
    def gpu_cases(cls, op: str) -> list[Case]:
        return [
            Case(op, (48, 24, 1024), torch.float32),
            Case(op, (1, 4096, 1024), torch.float32),
            Case(op, (48, 24, 1024), torch.float32, layout="unequal"),
        ]

    @classmethod
    def cpu_cases(cls, op: str, quick: bool) -> list[Case]:
        return [Case(op, (2 if quick else 8, 24, 64), torch.float32)]

    @classmethod
    def counted_case(cls, op: str, quick: bool) -> Case:
        return Case(op, (4, 24, 64) if quick else (48, 24, 1024), torch.float32)

    @classmethod
    def launched_as(cls, case: Case) -> str:
        return "gram_tiles" if case.shape[0] == 1 else case.op

    @classmethod
    def launch_shapes(cls, case: Case) -> list[LaunchShape]:
        """One thing at a time for the groups; all of a tile's."""
        if cls.launched_as(case) == "gram_tiles":
            tiles = product((64, 128), (32, 64), (4, 8), (3, 2))
            return [LaunchShape(block=b, chunk=c, warps=w, stages=s) for b, c, w, s in tiles]
        default = import_module("gardo_kernels.nearest_cosine").DEFAULT
        return [
            default,
            *(default._replace(block=block) for block in (128, 512, 1024)),
            *(default._replace(chunk=chunk) for chunk in (128, 512)),
            *(default._replace(rows=rows) for rows in (4, 16)),
            *(default._replace(warps=warps) for warps in (2, 8)),
        ]

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
