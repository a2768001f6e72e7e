"""The picture of ./run study: curves of every seed, and the same prompts drawn by every arm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from diffusers import FluxPipeline
from PIL import Image

from gardo.report.metrics_log import Record
from gardo.report.pictures import save_grid
from gardo.settings import model_path
from gardo.streams import Stream
from gardo.tiny import world
from gardo_kernels import random_normal
from study.runs import ARMS, Study

CURVES: dict[str, Callable[[Record], float]] = {
    "count by colour (proxy, optimised)": lambda r: r["rewards"]["tiny_count"]["mean"],
    "shape and colour fidelity (held out)": lambda r: r["rewards"]["tiny_fidelity"]["mean"],
    "layout entropy, nats": lambda r: r["diversity"]["layout"],
}


def picture(
    study: Study, exports: Mapping[str, Path], seed: int, iterations: int, path: Path
) -> None:
    """Curves above; below samples of the start and of each arm's export, which are of one seed."""
    figure = plt.figure(figsize=(12, 8.6), dpi=110, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.5])
    curves(study, upper.subplots(1, len(CURVES)))
    prompts = world.prompts()[::7]
    panels = {"start": None} | {
        f"{ARMS[arm][0]}, {iterations} iterations": export for arm, export in exports.items()
    }
    axes = lower.subplots(1, len(panels))
    for axis, (title, export) in zip(axes, panels.items(), strict=True):
        axis.imshow(sample_grid(prompts, export, path.with_suffix(".part.png")))
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    lower.suptitle(
        f"seed {seed}; one row a prompt, the same noise in every panel: {', '.join(prompts)}",
        fontsize=8,
        y=0.02,
    )
    figure.savefig(path)
    plt.close(figure)


def curves(study: Study, axes: Sequence[Any]) -> None:
    """One panel a measure: a thin line a seed, a bold one their mean."""
    for axis, (title, value) in zip(axes, CURVES.items(), strict=True):
        for arm, by_seed in study.items():
            name, colour = ARMS[arm]
            lines = [{r["step"]: value(r) for r in records} for records in by_seed.values()]
            for line in lines:
                axis.plot(list(line), list(line.values()), color=colour, linewidth=0.8, alpha=0.5)
            steps = [s for s in lines[0] if all(s in line for line in lines)]
            mean = [fmean(line[s] for line in lines) for s in steps]
            axis.plot(steps, mean, color=colour, linewidth=2.4, label=name)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iterations")
        axis.spines[["top", "right"]].set_visible(False)
    seeds = len(next(iter(study.values())))
    axes[0].legend(frameon=False, title=f"bold: mean of {seeds} seeds", title_fontsize=8)
    axes[-1].set_ylim(bottom=0)  # so that a collapse of layouts is told from a wobble


def sample_grid(prompts: Sequence[str], export: Path | None, part: Path) -> Image.Image:
    """Six images of each prompt through FluxPipeline, with the exported LoRA if any."""
    pipeline = FluxPipeline.from_pretrained(model_path("builtin:flux"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if export:
        pipeline.load_lora_weights(export)
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
