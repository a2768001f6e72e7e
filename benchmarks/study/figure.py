"""The study's figures: curves of every seed, what the gate catches, and pictures of one seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from study.lead import smoothed
from study.measures import HELD_OUT, PROXY, Arms, Curve, both
from study.protocol import SIGNS_TITLES
from study.raw import Raw

COLOURS = ("#c0392b", "#7f8c8d", "#2471a3", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
GATED = ("#7f8c8d", "#c0392b", "#2471a3")  # all samples, those of the paper's sign, the release's
CURVES: dict[str, Callable[[Curve], list[float]]] = {
    "proxy, change in points": lambda c: c.change[PROXY],
    "held-out fidelity, change in points": lambda c: c.change[HELD_OUT],
    "the lesser of the two": both,
    "drift from the start, nats an image": lambda c: c.drift,
}


def curves(arms: Arms, titles: Mapping[str, str], path: Path) -> None:
    """One panel a measure: a thin line a seed, a bold one their mean."""
    figure, axes = plt.subplots(1, len(CURVES), figsize=(15, 4), dpi=110, layout="constrained")
    for axis, (title, values) in zip(axes, CURVES.items(), strict=True):
        for (arm, name), colour in zip(titles.items(), COLOURS, strict=False):
            lines = [values(curve) for curve in arms[arm].values()]
            steps = next(iter(arms[arm].values())).steps
            for line in lines:
                axis.plot(steps, line, color=colour, linewidth=0.8, alpha=0.4)
            mean = [fmean(column) for column in zip(*lines, strict=True)]
            axis.plot(steps, mean, color=colour, linewidth=2.4, label=name)
        _finish(axis, title)
    axes[0].legend(frameon=False, title="bold: mean of the seeds", title_fontsize=8, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def gated(raws: Mapping[str, Mapping[int, Raw]], titles: Mapping[str, str], path: Path) -> None:
    """Held-out fidelity of the samples that each sign gates, and of all; means over seeds."""
    figure, axes = plt.subplots(
        1, len(titles), figsize=(5 * len(titles), 4), dpi=110, layout="constrained", sharey=True
    )
    for axis, (arm, title) in zip(axes, titles.items(), strict=True):
        series: dict[str, list[list[float]]] = {"all samples": []}
        for raw in raws[arm].values():
            series["all samples"].append([100 * r["rewards"][HELD_OUT] for r in raw.steps])
            for sign, name in SIGNS_TITLES.items():
                key = f"{sign}_gated_{HELD_OUT}"
                values = [100 * (r["metrics"][key] or 0.0) for r in raw.steps]
                series.setdefault(f"gated, {name}", []).append(values)
        for (name, lines), colour in zip(series.items(), GATED, strict=True):
            mean = smoothed([fmean(column) for column in zip(*lines, strict=True)], 5)
            axis.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=2, label=name)
        _finish(axis, title)
    axes[0].set_ylabel("held-out fidelity, %")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def pictures(samples: Mapping[str, Path], caption: str, path: Path) -> None:
    """The last samples of some arms side by side: the same prompts and noise in every panel."""
    figure, axes = plt.subplots(
        1, len(samples), figsize=(3.6 * len(samples), 4.6), dpi=110, layout="constrained"
    )
    for axis, (title, file) in zip(axes, samples.items(), strict=True):
        axis.imshow(Image.open(file).convert("RGB"))
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def median_seed(differences: Mapping[int, float]) -> int:
    """The seed whose difference is the median: of an even number of seeds the lower middle."""
    ordered: Sequence[int] = sorted(differences, key=lambda seed: (differences[seed], seed))
    return ordered[(len(ordered) - 1) // 2]


def _finish(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("iterations")
    axis.spines[["top", "right"]].set_visible(False)
