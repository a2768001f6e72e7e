"""What a transformer block's ops launch and move: eager diffusers, Inductor's kernels, ours.

    ./run bench blocks [--out FILE]

On no GPU, and on none's clock: fake tensors in the size of Flux at 1024 px, three samples, bf16.
`eager` and `triton` are counted as they launch (core_ops/counting.py), `inductor` is read from the
code that Inductor writes for an H100 (core_ops/inductor.py); `placed` are the launches of that code
where it was given our ops. Writes results/blocks_counts.csv and the table of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # kernels as a compiler is shown them; none runs

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from core_ops import report
from core_ops.cases import Case
from core_ops.counting import Counter
from core_ops.host import without_launches
from core_ops.inductor import gpu_code
from core_ops.machine import this_machine
from core_ops.problems import PROBLEMS
from core_ops.problems._block import TEXT, Block, Found, Given, outputs
from core_ops.problems.qk_norm_rope import rms_norm
from gardo_kernels import _launch
from pages import ROOT, fill

OPS = {name: kind for name, kind in PROBLEMS.items() if issubclass(kind, Block)}
SAMPLES, IMAGE = 3, 4096
LAYOUTS = ("plain", "trained")  # the gradients that LoRA asks for, and those of full fine-tuning
RESULTS = ROOT / "benchmarks" / "results" / "blocks_counts.csv"
CPU = torch.device("cpu")
Row = dict[str, Any]
Way = Callable[[Given], Found]


@dataclass(frozen=True)
class Subject:
    """What is counted: diffusers' lines, and ours in their place."""

    name: str
    layout: str
    given: Given
    eager: Way
    ours: Way
    elements: int


def subjects() -> Iterator[Subject]:
    """Each op, under LoRA and in full fine-tuning."""
    for layout in LAYOUTS:
        for name, kind in OPS.items():
            shape = (SAMPLES, TEXT + IMAGE, kind.width)
            problem: Any = kind(Case(name, shape, layout=layout), CPU)
            yield Subject(
                name, layout, problem.given, problem.diffusers,
                lambda given, of=problem: of.op(given, "triton"), problem.case.elements,
            )  # fmt: skip


def counted(subject: Subject, way: Way) -> tuple[Counter, Counter]:
    """Of the forward and of the backward pass."""
    leaves = [x for x in subject.given.values() if x.requires_grad]
    with without_launches(), mock.patch.object(F, "rms_norm", rms_norm):
        with Counter() as forward:
            out = outputs(way(subject.given))
        upstream = [torch.empty_like(x) for x in out]
        with Counter() as backward:
            torch.autograd.grad(out, leaves, upstream)
    return forward, backward


def rows_of(subject: Subject) -> list[Row]:
    def function(way: Way) -> Callable[..., Any]:
        return lambda *values: way(dict(zip(subject.given, values, strict=True)))

    inputs = list(subject.given.values())
    eager, ours = counted(subject, subject.eager), counted(subject, subject.ours)
    theirs, placed = (gpu_code(function(way), inputs) for way in (subject.eager, subject.ours))
    return [
        {
            "op": subject.name, "layout": subject.layout, "pass": name,
            "eager_launches": eager[i].launches, "inductor_launches": len(theirs[i].kernels),
            "triton_launches": ours[i].launches, "placed_launches": len(placed[i].kernels),
            "eager_bytes": round(eager[i].bytes / subject.elements, 2),
            "inductor_bytes": round(theirs[i].bytes / subject.elements, 2),
            "triton_bytes": round(ours[i].bytes / subject.elements, 2),
        }
        for i, name in enumerate(("forward", "backward"))
    ]  # fmt: skip


def table(rows: list[dict[str, str]]) -> str:
    """As Markdown: launches, then bytes an element."""
    ways = ("eager", "inductor", "triton")
    head = ["op", "gradients", "pass", *(f"{way} launches" for way in ways), "placed",
            *(f"{way} bytes / element" for way in ways)]  # fmt: skip
    names = ["op", "layout", "pass", *(f"{way}_launches" for way in (*ways, "placed")),
             *(f"{way}_bytes" for way in ways)]  # fmt: skip
    of_layout = {"plain": "LoRA", "trained": "full"}
    lines = [[of_layout.get(str(row[name]), row[name]) for name in names] for row in rows]
    first = rows[0]
    return (
        f"{report.markdown(head, lines)}\n\nCounted, not timed (torch {first['torch']}, triton "
        f"{first['triton']}, revision {first['revision']})."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV file")
    options = parser.parse_args()
    facts = this_machine("cpu").facts()
    names = ("torch", "triton", "revision", "date")
    rows: list[Row] = []
    with mock.patch.object(_launch, "kernels_run_on", lambda device: True), FakeTensorMode():
        for subject in subjects():
            rows += [row | {name: facts[name] for name in names} for row in rows_of(subject)]
            print(subject.name, subject.layout, file=sys.stderr, flush=True)
    report.write(options.out, rows)
    print(table(report.read(options.out)))
    if options.out == RESULTS:
        fill(ROOT / "benchmarks" / "README.md", "blocks counts", table(report.read(RESULTS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
