"""GARDO's toy: six arms in the plane, the same seeds in all, one figure and one table.

    ./run toy

Trains every arm of benchmarks/toy/toy.yaml with every seed on the real engine (two processes of one
thread), and writes benchmarks/results/toy.{csv,png}; toy.md beside them and recipes/README.md show
the table between their `toy` marks, which this script fills. `--draw` makes table and figure anew
from the CSV and from the positions that the last training left in runs/toy.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from safetensors.torch import load_file, save_file

from pages import ROOT, fill
from toy.figure import picture
from toy.seeds import of_all_seeds
from toy.tables import FIELDS, Comparison, claims, note, table, titles
from toy.world import load

SETTINGS = Path(__file__).with_name("toy.yaml")
RESULTS = ROOT / "benchmarks" / "results"
TABLE = RESULTS / "toy.csv"
POSITIONS = ROOT / "runs" / "toy" / "positions.safetensors"  # {arm: [B, 2]} of seed 0


def main() -> None:
    parser = argparse.ArgumentParser(
        "./run toy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draw", action="store_true", help="from the results that are there")
    options = parser.parse_args()
    toy = load(SETTINGS)
    if not options.draw:
        rows, places = of_all_seeds(toy)
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
    fill(RESULTS / "toy.md", "toy", text)
    image = "![samples of every arm, and the summary](../benchmarks/results/toy.png)"
    fill(ROOT / "recipes" / "README.md", "toy", f"{image}\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
