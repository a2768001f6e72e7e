"""`gelu` behind the attention's output, as Flux's single blocks join the two."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gardo_kernels._launch_shape import LaunchShape
from gardo_kernels.gelu import gelu

from ..cases import Case
from ._block import Block, Given

RATIO = 4  # of the projection's width to the model's


class Gelu(Block):
    width = 4 * 3072
    trained = frozen = ("x", "before")

    @classmethod
    def default_shape(cls, case: Case) -> LaunchShape:
        return LaunchShape()

    def draw(self) -> Given:
        B, L, N = self.case.shape
        x, before = self.randn(B, L, N), self.randn(B, L, N // RATIO)
        return {"x": x.to(self.case.dtype), "before": before.to(self.case.dtype)}

    def like_result(self) -> Tensor:
        B, L, N = self.case.shape
        return self.randn(B, L, N + N // RATIO).to(self.case.dtype)

    @property
    def least_bytes(self) -> int:
        """The gradient of `before` is a part of the result's, and is not read."""
        return super().least_bytes - 2 * self.given["before"].numel() * self.size

    def op(self, given: Given, backend: str) -> Tensor:
        return gelu(**given, backend=backend)

    def diffusers(self, given: Given) -> Tensor:
        return torch.cat([given["before"], F.gelu(given["x"], approximate="tanh")], dim=2)
