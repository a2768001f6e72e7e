"""What is launched, in the place of running it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from gardo_kernels import _launch


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # those of the kernel, and Triton's options


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Kernels are taken to run on any device, and none runs: their outputs are not written."""
    found: list[Launch] = []

    def interpreted(executor: GridExecutor, **arguments: Any) -> None:
        found.append(Launch(executor.fn, executor.grid, arguments))

    def launched(kernel: JITFunction, *, grid: Any, warmup: bool, **arguments: Any) -> None:
        found.append(Launch(kernel, grid, arguments))

    with (
        mock.patch.object(GridExecutor, "__call__", interpreted),
        mock.patch.object(JITFunction, "run", launched),
        mock.patch.object(_launch, "kernels_run_on", lambda device: True),
    ):
        yield found
