"""What the GPUs of one machine do with this engine: each case a process, one CSV for all.

    benchmarks/cluster_acceptance.sh [--gpus N] [--only CASE ...] [--limit SECONDS] [--list]

NCCL's bandwidth, throughput on 1, 2, 4 and 8 GPUs, a resume to the bit after a kill, and the ways
to spread a model: gather, overlap, stage, hpZ, offload. A case that fails or is cut never stops
the next; one that has passed is not run again (--only does). FOLDER/CASE has its log and its run,
FOLDER/cluster.csv a row a case: the first iteration, which warms up, is left out of the seconds.
Exit code 1 if a case failed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import torch

from cluster.cases import Case, Plan, cases
from gardo.config import read_yaml
from gardo.report.metrics_log import read_metrics
from gpu_campaign import ROOT, Row, attempt, is_done, machine, result_of, say

COLUMNS = ("case", "gpus", "seconds_per_iteration", "images_per_second", "peak_gib", "result",
           "detail", "model", "gpu", "driver", "versions", "revision")  # fmt: skip


def measured(folder: Path) -> Row:
    """Seconds and images a second of the newest run in a case's folder; {} where it has none."""
    logs = sorted(folder.glob("runs/*/metrics.jsonl"), key=lambda log: log.stat().st_mtime)
    steps = [r for log in logs[-1:] for r in read_metrics(log) if r["kind"] == "step"][1:]
    if not steps:
        return {}
    data = read_yaml((logs[-1].parent / "recipe.yaml").read_text("utf-8"), "recipe.yaml")["data"]
    seconds = mean(sum(step["seconds"].values()) for step in steps)
    peaks = [step["peak_bytes"] for step in steps if "peak_bytes" in step]
    return {
        "seconds_per_iteration": round(seconds, 3),
        "images_per_second": round(
            data["prompts_per_step"] * data["images_per_prompt"] / seconds, 2
        ),
        "peak_gib": round(max(peaks) / 2**30, 2) if peaks else "",
    }


def run_all(
    chosen: Sequence[Case],
    plan: Plan,
    out: Path,
    *,
    limit: float,
    again: bool,
    facts: dict[str, str],
) -> list[Row]:
    """A row a case; cluster.csv has those that there are after each."""
    versions = ", ".join(
        [*(f"{name} {facts[name]}" for name in ("torch", "triton")),
         f"deepspeed {version('deepspeed')}"]
    )  # fmt: skip
    rows: list[Row] = []
    for case in chosen:
        result = result_of(out / case.name)
        if again or not is_done(result, facts):
            result = attempt(case.step(plan, limit), out / case.name, float("inf"), facts)
        row = {
            "case": case.name, "gpus": case.gpus, "result": result["state"],
            "detail": result["detail"] if case.module != "gardo.train" or result["code"] else "",
            "model": plan.model or "builtin:flux", "versions": versions,
            **{name: facts[name] for name in ("gpu", "driver", "revision")},
            **(measured(out / case.name) if result["state"] == "passed" else {}),
        }  # fmt: skip
        rows.append(row)
        say("  ".join(f"{row.get(name, '')}" for name in COLUMNS[:7]))
        with (out / "cluster.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "cluster_acceptance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "cluster", metavar="FOLDER")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), metavar="N")
    parser.add_argument("--model", help="folder or hub id of a Flux; the built-in one if left out")
    parser.add_argument("--quick", action="store_true", help="2 iterations of 8 images")
    parser.add_argument("--limit", type=float, default=1800.0, metavar="SECONDS", help="of a case")
    parser.add_argument("--only", nargs="+", metavar="CASE")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    if options.gpus < 1:
        parser.error("no GPU here; for a rehearsal set DS_ACCELERATOR=cpu and give --gpus 2")
    every = cases(options.gpus)
    if unknown := set(options.only or ()) - {case.name for case in every}:
        parser.error(f"--only: {', '.join(sorted(unknown))}: none of "
                     f"{', '.join(case.name for case in every)}")  # fmt: skip
    chosen = [case for case in every if not options.only or case.name in options.only]
    if options.list:
        print("\n".join(f"{case.name:20} {case.gpus} GPUs  {case.what}" for case in chosen))
        return 0
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan(options.gpus, options.model, options.quick)
    rows = run_all(
        chosen, plan, out, limit=options.limit, again=bool(options.only), facts=machine()
    )
    print(out / "cluster.csv")
    return int(any(row["result"] not in ("passed", "skipped") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
