"""A measurement of the campaign: cases in order of worth, within a time, resumed where it stopped.

What a script writes is one CSV that grows as it is measured.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from core_ops.machine import Machine

from .exit_codes import NEEDS_GPU, UNFINISHED

FACTS = ("device", "clock_sm_mhz", "clock_mem_mhz", "driver", "torch", "triton", "revision", "date")

Row = dict[str, Any]


class Unavailable(Exception):
    """What was asked for is not on this machine; the reason is the message."""


class Table:
    """A CSV that grows as it is measured; a case whose rows are there is not measured again.

    A case is a frozen dataclass, its fields are columns. What was left out is forgotten on opening.
    """

    def __init__(self, file: Path, columns: Sequence[str]) -> None:
        self.file, self.columns = file, (*columns, "status", "note", *FACTS)
        self.rows: list[Row] = []
        if file.is_file():
            with file.open(newline="", encoding="utf-8") as opened:
                self.rows = [r for r in csv.DictReader(opened) if r["date"]]  # whole ones
        self.rows = [r for r in self.rows if r["status"] != "left out"]
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.part")
        with part.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        part.replace(file)

    def of(self, case: Any) -> list[Row]:
        fields = {name: str(value) for name, value in asdict(case).items()}
        return [r for r in self.rows if all(str(r[n]) == v for n, v in fields.items())]

    def add(self, case: Any, rows: Iterable[Row], facts: Row) -> None:
        new = [{**asdict(case), **row, **facts} for row in rows]
        with self.file.open("a", newline="", encoding="utf-8") as opened:
            csv.DictWriter(opened, self.columns).writerows(new)
        self.rows += new


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def attempt(measure: Callable[[], list[Row]]) -> list[Row]:
    """What `measure` gives, or a row that says why there is nothing."""
    try:
        return [{"status": "done", **row} for row in measure()]
    except Unavailable as error:
        return [{"status": "unavailable", "note": str(error)}]
    except Exception as error:
        full = isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)
        return [{"status": "out of memory" if full else "failed", "note": one_line(error)}]


class Bench(Protocol):
    """What measures cases, on its machine."""

    machine: Machine

    def measure(self, case: Any) -> list[Row]: ...
    def free(self) -> None:
        """Nothing of a case stays on the device. Raises where the device no longer answers."""

    def expected_s(self, case: Any) -> float:
        """Seconds a case takes, on the safe side."""


def measure_all(cases: Sequence[Any], table: Table, bench: Bench, until: float) -> None:
    """Every case that is not there yet and is expected to end by `until`, monotonic seconds."""
    for case in cases:
        if table.of(case):
            continue
        left, expected = until - time.monotonic(), bench.expected_s(case)
        if expected > left:
            note = f"{expected:.0f} s expected, {max(left, 0):.0f} s left"
            table.add(case, [{"status": "left out", "note": note}], bench.machine.facts())
            continue
        rows = attempt(partial(bench.measure, case))
        table.add(case, rows, bench.machine.facts())
        said = (str(value) for value in asdict(case).values() if value != "")
        print(*said, f"-> {rows[0]['status']}", rows[0].get("note", ""), flush=True)
        bench.free()


def tally(table: Table) -> str:
    """How many rows are in each state."""
    states = [row["status"] for row in table.rows]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def exit_code(table: Table) -> int:
    """Whether the time sufficed for all cases."""
    return UNFINISHED if any(row["status"] == "left out" for row in table.rows) else 0


def number(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}") if math.isfinite(value) else value


def run_script(
    name: str,
    doc: str | None,
    arguments: Sequence[str] | None,
    *,
    columns: Sequence[str],
    seconds: float,
    small: str,
    start: Callable[[argparse.Namespace], tuple[Sequence[Any], Bench]],
    report: Callable[[Table], str],
    options: dict[str, dict[str, Any]] | None = None,
) -> int:
    """The command line of a measurement, name.csv in its folder, and its exit code.

    `start` gives the cases and what measures them, for the parsed arguments; `options` are more of
    them, by name.
    """
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=seconds, help="start nothing longer")
    parser.add_argument("--small", action="store_true", help=small)
    for option, settings in (options or {}).items():
        parser.add_argument(option, **settings)
    parsed = parser.parse_args(arguments)
    if not (parsed.small or torch.cuda.is_available()):
        print("needs an NVIDIA GPU")
        return NEEDS_GPU
    table = Table(parsed.out / f"{name}.csv", columns)
    cases, bench = start(parsed)
    measure_all(cases, table, bench, began + parsed.seconds)
    print(report(table))
    return exit_code(table)
