"""`gated_residual` on the tokens of Flux."""

from __future__ import annotations

from torch import Tensor

from gardo_kernels._block_op import TOKENS
from gardo_kernels._launch_shape import LaunchShape
from gardo_kernels.gated_residual import gated_residual

from ..cases import Case
from ._block import Block, Given


class GatedResidual(Block):
    trained = ("x", "y", "gate")
    frozen = ("x", "y")
    again = ()

    @classmethod
    def default_shape(cls, case: Case) -> LaunchShape:
        return TOKENS

    def draw(self) -> Given:
        x, y = (self.randn(*self.case.shape).to(self.case.dtype) for _ in range(2))
        return {"x": x, "y": y, "gate": self.modulation()}

    @property
    def least_bytes(self) -> int:
        """The gradient of x is the result's own."""
        return super().least_bytes - self.given["x"].numel() * self.size

    def op(self, given: Given, backend: str) -> Tensor:
        return gated_residual(**given, backend=backend)

    def diffusers(self, given: Given) -> Tensor:
        x, y, gate = given.values()
        return x + gate.unsqueeze(1) * y
