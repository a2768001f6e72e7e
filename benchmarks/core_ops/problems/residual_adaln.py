"""`residual_adaln` on the tokens of Flux."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gardo_kernels._launch_shape import LaunchShape
from gardo_kernels._layer_norm import default_shape
from gardo_kernels.residual_adaln import residual_adaln

from ..cases import Case
from ._block import EPS, Block, Given, with_rows


class ResidualAdaln(Block):
    trained = ("x", "y", "gate", "scale", "shift")
    frozen = ("x", "y")
    results = ("stream", "normed")  # of which the backward pass reads the first again

    @classmethod
    def default_shape(cls, case: Case) -> LaunchShape:
        return default_shape(case.shape[-1])

    @classmethod
    def launch_shapes(cls, case: Case) -> list[LaunchShape]:
        return with_rows(cls.default_shape(case))

    def draw(self) -> Given:
        x, y = (self.randn(*self.case.shape).to(self.case.dtype) for _ in range(2))
        return {"x": x, "y": y, **{name: self.modulation() for name in self.trained[2:]}}

    def op(self, given: Given, backend: str) -> tuple[Tensor, Tensor]:
        return residual_adaln(**given, eps=EPS, backend=backend)

    def diffusers(self, given: Given) -> tuple[Tensor, Tensor]:
        x, y, gate, scale, shift = given.values()
        z = x + gate.unsqueeze(1) * y
        normed = F.layer_norm(z, z.shape[-1:], eps=EPS)
        return z, normed * (1 + scale[:, None]) + shift[:, None]
