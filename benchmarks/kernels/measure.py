"""One case, all its competitors: parity first, then what a call costs, then the time, interleaved.

Whatever goes wrong with one competitor becomes its row's `failure`; the others go on. A case whose
Triton path fails its parity is not timed at all.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from .cases import BANDWIDTH, Call, Case, Outputs, Problem
from .machine import Machine
from .shapes import PROBLEMS

WAYS = (
    "released", "eager", "compiled", "triton", "compiled_graph", "triton_graph", "copy",
)  # fmt: skip
COLUMNS = (
    "op", "shape", "dtype", "gate", "layout", "elements", "way", "median_us", "p10_us", "p90_us",
    "reps", "flushed", "launches", "syncs", "peak_bytes", "least_bytes", "gbps", "percent_of_copy",
    "two_pass_bytes", "two_pass_percent", "error", "log_ratio_error", "repeatable", "failure",
    "device", "clock_sm_mhz", "clock_mem_mhz", "driver", "torch", "triton", "revision", "date",
)  # fmt: skip
REPEATS = 10
WARM_UP = 3

Row = dict[str, Any]


class ParityError(Exception):
    """The numbers are not those of the fp64 reference."""


def rms_error(ours: Tensor, exact: Tensor) -> float:
    """RMS of the difference, relative to the RMS of the exact values."""
    exact = exact.double()
    return float((ours.double() - exact).norm() / exact.norm())


def errors(problem: Problem, way: str, out: Outputs, exact: Outputs) -> Row:
    """The worst output's error, and the log-ratios' largest of a row. ParityError beyond the
    tolerance."""
    found: Row = {"error": 0.0, "log_ratio_error": ""}
    for name, value in exact.items():
        if name not in out:
            continue
        error = rms_error(out[name].detach(), value)
        if not error <= problem.tolerance(way, name):
            raise ParityError(f"parity: {name} is off by {error:.2e} of its size")
        if name == "log_ratio":
            relative_R = (out[name].double() - value).abs() / value.abs()
            found["log_ratio_error"] = f"{float(relative_R.max()):.3g}"
        elif name != "loss":
            found["error"] = max(found["error"], error)
    return {**found, "error": f"{found['error']:.3g}"}


def repeatable(call: Call) -> bool:
    first = {name: t.detach().clone() for name, t in call().items()}
    return all(
        torch.equal(t, first[name]) for _ in range(REPEATS - 1) for name, t in call().items()
    )


def short(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def copying(problem: Problem) -> Call:
    """A raw copy that moves the case's least bytes."""
    half = problem.least_bytes // 2
    source = torch.ones(half, dtype=torch.uint8, device=problem.device)
    target = torch.empty_like(source)

    def call() -> Outputs:
        target.copy_(source)
        return {}

    return call


def prepared(
    problem: Problem, machine: Machine, only: tuple[str, ...]
) -> Iterator[tuple[str, Call, Call] | tuple[str, Exception]]:
    """(way, call to time, call to check) of each competitor, or (way, error)."""
    compiled = machine.compiled(problem.torch_call) if "compiled" in only else None
    timed, checked = problem.ways(compiled), problem.ways(compiled, checked=True)
    for way in WAYS:
        plain = way.removesuffix("_graph")
        if way not in only or plain not in timed:
            continue
        if way == plain:
            yield way, timed[way], checked[way]
            continue
        try:
            # The graph of what is timed; where noise is drawn only the checked one can be checked.
            graphs = [machine.graph(call) for call in (timed[plain], checked[plain])]
            if all(graphs):
                yield way, *graphs  # type: ignore[misc]
        except Exception as error:
            yield way, error


def costs(machine: Machine, call: Call) -> Row:
    for _ in range(WARM_UP):
        call()
    launches, syncs = machine.launches_and_syncs(call)
    peak = machine.peak_bytes(call)
    return {"launches": launches, "syncs": syncs, "peak_bytes": "" if peak is None else peak}


def interleaved(
    machine: Machine, calls: dict[str, Call], *, flush: bool, reps: int, seconds: float
) -> dict[str, list[float]]:
    """Microseconds of each call: one rep of each in turn, in an order that moves on every time."""
    times: dict[str, list[float]] = {way: [] for way in calls}
    order = list(calls)
    start = time.monotonic()
    gc.disable()
    try:
        for rep in range(reps):
            for way in order:
                times[way].append(machine.microseconds(calls[way], flush=flush))
            order = order[1:] + order[:1]
            if rep >= 4 and time.monotonic() - start > seconds:
                break
    finally:
        gc.enable()
    return times


def add_times(rows: dict[str, Row], times: dict[str, list[float]], problem: Problem) -> None:
    for way, some in times.items():
        tenths = quantiles(some, n=10, method="inclusive")
        p10, median, p90 = (tenths[i] for i in (0, 4, 8))
        rows[way] |= {
            "median_us": round(median, 3), "p10_us": round(p10, 3), "p90_us": round(p90, 3),
            "reps": len(some), "gbps": round(problem.least_bytes / median / 1e3, 2),
        }  # fmt: skip
    if "copy" in times:
        copied = rows["copy"]["median_us"]
        for way in times:
            percent = 100 * copied / rows[way]["median_us"]
            moved = problem.two_pass_bytes / problem.least_bytes
            rows[way] |= {
                "percent_of_copy": round(percent, 1), "two_pass_percent": round(percent * moved, 1),
            }  # fmt: skip


def measure(
    case: Case, machine: Machine, *, only: tuple[str, ...] = WAYS, reps: int = 50,
    seconds: float = 4.0,
) -> list[Row]:  # fmt: skip
    """A row for each competitor, of COLUMNS; one for `all` where the case itself fails."""
    try:
        rows = compared(case, machine, only, reps, seconds)
    except Exception as error:
        rows = {"all": {"failure": short(error)}}
    facts = machine.facts()
    return [row_of(case, way, rows[way], facts) for way in (*WAYS, "all") if way in rows]


def compared(
    case: Case, machine: Machine, only: tuple[str, ...], reps: int, seconds: float
) -> dict[str, Row]:
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}
    problem = PROBLEMS[case.op](case, machine.device)
    exact = problem.exact()
    flush = problem.least_bytes > BANDWIDTH
    sizes = {"least_bytes": problem.least_bytes, "two_pass_bytes": problem.two_pass_bytes}
    for way, call, *check in prepared(problem, machine, only):
        rows[way] = {**sizes, "flushed": flush}
        try:
            if isinstance(call, Exception):
                raise call
            rows[way] |= errors(problem, way.removesuffix("_graph"), check[0](), exact)
            rows[way] |= {"repeatable": repeatable(check[0]), **costs(machine, call)}
            calls[way] = call
        except Exception as error:
            rows[way]["failure"] = short(error)
    del exact
    if "ParityError" in rows.get("triton", {}).get("failure", ""):
        calls = {}
    elif "copy" in only:
        rows["copy"] = {**sizes, "flushed": flush, "launches": 1, "syncs": 0}
        calls["copy"] = copying(problem)
        if machine.is_gpu:
            captured = machine.graph(calls["copy"])  # against graphs of its size: no launch to pay
            calls["copy"] = captured if captured is not None else calls["copy"]
    add_times(rows, interleaved(machine, calls, flush=flush, reps=reps, seconds=seconds), problem)
    return rows


def row_of(case: Case, way: str, found: Row, facts: Row) -> Row:
    whole = {**case.names(), "way": way, **found, **facts}
    return {name: whole.get(name, "") for name in COLUMNS}
