"""The kernels against the released scripts, eager torch and torch.compile: time, launches, bytes.

    ./run bench kernels [--op OP ...] [--quick] [--untimed] [--json] [--budget-seconds 480]

On a GPU: every case of benchmarks/core_ops/shapes.py, competitors in turn within one process, then
the targets with what was measured; writes results/kernels_gpu.csv and .png. On a CPU: the torch
paths of small cases (no claim about speed), what each path launches and moves, what our calls cost
the host beside their launches, and the machine code of every kernel for sm_90 and sm_100; writes
kernels_cpu.csv, kernels_counts.csv (.png), kernels_host.csv and kernels_compiled.csv. Both fill the
tables of benchmarks/README.md. A run of some ops, or a --quick one, writes nothing unless --out
names a folder; an --untimed one writes what no clock measures, kernels_counts and kernels_compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from campaign.exit_codes import UNFINISHED
from core_ops import report
from core_ops.cases import Case
from core_ops.counting import Counter
from core_ops.host import host_costs
from core_ops.machine import Machine, this_machine
from core_ops.measure import WAYS, measure, row_of, short
from core_ops.shapes import OPS, PROBLEMS, counted_cases, cpu_cases, gpu_cases
from core_ops.targets import verdicts
from pages import ROOT, fill

RESULTS = ROOT / "benchmarks" / "results"
CPU_WAYS = ("released", "eager", "copy")

Row = dict[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


LEFT_OUT = "left out"


def timed(
    cases: Sequence[Case], machine: Machine, seconds: float, quick: bool, before: Sequence[Row] = ()
) -> Iterator[list[Row]]:
    """Rows of each case; of those that the budget leaves no time for, a row that says so.

    `before`: what an earlier run has measured; it is not measured again.
    """
    known = report.by_case([r for r in before if not str(r["failure"]).startswith(LEFT_OUT)])
    ways = WAYS if machine.is_gpu else CPU_WAYS
    reps = 5 if quick or not machine.is_gpu else 50
    start = time.monotonic()
    for case in cases:
        if rows := known.get(report.case_of(case.names())):
            yield list(rows.values())
            continue
        name = " ".join(str(value) for value in case.names().values())
        if time.monotonic() - start > seconds:
            failure = {"failure": f"{LEFT_OUT}: the budget of {seconds:g} s was spent"}
            yield [row_of(case, "all", failure, machine.facts())]
            continue
        found = measure(case, machine, only=ways, reps=reps)
        times = (f"{r['way']} {r['median_us'] or r['failure']}" for r in found)
        say(f"{name}: {', '.join(times)}")
        yield found


def counted(cases: Sequence[Case], machine: Machine) -> list[Row]:
    """What each path launches, moves, allocates beyond its results, and waits for."""
    facts = machine.facts()
    rows = []
    for case in cases:
        problem = PROBLEMS[case.op](case, machine.device)
        for way, call in problem.as_on_gpu().items():
            row: Row = {**case.names(), "way": way, **dict.fromkeys(COUNTS, "")}
            try:
                with Counter() as count:
                    out = call()
                temporaries = count.allocated - count.kept(out)
                row |= {
                    "launches": count.launches, "triton_launches": count.triton_launches,
                    "bytes_per_element": round(count.bytes / case.elements, 1),
                    "temporaries_per_element": round(temporaries / case.elements, 1),
                    "least_per_element": round(problem.least_bytes / case.elements, 1),
                    "syncs": count.syncs,
                }  # fmt: skip
            except Exception as error:
                row["failure"] = short(error)
            rows.append({**row, **{n: facts[n] for n in ("torch", "triton", "revision", "date")}})
            say("  ".join(f"{k} {row[k]}" for k in ("op", "way", *COUNTS)))
    return rows


COUNTS = (
    "launches", "triton_launches", "bytes_per_element", "temporaries_per_element",
    "least_per_element", "syncs", "failure",
)  # fmt: skip


def machine_code(machine: Machine) -> list[Row]:
    """Every kernel compiled for GPUs that need not be here."""
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    facts = machine.facts()
    return [
        {**code, "per_element": round(code["per_element"], 1),
         **{name: facts[name] for name in ("triton", "revision", "date")}}
        for code in json.loads(done.stdout)
    ]  # fmt: skip


def fill_readme(folder: Path) -> None:
    """The tables of benchmarks/README.md, from the CSV files that are there."""
    page = ROOT / "benchmarks" / "README.md"
    tables = {
        "targets": report.targets_table, "gpu": report.speed_table, "cpu": report.cpu_table,
        "counts": report.counts_table, "host": report.host_table,
        "compiled": report.compiled_table,
    }  # fmt: skip
    for name, table in tables.items():
        rows = report.read(folder / f"kernels_{'gpu' if name == 'targets' else name}.csv")
        if rows or name == "targets":
            fill(page, f"kernels {name}", table(rows))
        else:
            fill(page, f"kernels {name}", report.NOT_YET)


def save(folder: Path, found: dict[str, list[Row]]) -> None:
    for name, rows in found.items():
        report.write(folder / f"kernels_{name}.csv", rows)
    drawings = {"gpu": report.draw_speed, "counts": report.draw_counts}
    for name in drawings.keys() & found.keys():
        drawings[name](report.read(folder / f"kernels_{name}.csv"), folder / f"kernels_{name}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--op", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--quick", action="store_true", help="two cases of an op, five reps")
    parser.add_argument("--untimed", action="store_true", help="what no clock measures alone")
    parser.add_argument("--json", action="store_true", help="all rows as JSON on stdout")
    parser.add_argument("--budget-seconds", type=float, default=480.0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out", type=Path, help="folder for the CSV files")
    parser.add_argument(
        "--resume", action="store_true", help="keep what --out has measured; exit code 4 if some "
        "cases are left"
    )  # fmt: skip
    options = parser.parse_args()
    folder = options.out or RESULTS
    machine = this_machine(options.device)
    whole = not options.quick and set(options.op) == set(OPS)
    found: dict[str, list[Row]] = {}
    if machine.is_gpu and not options.untimed:
        cases = gpu_cases(options.op, options.quick)
        before = report.read(folder / "kernels_gpu.csv") if options.resume else []
        found["gpu"] = []
        for rows in timed(cases, machine, options.budget_seconds, options.quick, before):
            found["gpu"] += rows
            if options.out:  # what is cut short keeps what it has
                report.write(folder / "kernels_gpu.csv", found["gpu"])
    else:
        cases = counted_cases(options.op, options.quick)
        if not options.untimed:
            say("on a CPU: the torch paths only, and no claim about speed")
            small = cpu_cases(options.op, options.quick)
            some = timed(small, machine, options.budget_seconds, options.quick)
            found["cpu"] = [row for rows in some for row in rows]
            found["host"] = list(host_costs(cases, machine))
        found["counts"] = counted(cases, machine)
        if whole:
            found["compiled"] = machine_code(machine)
    verdict = verdicts(found.get("gpu", []))
    if options.json:
        json.dump({**found, "targets": verdict}, sys.stdout, indent=1)
    else:
        print(report.targets_table(found.get("gpu", [])))
    if whole or options.out:
        save(folder, found)
    if whole and folder == RESULTS:
        fill_readme(RESULTS)
    left = any(str(row["failure"]).startswith(LEFT_OUT) for row in found.get("gpu", []))
    return UNFINISHED if options.resume and left else 0


if __name__ == "__main__":
    sys.exit(main())
