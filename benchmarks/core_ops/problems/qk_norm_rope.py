"""`qk_norm_rope` on the queries of Flux."""

from __future__ import annotations

from typing import Any
from unittest import mock

from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.nn import functional as F

from gardo_kernels._block_op import TOKENS
from gardo_kernels._launch_shape import LaunchShape
from gardo_kernels.qk_norm_rope import qk_norm_rope

from ..cases import Call, Case
from ._block import EPS, Block, Given

HEAD = 128  # elements


def rms_norm(x: Tensor, shape: Any, weight: Tensor | None, eps: float) -> Tensor:
    """For counting: on a GPU RMSNorm is one kernel each way and moves what LayerNorm does."""
    return F.layer_norm(x, shape, weight, None, eps)


class QkNormRope(Block):
    trained = ("x", "weight")
    frozen = ("x",)

    @classmethod
    def default_shape(cls, case: Case) -> LaunchShape:
        return TOKENS

    def draw(self) -> Given:
        B, L, D = self.case.shape
        E = min(HEAD, D)
        angle = self.randn(L, E // 2).repeat_interleave(2, 1)
        x, weight = self.randn(B, L, D // E, E), 1 + self.randn(E) / 4
        return {
            "x": x.to(self.case.dtype), "weight": weight.to(self.case.dtype), "cos": angle.cos(),
            "sin": angle.sin(),
        }  # fmt: skip

    def like_result(self) -> Tensor:
        return self.randn(*self.given["x"].shape).to(self.case.dtype)

    def op(self, given: Given, backend: str) -> Tensor:
        return qk_norm_rope(**given, eps=EPS, backend=backend)

    def diffusers(self, given: Given) -> Tensor:
        x, weight, cos, sin = given.values()
        y = F.rms_norm(x, x.shape[-1:], weight, EPS)
        return apply_rotary_emb(y, (cos, sin), sequence_dim=1)

    def as_on_gpu(self) -> dict[str, Call]:
        ways = self.ways()

        def eager() -> Any:
            with mock.patch.object(F, "rms_norm", rms_norm):
                return ways["eager"]()

        return {**ways, "eager": eager}
