"""Measured memory beside planned: the rows of flux_full.csv and flux_bases.csv, and `gardo plan`.

    python -m campaign.flux_plan FOLDER

FOLDER is that of a campaign, wherever it ran, or of one of its steps; no GPU is needed. The plan is
asked for what the row's case keeps on the GPU: weights, gradients and moments that stay, and what
comes and goes at the peak. What the campaign does not load, text encoders, VAE and rewards, is left
out. Writes FOLDER/flux_plan.csv and prints it:

    measured_gib    `peak_gib` of the row; of weights, what they held once made
    ratio           measured over planned; above 1 the plan promised too much
    fitted          the largest micro-batch that was measured of such cases; what ran out of memory
                    first is `failed_at`
    plan_fits       the largest that the plan lets into the memory of that GPU, with what it assumes
                    of CUDA and of fragments, which tensors do not show

Gradients are planned as if all were there at the peak, and compiled blocks as if they were eager.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from gardo.config import load
from gardo.distributed.optimizers import moment_bytes
from gardo.loading import quiet_libraries
from gardo.planner.memory import BYTES, CONTEXT, FRAGMENTED, Counted
from gardo.planner.shadow import Shadow
from gardo.policies.quantised import BASES
from pages import ROOT, revision

from .flux_bench import GIB
from .table import Row, number

RECIPE = ROOT / "recipes" / "flux_gardo_hpsv2.yaml"
TABLES = ("flux_full", "flux_bases")
CASE = (
    "work", "base", "checkpointing", "path", "attention", "lora", "optimizer", "text_tokens",
)  # fmt: skip
OTHERWISE = {"base": "bf16", "path": "eager", "attention": "native"}  # where a table lacks it
PARTS = ("weights", "gradients", "moments", "activations")
COLUMNS = (
    "table", *CASE, "micro_batch", "status", "measured_gib", "plan_gib", "ratio",
    *(f"plan_{part}_gib" for part in PARTS), "fitted", "failed_at", "plan_fits", "gpu_gib",
    "device", "revision", "plan_revision",
)  # fmt: skip
WIDTH = BYTES["bfloat16"]


@cache
def counted(text_tokens: int, lora: bool) -> Counted:
    """The recipe's model, with as many text tokens, its LoRA or all of it trained."""
    kind = [] if lora else ["train.weights={kind: full}"]
    changes = [f"model.text_tokens={text_tokens}", *kind]
    return Counted(Shadow(load(RECIPE, changes, prompts=False)))


def needs(row: Mapping[str, str], micro_batch: int) -> dict[str, int]:
    """Bytes of PARTS that the plan gives the row's case at a micro-batch."""
    work, base, optimizer = row["work"], row["base"], row["optimizer"]
    plan = counted(int(row["text_tokens"]), work != "step")
    shadow, trained = plan.shadow, WIDTH * plan.shadow.trainable
    found = dict.fromkeys(PARTS, 0) | {"weights": shadow.weight_bytes(base, WIDTH)}
    if work == "weights":
        found["weights"] -= trained * (row["lora"] == "False")
        return found
    dequantised = WIDTH * shadow.largest_linear * (base in BASES)  # of a layer, for its matmul
    kind, how = ("training", (row["checkpointing"],)) if work != "sample" else ("sampling", ())
    found["activations"] = plan.cost(kind, micro_batch, *how) + dequantised
    if work != "sample":
        found["gradients"] = trained
    if optimizer and not optimizer.endswith("_paged"):  # pages are no tensors of torch's
        found["moments"] = int(shadow.trainable * moment_bytes(optimizer, "bfloat16"))
    return found


def largest(row: Mapping[str, str], gpu: float) -> int:
    """The largest micro-batch that the plan lets into so many bytes."""

    def fits(micro_batch: int) -> bool:
        found = needs(row, micro_batch)
        lost = FRAGMENTED * found["activations"]
        return sum(found.values()) + lost + CONTEXT <= gpu

    size = 0
    while fits(size + 1):
        size += 1
    return size


# ---- what was measured ---------------------------------------------------------------------------


def measured(folder: Path) -> list[Row]:
    """Rows of memory in the campaign's tables, with the fields of CASE."""
    rows = []
    for name in TABLES:
        for file in [*folder.glob(f"{name}.csv"), *folder.glob(f"*/{name}.csv")]:
            with file.open(newline="", encoding="utf-8") as opened:
                rows += [{"table": name, **row} for row in csv.DictReader(opened)]
    return [
        {**row, **{field: row.get(field) or OTHERWISE.get(field, "") for field in CASE}}
        for row in rows
        if row["work"] in ("weights", "sample", "train", "step")
        and row.get("part", "all") in ("", "all")  # of a step, all of it
        and (row["peak_gib"] or row["status"] == "out of memory")
    ]


def compared(rows: Sequence[Row]) -> Iterator[Row]:
    """Each row with what the plan says of it, and of its case at other micro-batches."""
    for row in rows:
        here = [r for r in rows if r["device"] == row["device"]]
        alike = [r for r in here if all(r[n] == row[n] for n in ("table", *CASE))]
        sizes = {
            status: [int(r["micro_batch"]) for r in alike if r["status"] == status]
            for status in ("done", "out of memory")
        }
        found = needs(row, int(row["micro_batch"]))
        total = sum(found.values()) / GIB
        gib = row["held_gib"] if row["work"] == "weights" else row["peak_gib"]
        gpu = max((float(r["gpu_gib"]) for r in here if r["gpu_gib"]), default=0.0)
        searched = gpu and row["work"] != "weights"
        yield {
            **{name: row[name] for name in COLUMNS if name in row},
            "measured_gib": gib,
            "plan_gib": number(total),
            "ratio": number(float(gib) / total) if gib else "",
            **{f"plan_{part}_gib": number(found[part] / GIB) for part in PARTS},
            "fitted": max(sizes["done"], default=0) if searched else "",
            "failed_at": min(sizes["out of memory"], default="") if searched else "",
            "plan_fits": largest(row, gpu * GIB) if searched else "",
            "gpu_gib": gpu or "",
            "plan_revision": revision(),
        }


def page(rows: Sequence[Row]) -> str:
    lines = [
        f"{'case':60} {'GiB':>6} {'plan':>6} {'ratio':>6} {'fitted':>6} {'failed':>6} {'plan':>5}"
    ]
    for row in rows:
        case = [row["work"], row["base"], f"mb {row['micro_batch']}", row["text_tokens"]]
        case += [row[n] for n in ("checkpointing", "path", "attention", "optimizer")]
        usual = ("none", "eager", "native", "")
        what = " ".join(str(x) for x in case if x not in usual) + " no LoRA" * (
            row["lora"] == "False"
        )
        cells = [f"{row[n]!s:>6}" for n in ("measured_gib", "plan_gib", "ratio")]
        cells += [f"{row['fitted']!s:>6}", f"{row['failed_at']!s:>6}", f"{row['plan_fits']!s:>5}"]
        lines.append(f"{what:60} {' '.join(cells)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "flux_plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args(arguments).folder
    quiet_libraries()
    found = measured(folder)
    if not found:
        names = " nor ".join(f"{name}.csv" for name in TABLES)
        raise SystemExit(f"{folder}: no memory measured in {names}; give a campaign's --out")
    rows = list(compared(found))
    with (folder / "flux_plan.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print(page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
