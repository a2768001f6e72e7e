"""GARDO against its base and its parts on the built-in tiny Flux, over seeds.

    ./run study                     trains the cells (arm x seed) of protocol.yaml that are missing
    ./run study --quick             the headline arms on two seeds
    ./run study --draw              tables, figures and pages from the raw metrics that are there

A cell trains in a process of its own on one rank; on a CPU with one thread, so that two run side by
side on two cores. It leaves its raw metrics in --out; there it is found again and not trained
twice. A cell that was cut goes on from its newest checkpoint in --runs. So the study may be stopped
and started again, cell by cell.
"""

from __future__ import annotations

import argparse
import signal
import time
from pathlib import Path

from gardo.selftest.forked import Launched
from pages import ROOT
from study import cell as one_cell
from study import raw
from study.protocol import Cell, load
from study.report import RESULTS, draw

HERE = Path(__file__).parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "./run study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--protocol", type=Path, default=HERE / "protocol.yaml", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="its quick arms and seeds alone")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="these alone")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="these alone")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time")
    parser.add_argument("--draw", action="store_true", help="train nothing")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "study", metavar="FOLDER")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="else the protocol's results")
    return parser.parse_args()


def train(cells: list[Cell], runs: Path, out: Path, jobs: int) -> None:
    """Trains the cells that have left no raw metrics yet. Cut off, it takes them along."""
    waiting = [cell for cell in cells if raw.known(out, cell) is None]
    print(f"{len(waiting)} of {len(cells)} cells to train", flush=True)
    running: dict[str, tuple[Launched, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                launched = Launched(0, one_cell.run, cell, runs, out)
                running[cell.name] = launched, time.monotonic()
            time.sleep(0.2)
            for name, (launched, start) in list(running.items()):
                if launched.processes[0].is_alive():
                    continue
                del running[name]
                (end,) = launched.ended()
                if end.code:
                    raise SystemExit(f"{name}: exit code {end.code}\n{end.said[-3000:]}")
                print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    finally:
        for launched, _ in running.values():
            launched.kill(signal.SIGTERM)
            launched.ended(30)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: exit(128 + number))
    options = arguments()
    protocol = load(options.protocol)
    out = (options.out or RESULTS / protocol.results).resolve()
    cells = [
        cell
        for cell in protocol.cells(quick=options.quick)
        if (not options.arms or cell.arm in options.arms)
        and (not options.seeds or cell.seed in options.seeds)
    ]
    if not options.draw:
        train(cells, options.runs.resolve(), out / "cells", options.jobs)
    print(draw(protocol, cells, out))


if __name__ == "__main__":
    main()
