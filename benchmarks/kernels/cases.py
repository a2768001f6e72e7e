"""A case of the benchmark and what every op gives for it: the same numbers for all competitors.

A problem builds its inputs once; `ways()` gives each competitor as a call without arguments that
returns named tensors, of which `exact()` has the fp64 values. The ops' own problems are in
losses.py and forward.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
Call = Callable[[], Outputs]
TorchCall = Callable[[Any], Outputs]

STEPS, NOISE_LEVEL = 6, 0.9  # Flow-GRPO's Flux recipe; the last step is not trained
SEED = 20251224
BANDWIDTH = 64 * 2**20  # bytes: more than this does not stay in the L2 cache
LAUNCH = 1_000_000  # elements: below this, launches rule


@dataclass(frozen=True)
class Case:
    """`shape` with the rows first, or [P, G, D]; `layout` is what is unusual about the inputs."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    gate: float = 0.1
    layout: str = "plain"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def names(self) -> dict[str, Any]:
        """What tells it from other cases, as columns of a table."""
        return {
            "op": self.op,
            "shape": "x".join(map(str, self.shape)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "gate": self.gate,
            "layout": self.layout,
            "elements": self.elements,
        }


class Problem:
    """Inputs of a case on a device. `least_bytes`: every input and output once."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(SEED)
        self.size = case.dtype.itemsize

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def like_case(self, *, scale: float = 1.0) -> Tensor:
        """Random, in the case's shape, dtype and layout."""
        rows, first, *rest = self.case.shape
        if self.case.layout == "slice":  # the image tokens behind the text tokens, as Flux has them
            return (scale * self.randn(rows, first + 64, *rest)).to(self.case.dtype)[:, 64:]
        return (scale * self.randn(*self.case.shape)).to(self.case.dtype)

    @property
    def least_bytes(self) -> int:
        raise NotImplementedError

    @property
    def two_pass_bytes(self) -> int:
        """What an op moves that reads its inputs for sums and again for the gradient."""
        return self.least_bytes

    def torch_call(self, argument: Any) -> Outputs:
        """The eager way: what is compiled of it."""
        raise NotImplementedError

    def ways(self, compiled: TorchCall | None = None, checked: bool = False) -> dict[str, Call]:
        """released, eager, triton, and compiled, where `torch_call` comes compiled.

        `checked`: on the noise that `exact` has, where a way draws some.
        """
        raise NotImplementedError

    def as_on_gpu(self) -> dict[str, Call]:
        """The ways, for counting, without what an op does on a CPU only."""
        return self.ways()

    def exact(self) -> Outputs:
        raise NotImplementedError

    def tolerance(self, way: str, output: str) -> float:
        """Largest RMS error, relative to the RMS of the exact values."""
        raise NotImplementedError
