"""The rulers: how fast this GPU copies, and multiplies bf16 matrices of random numbers.

    python -m campaign.ceilings --out FOLDER        writes ceilings.csv

Bytes of a copy are read and written; FLOPs of an n x n x n product are 2 n^3. Medians of 20.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from core_ops.machine import this_machine

from .exit_codes import NEEDS_GPU

COPIES = (64, 512, 4096)  # MiB of the source
MATRICES = (4096, 8192, 16384)
REPS = 20


def cases(device: torch.device) -> Iterator[tuple[str, int, float, str, Callable[[], Any]]]:
    """(what, size, work of a call, unit a second once divided by 1e12, call)."""
    for mebibytes in COPIES:
        source = torch.randn(mebibytes << 18, device=device)
        target = torch.empty_like(source)
        work = 2.0 * source.nbytes
        yield "copy", mebibytes, work, "TB/s", lambda t=target, s=source: t.copy_(s)
    for n in MATRICES:
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        yield "matmul bf16", n, 2.0 * n**3, "TFLOP/s", lambda a=a, b=b: a @ b


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs an NVIDIA GPU")
        return NEEDS_GPU
    machine = this_machine("cuda")
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "ceilings.csv").open("w", newline="", encoding="utf-8") as file:
        writer: Any = None
        for what, size, work, unit, call in cases(machine.device):
            for _ in range(3):
                call()
            times = [machine.microseconds(call, flush=False) for _ in range(REPS)]
            rate = work / median(times) / 1e6
            row = {"what": what, "size": size, "rate": round(rate, 3), "unit": unit,
                   "least_us": round(min(times), 2), "most_us": round(max(times), 2),
                   **machine.facts()}  # fmt: skip
            writer = writer or csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            print(f"{what} {size}: {rate:.2f} {unit}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
