"""Words: a mid-size Flux that writes them, and GARDO's headline arms with a real OCR as the proxy.

    ./run words make                       pre-trains the models into runs/words/model; on a GPU
    ./run words arms                       trains no KL, uniform KL and GARDO on them, and a table
    ./run words make --small               about 1 M parameters and numbers of two digits, on a CPU
    ./run words arms --small
    ./run words estimate                   how long `make` takes on an H100, a model

Both go on where they were stopped; with `--seconds` they stop by themselves (exit code 4). What the
models are is in models.py, what they draw in world.py, an arm in its recipe beside them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from campaign.exit_codes import NEEDS_GPU, NEEDS_MORE, UNFINISHED
from gardo.recipe_errors import RecipeError
from gardo.rewards.ocr_reader import require
from pages import ROOT
from words import models
from words.arms import train
from words.fit import Cut
from words.make import Making, estimate, made, make
from words.tables import write

RUNS = ROOT / "runs" / "words"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "./run words", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("make", "arms", "estimate"))
    parser.add_argument("--small", action="store_true", help="for a CPU")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the models, or of the arms")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="where `make` left the models")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets")
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.seconds
    size = models.SIZES["small" if options.small else "full"]
    if options.command == "estimate":
        print(estimate(size))
        return 0
    if not (options.small or torch.cuda.is_available()):
        print("needs an NVIDIA GPU, or --small")
        return NEEDS_GPU
    try:
        require()
    except ValueError as error:
        print(error)
        return NEEDS_MORE
    default = RUNS / ("model-small" if options.small else "model")
    model = (options.model or default).resolve()
    try:
        if options.command == "make":
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            print(json.dumps(make(Making(size, options.out or model, device), until)))
        elif "ocr" not in (made(model) or {}):
            print(f"{model} has no finished models; `./run words make` makes them")
            return NEEDS_MORE
        else:
            out = (options.out or RUNS / f"arms-{size.name}").resolve()
            train(out / "runs", model, until, small=options.small, sets=options.sets)
            print(write(out))
    except Cut as cut:
        print(f"time is up; {cut}")
        return UNFINISHED
    except RecipeError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
