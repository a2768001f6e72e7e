"""The ops of this package, found by listing, and what the examples in their files share.

An op's file has `examples(on)`: calls of the op on small inputs that together launch all its
kernels, each with a name ("" for the main one) and its results, gradients included. `gardo doctor`
and compute-sanitizer run them, the tests compile for GPUs what they launch and count their grids.
"""

import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gardo_kernels._launch import Backend

Examples = Iterator[tuple[str, list[Tensor]]]


@dataclass(frozen=True)
class On:
    """Where examples run, and their samples' size and dtype."""

    backend: Backend
    device: torch.device
    dtype: torch.dtype = torch.float32
    rows: int = 4
    elements: int = 1500  # more than one block, and not a whole number of them

    def samples(self, count: int) -> list[Tensor]:
        """Random [rows, elements] each, the same every time."""
        draw = torch.Generator().manual_seed(0)
        shape = (count, self.rows, self.elements)
        return list(torch.randn(shape, generator=draw).to(self.device, self.dtype))

    def row_values(self, first: float, last: float) -> Tensor:
        """[rows] fp32."""
        return torch.linspace(first, last, self.rows, device=self.device)

    def row_index(self) -> Tensor:
        return torch.arange(self.rows, device=self.device)


def with_gradient(out: Any, v: Tensor) -> list[Tensor]:
    """What a loss gave for each row, the loss, and its gradient to v, of order 1."""
    out.loss.backward()
    assert v.grad is not None
    return [x.detach() for x in vars(out).values()] + [v.grad * v.numel()]


def op_modules() -> dict[str, ModuleType]:
    """Every op's file that has examples, by its name, which is the op's."""
    import gardo_kernels

    names = sorted(found.name for found in pkgutil.iter_modules(gardo_kernels.__path__))
    modules = {
        name: import_module(f"gardo_kernels.{name}") for name in names if not name.startswith("_")
    }
    return {name: module for name, module in modules.items() if hasattr(module, "examples")}
