"""The best launch shape of every op, by size: block, chunk, rows, warps, stages.

    python -m campaign.shapes --out FOLDER [--seconds 150] [--op OP ...] [--small]

A row of shapes.csv is one shape of one op at one size: its error against fp64 first, then its time
as a CUDA graph, all shapes of a size in turn. A size is measured once, and then known. What was
right and faster than the default by more than 3 % stands in FOLDER/launch_shapes.json: with it in
the place of kernels/gardo_kernels/launch_shapes.json the ops take it. Rows of that file for other
GPUs are kept.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import quantiles
from typing import Any

import torch

from core_ops.cases import BANDWIDTH, Call, Case, Outputs
from core_ops.machine import Machine, this_machine
from core_ops.measure import errors, interleaved
from core_ops.report import place
from core_ops.shapes import OPS, PROBLEMS, gpu_cases
from gardo_kernels._launch_shape import (
    FILE,
    Key,
    LaunchShape,
    capability,
    measured_note,
    measured_shapes,
    size_class,
    trying,
    write_shapes,
)

from .table import Row, Table, one_line, run_script, tally

COLUMNS = (
    "op", "shape", "dtype", "launched_as", "capability", "up_to", *LaunchShape._fields,
    "default", "error", "median_us", "p10_us", "p90_us", "reps",
)  # fmt: skip
GAIN = 1.03  # how many times faster than the default a shape must be: less is noise
REPS, SECONDS = 20, 6.0
COMPILING = 2.0  # seconds of a shape's kernels, on the safe side


@dataclass(frozen=True)
class Size:
    """A case of the benchmark, and where its launch shape is looked up."""

    op: str
    shape: str
    dtype: str
    launched_as: str
    capability: str
    up_to: int

    @property
    def case(self) -> Case:
        shape = tuple(int(part) for part in self.shape.split("x"))
        return Case(self.op, shape, getattr(torch, self.dtype))

    @property
    def key(self) -> Key:
        return (self.launched_as, self.capability, self.up_to)


def sizes(cases: Sequence[Case], device: torch.device) -> list[Size]:
    """One plain case of each op and size class, the first of them; all of an op in one dtype."""
    found: dict[Key, Size] = {}
    dtypes: dict[str, torch.dtype] = {}
    for case in cases:
        dtype = dtypes.setdefault(case.op, case.dtype)
        if (case.layout, case.gate, case.dtype) != ("plain", 0.1, dtype):
            continue
        names = case.names()
        size = Size(
            case.op, names["shape"], names["dtype"], PROBLEMS[case.op].launched_as(case),
            capability(device), size_class(1, case.elements),
        )  # fmt: skip
        found.setdefault(size.key, size)
    return list(found.values())


class Bench:
    """Compares the launch shapes of a size; `few` of them in a rehearsal."""

    def __init__(self, machine: Machine, few: int | None = None) -> None:
        self.machine, self.few = machine, few

    def expected_s(self, size: Size) -> float:
        """By estimate, not yet by measurement."""
        shapes = PROBLEMS[size.op].launch_shapes(size.case)[: self.few]
        return SECONDS + COMPILING * len(shapes) if self.machine.is_gpu else 0.0

    def free(self) -> None:
        if self.machine.is_gpu:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def measure(self, size: Size) -> list[Row]:
        """A row a shape, the default first; the times of those that are right."""
        problem = PROBLEMS[size.op](size.case, self.machine.device)
        call, exact = problem.ways()["triton"], problem.exact()
        check = problem.ways(checked=True)["triton"]
        rows: list[Row] = []
        calls: dict[str, Call] = {}
        for shape in problem.launch_shapes(size.case)[: self.few]:
            row: Row = {**shape._asdict(), "default": not rows}
            rows.append(row)
            try:
                with trying(size.key, shape):
                    row["error"] = errors(problem, "triton", check(), exact)["error"]
                    captured = self.machine.graph(call)
                calls[str(len(rows) - 1)] = captured or partial(taking, size.key, shape, call)
            except Exception as error:  # too much shared memory, wrong numbers, ...
                row |= {"status": "failed", "note": one_line(error)}
        flush = problem.least_bytes > BANDWIDTH
        times = interleaved(self.machine, calls, flush=flush, reps=REPS, seconds=SECONDS)
        for index, some in times.items():
            tenths = quantiles(some, n=10, method="inclusive")
            p10, median, p90 = (round(tenths[i], 3) for i in (0, 4, 8))
            rows[int(index)] |= {
                "median_us": median, "p10_us": p10, "p90_us": p90, "reps": len(some)
            }  # fmt: skip
        return rows


def taking(key: Key, shape: LaunchShape, call: Call) -> Outputs:
    with trying(key, shape):
        return call()


def winners(rows: Sequence[Mapping[str, Any]]) -> dict[Key, LaunchShape]:
    """Of each size the fastest shape, where it is faster than the default by more than noise."""
    timed: dict[Key, list[Mapping[str, Any]]] = {}
    for row in rows:
        if str(row["status"]) == "done" and row["median_us"] not in ("", None):
            key = (str(row["launched_as"]), str(row["capability"]), int(row["up_to"]))
            timed.setdefault(key, []).append(row)
    best = {}
    for key, some in timed.items():
        fastest = min(some, key=lambda row: float(row["median_us"]))
        default = [float(row["median_us"]) for row in some if str(row["default"]) == "True"]
        if not default or default[0] > GAIN * float(fastest["median_us"]):
            best[key] = LaunchShape(*(int(fastest[name]) for name in LaunchShape._fields))
    return best


def write_winners(table: Table) -> str:
    """launch_shapes.json beside the table: what won, and the present rows of other GPUs."""
    swept = {str(row["capability"]) for row in table.rows if row.get("capability")}
    kept = {key: shape for key, shape in measured_shapes().items() if key[1] not in swept}
    won = winners([{"median_us": "", **row} for row in table.rows])
    here = [place(row) for row in table.rows if row["status"] == "done"][-1:]
    text = write_shapes(kept | won, "; ".join([measured_note()] * bool(kept) + here) or "nothing")
    (table.file.parent / FILE.name).write_text(text, encoding="utf-8")
    lines = [f"{op} sm {sm} up to {up_to}: {shape}" for (op, sm, up_to), shape in won.items()]
    return "\n".join([*lines, f"{tally(table)}; {len(won)} sizes gain from another shape"])


def main(arguments: Sequence[str] | None = None) -> int:
    def start(options: argparse.Namespace) -> tuple[list[Size], Bench]:
        machine = this_machine("auto")
        cases = gpu_cases(options.op, quick=False)
        if options.small:
            cases = [PROBLEMS[op].cpu_cases(op, quick=True)[0] for op in options.op]
        return sizes(cases, machine.device), Bench(machine, 3 if options.small else None)

    ops = {"nargs": "+", "choices": OPS, "default": list(OPS)}
    return run_script(
        "shapes", __doc__, arguments, columns=COLUMNS, seconds=150.0,
        small="tiny inputs and three shapes of each, on any machine", start=start,
        report=write_winners, options={"--op": ops},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
