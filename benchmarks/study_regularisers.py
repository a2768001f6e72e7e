"""No KL, uniform KL and GARDO on the built-in tiny Flux, same budget: one picture, one table.

    ./run study

Trains the three recipes one after the other on two ranks (about seven minutes each on two cores),
or takes runs that are there already (--runs FOLDER), and writes
benchmarks/results/tiny_regularisers.{png,csv,md}. README.md shows the last two between its `study`
marks, which this script fills.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from diffusers import FluxPipeline
from PIL import Image

from gardo.config import load
from gardo.report.metrics_log import read_metrics
from gardo.report.pictures import save_grid
from gardo.settings import model_path
from gardo.streams import Stream
from gardo.tiny import world
from gardo_kernels import random_normal
from pages import fill, revision

ROOT = Path(__file__).parents[1]
STEPS = 60  # the demo's budget and half as much again; both are reported
RESULTS = ROOT / "benchmarks" / "results"
ARMS = {  # recipe name: (title, colour)
    "tiny_flux_grpo": ("no KL", "#c0392b"),
    "tiny_flux_grpo_kl": ("uniform KL", "#7f8c8d"),
    "tiny_flux_gardo": ("GARDO", "#2471a3"),
}
MEASURES = {
    "tiny_count": "count by colour (proxy, optimised)",
    "tiny_fidelity": "shape and colour fidelity (held out)",
}


def train(name: str, folder: Path, overrides: list[str]) -> None:
    command = [sys.executable, "-m", "gardo.cli", "train", str(ROOT / "recipes" / f"{name}.yaml")]
    settings = [f"run.folder={folder}", f"run.steps={STEPS}", *overrides]
    subprocess.run(
        [*command, "--gpus", "2", *(part for s in settings for part in ("--set", s))], check=True
    )


def run_folder(folder: Path, name: str) -> Path:
    return folder / name.replace("_", "-")


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "evaluation"]


def demo_steps() -> int:
    """The demo's iterations."""
    return load(ROOT / "recipes" / "tiny_flux_gardo.yaml").run.steps


def versions() -> str:
    import deepspeed
    import diffusers
    import torch

    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, "
        f"deepspeed {deepspeed.__version__}, diffusers {diffusers.__version__}, written at "
        f"revision {revision()}"
    )


def table(arms: dict[str, list[dict[str, Any]]]) -> str:
    def interval(values: dict[str, float], scale: float = 100, sign: str = "") -> str:
        low, high = scale * values["low"], scale * values["high"]
        return f"{scale * values['mean']:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"

    lines = [
        "| | iterations | proxy, % | change | held-out, % | change | layout entropy | size | hue |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    start = next(iter(arms.values()))[0]
    rows = [("start", start)]
    for name, records in arms.items():
        rows += [(ARMS[name][0], r) for r in records if r["step"] in (demo_steps(), STEPS)]
    for title, record in rows:
        proxy, held = (record["rewards"][m] for m in MEASURES)
        changes = [
            interval(record["change"][m], sign="+") if record["step"] else "" for m in MEASURES
        ]
        diversity = record["diversity"]
        lines.append(
            f"| {title} | {record['step']} | {interval(proxy)} | {changes[0]} | {interval(held)} | "
            f"{changes[1]} | {diversity['layout']:.2f} | {diversity['size']:.2f} | "
            f"{diversity['hue']:.2f} |"
        )
    return "\n".join(lines)


def picture(arms: dict[str, list[dict[str, Any]]], folder: Path, path: Path) -> None:
    """Curves above, the same prompts with the same noise below."""
    figure = plt.figure(figsize=(12, 8.6), dpi=110, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.5])
    axes = upper.subplots(1, 3)
    for name, records in arms.items():
        title, colour = ARMS[name]
        steps = [r["step"] for r in records]
        for axis, measure in zip(axes, MEASURES, strict=False):
            values = [r["rewards"][measure] for r in records]
            axis.plot(steps, [v["mean"] for v in values], color=colour, label=title)
            axis.fill_between(
                steps, [v["low"] for v in values], [v["high"] for v in values],
                color=colour, alpha=0.15,
            )  # fmt: skip
        axes[2].plot(steps, [r["diversity"]["layout"] for r in records], color=colour, label=title)
    for axis, title in zip(axes, (*MEASURES.values(), "layout entropy, nats"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iterations")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    axes[2].set_ylim(0, 5.5)  # from 0: the layouts of all arms stay as diverse as they were
    prompts = world.prompts()[::7]
    panels = [("start", None), *((ARMS[n][0], run_folder(folder, n)) for n in arms)]
    for axis, (title, run) in zip(lower.subplots(1, 4), panels, strict=True):
        axis.imshow(sample_grid(prompts, run, path.with_suffix(".part.png")))
        axis.set_title(f"{title}, {STEPS if run else 0} iterations", fontsize=10)
        axis.axis("off")
    lower.suptitle(
        f"one row a prompt, the same noise in every panel: {', '.join(prompts)}", fontsize=8, y=0.02
    )
    figure.savefig(path)


def sample_grid(prompts: list[str], run: Path | None, part: Path) -> Image.Image:
    """Six images of each prompt through FluxPipeline, with the run's exported LoRA if any."""
    pipeline = FluxPipeline.from_pretrained(model_path("builtin:flux"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if run:
        pipeline.load_lora_weights(run / "export")
    noise = random_normal(0, torch.arange(6 * len(prompts)), Stream.EVALUATION, (64, 16))
    images = pipeline(
        [p for p in prompts for _ in range(6)],
        latents=noise,
        height=world.SIZE,
        width=world.SIZE,
        num_inference_steps=8,
        max_sequence_length=8,
        output_type="pt",
    ).images
    save_grid(images, part, columns=6, scale=3)
    grid = Image.open(part).convert("RGB")
    part.unlink()
    return grid


def write_csv(arms: dict[str, list[dict[str, Any]]], path: Path, machine: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "iteration", "measure", "mean", "low", "high", "machine"])
        for name, records in arms.items():
            for r in records:
                for measure, v in r["rewards"].items():
                    row = [ARMS[name][0], r["step"], measure, v["mean"], v["low"], v["high"]]
                    writer.writerow([*row, machine])
                for measure, value in r["diversity"].items():
                    row = [ARMS[name][0], r["step"], f"entropy {measure}", value, "", ""]
                    writer.writerow([*row, machine])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="folder with finished runs of the three recipes")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    options = parser.parse_args()
    folder = options.runs or ROOT / "runs" / "study"
    for name in ARMS:
        if options.runs is None:
            train(name, folder, options.set)
    arms = {name: evaluations(run_folder(folder, name)) for name in ARMS}
    machine = versions()
    RESULTS.mkdir(parents=True, exist_ok=True)
    picture(arms, folder, RESULTS / "tiny_regularisers.png")
    write_csv(arms, RESULTS / "tiny_regularisers.csv", machine)
    last = next(iter(arms.values()))[-1]
    note = (
        f"{last['image_count']} fixed-noise images of {last['prompt_count']} prompts; "
        f"95 % intervals over prompts, changes paired with the start; one seed. Entropies in nats. "
        f"Measured on {machine}."
    )
    text = f"{table(arms)}\n\n{note}"
    (RESULTS / "tiny_regularisers.md").write_text(text + "\n", encoding="utf-8")
    fill(ROOT / "README.md", "study", text)
    print(text)


if __name__ == "__main__":
    main()
