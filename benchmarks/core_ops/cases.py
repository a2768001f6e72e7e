"""A case of the benchmark and what every op gives for it: the same numbers for all competitors.

A problem builds its inputs once; `ways()` gives each competitor as a call without arguments that
returns named tensors, of which `exact()` has the fp64 values. The ops' own are in problems/, a file
each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gardo_kernels._launch_shape import LaunchShape

Outputs = dict[str, Tensor]
Call = Callable[[], Outputs]
TorchCall = Callable[[Any], Outputs]

STEPS, NOISE_LEVEL = 6, 0.9  # Flow-GRPO's Flux recipe; the last step is not trained
SEED = 20251224
BANDWIDTH = 64 * 2**20  # bytes: more than this does not stay in the L2 cache
LAUNCH = 1_000_000  # elements: below this, launches rule
BATCHES = (1, 3, 9, 16, 64)
SAMPLES = ((1024, 64), (4096, 64), (16, 64, 64), (16, 128, 128))  # Flux and SD3.5, 512 and 1024 px
STACKED = 36  # four trained steps of nine samples


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

    @property
    def rows_and_elements(self) -> tuple[int, int]:
        """Rows, and elements of a row."""
        return self.shape[0], self.elements // self.shape[0]

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


HERE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


class Problem:
    """Inputs of a case on a device. `least_bytes`: every input and output once."""

    # Of an elementwise op: gate shares beside a tenth, cases of its own, all sizes or half of them.
    gates: tuple[float, ...] = (0.0, 1.0)
    special: tuple[tuple[tuple[int, ...], torch.dtype, str], ...] = ()
    every_size = False

    @classmethod
    def gpu_cases(cls, op: str) -> list[Case]:
        """The ones that targets speak of first: what a budget cuts off is the rest."""
        shape = (3, 1024, 64)
        samples, batches = (SAMPLES, BATCHES) if cls.every_size else (SAMPLES[:2], BATCHES[1::2])
        return [
            *(Case(op, shape), Case(op, (64, 4096, 64)), Case(op, shape, torch.float32)),
            *(Case(op, shape, dtype, layout=layout) for shape, dtype, layout in cls.special),
            Case(op, (STACKED, 1024, 64), layout="stacked"),
            Case(op, (3, 1023, 63), layout="odd"),
            Case(op, (16, 4096, 64), layout="slice"),
            Case(op, (64, 4096, 64), torch.float32),
            *(Case(op, (B, 1024, 64), gate=gate) for gate in cls.gates for B in (3, 64)),
            *(Case(op, (B, *sample)) for sample in samples for B in (*batches, BATCHES[-1])),
        ]

    @classmethod
    def cpu_cases(cls, op: str, quick: bool) -> list[Case]:
        """Small ones: they show that the paths run, not how fast."""
        shapes = [(2, 64, 16)] if quick else [(1, 1024, 64), (3, 1024, 64), (3, 16, 64, 64)]
        return [Case(op, shape) for shape in shapes]

    @classmethod
    def counted_case(cls, op: str, quick: bool) -> Case:
        """Launches do not depend on the size, bytes an element hardly: Flux at 512 px, B = 3."""
        return Case(op, (2, 64, 16) if quick else (3, 1024, 64))

    @classmethod
    def launched_as(cls, case: Case) -> str:
        """The name under which the case's launch shape is looked up."""
        return case.op

    @classmethod
    def launch_shapes(cls, case: Case) -> list[LaunchShape]:
        """What the sweep tries, the op's default first: blocks of 4 to 16 elements a thread."""
        return [
            LaunchShape(block=block, warps=warps)
            for block in (1024, 512, 2048, 4096)
            for warps in (4, 2, 8)
            if 4 <= block // (32 * warps) <= 16
        ]

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
