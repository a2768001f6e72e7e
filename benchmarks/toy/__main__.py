"""GARDO's toy: six arms in the plane, the same seeds in all, one figure and one table.

    ./run toy
    ./run toy --layout centre

Trains every arm of benchmarks/toy/toy.yaml with every seed on the real engine (two processes of one
thread), and writes benchmarks/results/toy.{csv,png}; toy.md beside them and recipes/README.md show
the table between their `toy` marks, which this script fills. `--draw` makes table and figure anew
from the CSV and from the positions that the last training left in runs/toy. `--layout centre` asks
a second question, of benchmarks/toy/centre.yaml, and writes benchmarks/results/toy_centre.csv and
the tables of toy.md between its `toy_centre` marks; it takes longer, and may be cut: `--resume`.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from safetensors.torch import load_file, save_file

from pages import ROOT, fill
from toy import centre, centre_tables
from toy.figure import picture
from toy.seeds import of_all_seeds
from toy.tables import FIELDS, Comparison, claims, note, table, titles
from toy.world import Toy, load

HERE = Path(__file__).parent
RESULTS = ROOT / "benchmarks" / "results"
TABLE = RESULTS / "toy.csv"
CENTRE_TABLE = RESULTS / "toy_centre.csv"
PAGE = RESULTS / "toy.md"
POSITIONS = ROOT / "runs" / "toy" / "positions.safetensors"  # {arm: [B, 2]} of seed 0


def main() -> None:
    parser = argparse.ArgumentParser(
        "./run toy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layout", choices=("toy", "centre"), default="toy")
    parser.add_argument("--draw", action="store_true", help="from the results that are there")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--resume", action="store_true", help="centre: only the missing seeds")
    options = parser.parse_args()
    if options.resume and options.layout == "toy":
        parser.error("--resume is for --layout centre: the toy's seeds are run together")
    {"toy": toy_page, "centre": centre_page}[options.layout](load(HERE / "toy.yaml"), options)


def toy_page(toy: Toy, options: argparse.Namespace) -> None:
    if not options.draw:
        rows, places = of_all_seeds(toy, options.processes)
        POSITIONS.parent.mkdir(parents=True, exist_ok=True)
        save_file(places, POSITIONS)
        with TABLE.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    comparison = Comparison.read(TABLE)
    places = load_file(POSITIONS)
    picture(toy.layout, titles(toy), places, comparison.values, RESULTS / "toy.png")
    text = "\n\n".join([table(comparison, toy), claims(comparison, toy), note(toy, TABLE)])
    fill(PAGE, "toy", text)
    image = "![samples of every arm, and the summary](../benchmarks/results/toy.png)"
    fill(ROOT / "recipes" / "README.md", "toy", f"{image}\n\n{text}")
    print(text)


def centre_page(toy: Toy, options: argparse.Namespace) -> None:
    question = centre.load_question(HERE / "centre.yaml")
    if not options.draw:
        centre.of_all_seeds(
            question, toy, CENTRE_TABLE, processes=options.processes, resume=options.resume
        )
    text = centre_tables.page(centre.read(CENTRE_TABLE), question, toy)
    fill(PAGE, "toy_centre", text)
    print(text)


if __name__ == "__main__":
    main()
