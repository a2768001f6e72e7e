"""`adaln_modulate` on the tokens of Flux."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gardo_kernels._launch_shape import LaunchShape
from gardo_kernels._layer_norm import default_shape
from gardo_kernels.adaln_modulate import adaln_modulate

from ..cases import Case
from ._block import EPS, Block, Given, with_rows


class AdalnModulate(Block):
    trained = ("x", "scale", "shift")
    frozen = ("x",)

    @classmethod
    def default_shape(cls, case: Case) -> LaunchShape:
        return default_shape(case.shape[-1])

    @classmethod
    def launch_shapes(cls, case: Case) -> list[LaunchShape]:
        return with_rows(cls.default_shape(case))

    def draw(self) -> Given:
        x = self.randn(*self.case.shape).to(self.case.dtype)
        return {"x": x, "scale": self.modulation(), "shift": self.modulation()}

    def op(self, given: Given, backend: str) -> Tensor:
        return adaln_modulate(**given, eps=EPS, backend=backend)

    def diffusers(self, given: Given) -> Tensor:
        x, scale, shift = given.values()
        return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]
