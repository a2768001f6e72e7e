"""Where an iteration's seconds go, and what they are against other ways to run it.

    ./run bench step RECIPE [--set FIELD=VALUE ...] [--against SIDE ...] [--gpus N]
    ./run bench step                                the committed cases, on a CPU: about 45 minutes
    ./run bench step --case flux_wide --out FILE    FLUX.1-dev's width, a fifth of its depth: a GPU
    ./run bench step --case flux_wide_ways --out F  the same: compiled, folded, by our kernels

A side is `ours` (the recipe as it is), `released` (the released scripts' procedure,
step/released.py), `strong` (torch's own operators, compiled blocks on a GPU, gated reference), or
ours with one thing changed (step/ours.py; --list names them). Each launch is a process of its own,
the sides in turns, because two launches of one side differ by up to 10 %; of every launch the first
iteration is left out. A side's seconds are the median over launches of their medians, and what it
gains the median over turns. FLOPs are counted from the shapes of modules and checked against
torch's counter; what they predict stands beside what was measured, for Flux on a GPU together with
the bytes that each way to run its blocks moves (block_traffic.py, a model).

Without a RECIPE writes results/step.csv and its tables in benchmarks/README.md; `--case` measures
its cases again and leaves the others' rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import real_width
from block_traffic import seconds as seconds_of
from core_ops.report import read, write
from pages import ROOT, fill, revision
from step.models import make
from step.ours import SIDES

RESULTS = ROOT / "benchmarks" / "results" / "step.csv"
FORWARD, TRAINED = ("sample", "teachers"), ("probe", "train")
STEP = ROOT / "benchmarks" / "step"


@dataclass(frozen=True)
class Case:
    recipe: Path
    sides: tuple[str, ...]  # beside ours
    sets: tuple[str, ...] = ()
    model: str = ""  # a family, whose model step/models.py makes
    gpus: int = 1


ZERO = ("distributed.engine=zero", "distributed.stage=3")
HUB, WIDE = "black-forest-labs/FLUX.1-dev", (4, 8)  # blocks of each kind, of 19 and 38
WAYS = ("compiled", "folded", "block_kernels", "compiled_folded", "kernels_folded")
CASES = {
    "flux": Case(STEP / "flux.yaml", ("released", "reference_everywhere"), model="flux"),
    "flux_zero3": Case(STEP / "flux.yaml", ("released", "reference_everywhere"), ZERO, "flux"),
    "sd3": Case(STEP / "sd3.yaml", ("released", "all_rows"), model="sd3"),
    "flux_ways": Case(STEP / "flux.yaml", WAYS, model="flux"),
}
# FLUX.1-dev's width in bf16, for a GPU
WIDE_CASE = Case(
    STEP / "flux.yaml",
    ("released", "strong", "reference_everywhere"),
    ("model.size=[512, 512]", "model.text_tokens=128", "distributed.engine=zero",
     "distributed.stage=1", "distributed.precision=bfloat16"),
    HUB,
)  # fmt: skip
ALL_CASES = {
    **CASES, "flux_wide": WIDE_CASE, "flux_wide_ways": replace(WIDE_CASE, sides=WAYS)
}  # fmt: skip


# ---- one launch ----------------------------------------------------------------------------------


def command(case: Case, side: str, out: Path, iterations: int, count: bool) -> list[str]:
    module = "step.released" if side == "released" else "step.ours"
    told = [str(case.recipe), "--iterations", str(iterations), "--out", str(out)]
    told += [part for one in case.sets for part in ("--set", one)]
    told += [] if side == "released" else ["--side", side]
    told += ["--count"] if count else []
    if case.gpus == 1:
        return [sys.executable, "-m", module, *told]
    launcher = ["-m", "deepspeed.launcher.runner", "--log_level", "error",
                "--num_gpus", str(case.gpus), "--master_port", str(29300 + os.getpid() % 300),
                "--module", module]  # fmt: skip
    return [sys.executable, *launcher, *told]


def launch(
    case: Case, side: str, folder: Path, iterations: int, *, count: bool = False
) -> dict[str, Any]:
    """What the side's process wrote."""
    here = [str(ROOT / name) for name in ("benchmarks", "engine", "kernels")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [*here, os.environ.get("PYTHONPATH", "")])),
    }
    out = Path(tempfile.mkdtemp(dir=folder)) / f"{side}.json"
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        command(case, side, out, iterations, count), env=environment, cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-6000:] + f"\n{side}: exit {done.returncode}")
    record: dict[str, Any] = json.loads(out.read_text())
    return record


# ---- what it says --------------------------------------------------------------------------------


@dataclass
class Measured:
    """The launches of one side; iterations as `normal` leaves them."""

    launches: list[list[dict[str, Any]]] = field(default_factory=list)
    told: dict[str, Any] = field(default_factory=dict)  # what the last process said beside them
    counts: dict[str, Any] = field(default_factory=dict)  # of the process that counted

    @property
    def seconds(self) -> list[float]:
        """Of an iteration, by launch: the median."""
        return [median(sum(i["seconds"].values()) for i in launch) for launch in self.launches]

    def mean(self, kind: str) -> dict[str, float]:
        """`seconds`, `calls` or `rows` of an iteration, by phase: medians."""
        every = [iteration[kind] for launch in self.launches for iteration in launch]
        names = dict.fromkeys(name for one in every for name in one)
        return {name: median(one.get(name, 0) for one in every) for name in names}

    def of_rows(self, of_row: dict[str, float], trained: str = "executed") -> float:
        """FLOPs or bytes of an iteration, `trained` being what a trained row costs."""
        rows = self.mean("rows")
        forward = sum(rows.get(name, 0) for name in FORWARD) * of_row["forward"]
        return forward + sum(rows.get(name, 0) for name in TRAINED) * of_row[trained]


def measured(
    case: Case, launches: int, iterations: int, folder: Path
) -> Iterator[dict[str, Measured]]:
    """All sides, in turns; after each turn, what there is."""
    sides = {side: Measured() for side in ("ours", *case.sides)}
    for side, kept in sides.items():
        kept.counts = launch(case, side, folder, iterations=3, count=True)
        kept.counts["rows"] = kept.counts["iterations"][-1]["rows"]
    for turn in range(launches):
        for side, kept in sides.items():
            record = launch(case, side, folder, iterations)
            kept.launches.append(record.pop("iterations")[1:])
            kept.told = record
            print(f"  turn {turn + 1}, {side}: {kept.seconds[-1]:.3f} s", flush=True)
        yield sides


def rows_of(name: str, case: Case, sides: dict[str, Measured]) -> Iterator[dict[str, Any]]:
    """CSV rows: an `iteration` for each side and launch, and each phase of a side."""
    ours = sides["ours"]
    of_row, rate, peak = ours.counts["row_flops"], ours.told["matmul_rate"], ours.told["peak_flops"]
    place = {
        "device": ours.told["device"], "ranks": ours.told["ranks"],
        "threads": os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()),
        "torch": torch.__version__, "revision": revision(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    for side, kept in sides.items():
        executed, useful = kept.of_rows(of_row), kept.of_rows(of_row, "training")
        images = kept.mean("rows")["decode"]
        counted = kept.counts
        for turn, seconds in enumerate(kept.seconds, start=1):
            yield {
                "case": name, "side": side, "launch": turn, "phase": "iteration",
                "seconds": round(seconds, 4), "calls": "", "rows": "",
                "against_ours": round(seconds / ours.seconds[turn - 1], 4),
                "predicted_against_ours": round(predicted(kept, ours, of_row), 4),
                "images_per_second_per_gpu": round(images / seconds, 3),
                "gflop": round(executed / 1e9, 1),
                "gflop_counted": round(counted["flops"] / 1e9, 1),
                "gflop_of_counted": round(of_counted(counted, of_row) / 1e9, 1),
                "mfu_model": round(useful / seconds / peak, 4) if peak else "",
                "mfu_executed": round(executed / seconds / rate, 4),
                "matmul_gflops": round(rate / 1e9, 1),
                "peak_gb": round(kept.told["peak_bytes"] / 1e9, 3),
                "launches": counted["launches"], "waits": counted["waits"],
                **place,
            }  # fmt: skip
        phases, calls, rows = (kept.mean(kind) for kind in ("seconds", "calls", "rows"))
        for phase, seconds in phases.items():
            yield {
                "case": name, "side": side, "launch": "", "phase": phase,
                "seconds": round(seconds, 4), "calls": calls.get(phase, ""),
                "rows": rows.get(phase, ""), **place,
            }  # fmt: skip


def predicted(side: Measured, ours: Measured, of_row: dict[str, float]) -> float:
    """What the side's seconds are of ours by FLOPs; by bytes too, where both sides know theirs."""
    both = side.told.get("row_bytes"), ours.told.get("row_bytes")
    each = [
        seconds_of(kept.of_rows(of_row), kept.of_rows(moved) if all(both) else 0.0)
        for kept, moved in zip((side, ours), both, strict=True)
    ]
    return each[0] / each[1]


def of_counted(counted: dict[str, Any], of_row: dict[str, float]) -> float:
    """What the shapes of modules say of the iteration that torch's counter saw."""
    kept = Measured([[{"rows": counted["rows"]}]])
    return kept.of_rows(of_row)


# ---- tables --------------------------------------------------------------------------------------


def sides_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a case and side: seconds, what they are of ours, what is predicted, counts."""
    lines = [
        "| case | side | s an iteration | of ours | predicted | images/s | MFU, executed "
        "| GFLOP by shapes / counted | launches | waits | peak GB |",
        "|---" * 11 + "|",
    ]
    keys = dict.fromkeys((row["case"], row["side"]) for row in rows)
    for key in keys:
        of = [r for r in rows if (r["case"], r["side"]) == key and r["phase"] == "iteration"]

        def middle(name: str, of: list[dict[str, Any]] = of) -> float:
            return median(float(row[name]) for row in of)

        ratios = sorted(float(row["against_ours"]) for row in of)
        spread = "" if key[1] == "ours" else f" ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        last = of[-1]
        lines.append(
            f"| {key[0]} | `{key[1]}` | {middle('seconds'):.2f} | {middle('against_ours'):.3f}"
            f"{spread} | {middle('predicted_against_ours'):.3f} "
            f"| {middle('images_per_second_per_gpu'):.2f} | {middle('mfu_executed'):.2f} "
            f"| {last['gflop_of_counted']} / {last['gflop_counted']} "
            f"| {last['launches']} | {last['waits']} | {last['peak_gb']} |"
        )
    return "\n".join(lines)


def gains_table(rows: Sequence[dict[str, Any]]) -> str:
    """What ours saves of each other side's seconds, and how much of what was promised that is."""
    lines = [
        "| case | beside | ours takes | saved | promised | kept of it | phases but `other` |",
        "|---" * 7 + "|",
    ]
    phases = {}
    for row in rows:
        if row["side"] == "ours" and row["phase"] != "iteration":
            phases.setdefault(row["case"], {})[row["phase"]] = float(row["seconds"])
    of_sides: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["phase"] == "iteration" and row["side"] != "ours":
            of_sides.setdefault((row["case"], row["side"]), []).append(row)
    for (case, side), of in of_sides.items():
        takes = median(1 / float(row["against_ours"]) for row in of)
        promised = 1 - 1 / float(of[0]["predicted_against_ours"])
        kept = f"{100 * (1 - takes) / promised:.0f} %" if promised else ""
        known = 1 - phases[case]["other"] / sum(phases[case].values())
        lines.append(
            f"| {case} | `{side}` | {takes:.3f} | {100 * (1 - takes):.1f} % "
            f"| {100 * promised:.1f} % | {kept} | {100 * known:.2f} % |"
        )
    return "\n".join(lines)


def phases_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a phase of ours, for every case: seconds, share, calls, rows."""
    lines = ["| case | phase | s | share | calls | rows |", "|---" * 6 + "|"]
    of = [r for r in rows if r["side"] == "ours" and r["phase"] != "iteration"]
    for row in of:
        total = sum(float(r["seconds"]) for r in of if r["case"] == row["case"])
        share = float(row["seconds"]) / total
        lines.append(
            f"| {row['case']} | {row['phase']} | {float(row['seconds']):.3f} | {100 * share:.1f} % "
            f"| {row['calls']} | {row['rows']} |"
        )
    return "\n".join(lines)


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """All of them, and where they were measured."""
    places: dict[str, list[str]] = {}
    for row in rows:
        place = (
            f"on a {row['device']} with {row['threads']} threads, torch {row['torch']}, "
            f"at revision {row['revision']}, {row['date']}"
        )
        cases = places.setdefault(place, [])
        cases += [row["case"]] * (row["case"] not in cases)
    measured_on = "\n".join(f"{', '.join(names)}: measured {p}." for p, names in places.items())
    return "\n\n".join([sides_table(rows), gains_table(rows), phases_table(rows), measured_on])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recipe", nargs="?", type=Path, help="the committed cases if left out")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets")
    parser.add_argument("--against", "--baseline", nargs="+", default=[], metavar="SIDE",
                        choices=["released", *SIDES])  # fmt: skip
    parser.add_argument("--gpus", type=int, default=1, help="ranks, by the deepspeed launcher")
    parser.add_argument("--case", nargs="+", choices=sorted(ALL_CASES), default=list(CASES))
    parser.add_argument("--launches", type=int, default=4)
    parser.add_argument("--iterations", type=int, default=4, help="of a launch, with the first")
    parser.add_argument("--out", type=Path, help="the CSV; results/step.csv for the cases")
    parser.add_argument("--redraw", action="store_true", help="the tables again, from the CSV")
    parser.add_argument("--list", action="store_true", help="what the sides are")
    options = parser.parse_args()
    if options.list:
        said = {"released": "the released scripts' procedure"} | {
            n: s.what for n, s in SIDES.items()
        }
        print("\n".join(f"{name:22} {what}" for name, what in said.items()))
        return
    if options.redraw:
        fill(ROOT / "benchmarks" / "README.md", "step", tables(read(RESULTS)))
        return
    if options.recipe:
        case = Case(options.recipe.resolve(), tuple(options.against), tuple(options.sets),
                    gpus=options.gpus)  # fmt: skip
        cases = {options.recipe.stem: case}
    else:
        cases = {name: ALL_CASES[name] for name in options.case}
    path = options.out or (None if options.recipe else RESULTS)
    kept = [row for row in read(RESULTS) if row["case"] not in cases] if path == RESULTS else []
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, case in cases.items():
            print(name, flush=True)
            rows = done
            ready = with_model(case, Path(scratch))
            for sides in measured(ready, options.launches, options.iterations, Path(scratch)):
                rows = [*done, *rows_of(name, ready, sides)]
                if path:
                    write(path, [*kept, *rows])
            done = rows
    print(tables(done))
    if path == RESULTS:
        fill(ROOT / "benchmarks" / "README.md", "step", tables(read(path)))


def with_model(case: Case, scratch: Path) -> Case:
    """The case with its model made."""
    if not case.model:
        return case
    folder = scratch / case.model.replace("/", "--")
    if not folder.is_dir() and case.model == HUB:
        real_width.make(HUB, folder, WIDE)
    elif not folder.is_dir():
        make(case.model, folder)
    return replace(case, sets=(*case.sets, f"model.path={folder}"))


if __name__ == "__main__":
    main()
