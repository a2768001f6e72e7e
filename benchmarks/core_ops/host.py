"""What a call of ours costs the host beside its launches: every launch of a kernel is taken away.

`eager` is the call as it is made, `custom op` the one that a compiler or a dispatch mode would see.
Both are the host's time alone: seconds of the calling thread, not of the clock, because others may
share its core.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib import import_module
from statistics import quantiles
from typing import Any
from unittest import mock

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from gardo_kernels import _block_op, _row_loss
from gardo_kernels._examples import op_modules

from .cases import Call, Case
from .machine import Machine
from .shapes import PROBLEMS

WARM_UP, CALLS = 50, 20  # calls at a time: a clock is read in a fiftieth of one
Row = dict[str, Any]


@contextmanager
def without_launches() -> Iterator[None]:
    """And without the look at values that `sde_step` takes on a CPU alone."""

    def nothing(*arguments: Any, **named: Any) -> None:
        return None

    with (
        mock.patch.object(InterpretedFunction, "run", nothing),
        mock.patch.object(JITFunction, "run", nothing),
        mock.patch.object(import_module("gardo_kernels.sde_step"), "_check_values", nothing),
    ):
        yield


@contextmanager
def as_custom_ops() -> Iterator[None]:
    """As if something looked on."""
    with ExitStack() as stack:
        for module in (_row_loss, _block_op, *op_modules().values()):
            if hasattr(module, "looked_on"):
                stack.enter_context(mock.patch.object(module, "looked_on", lambda: True))
        yield


def microseconds(call: Call, reps: int) -> list[float]:
    """Of a call, as means of CALLS."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(reps):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        times.append(1e6 * (time.thread_time() - start) / CALLS)
    return times


def host_costs(cases: list[Case], machine: Machine, reps: int = 50) -> Iterator[Row]:
    """Two rows a case; of a loss a call is forward and backward."""
    facts = machine.facts()
    for case in cases:
        call = PROBLEMS[case.op](case, machine.device).ways()["triton"]
        for way, path in (("eager", nullcontext), ("custom op", as_custom_ops)):
            with without_launches(), path():
                tenths = quantiles(microseconds(call, reps), n=10, method="inclusive")
            p10, median, p90 = (round(tenths[i], 1) for i in (0, 4, 8))
            row = {"op": case.op, "way": way, "median_us": median, "p10_us": p10, "p90_us": p90}
            names = ("device", "torch", "triton", "revision", "date")
            yield {**row, "reps": reps, **{name: facts[name] for name in names}}
