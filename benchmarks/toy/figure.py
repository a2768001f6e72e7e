"""The toy's figure, after the GARDO paper's figure 3: samples of each arm, and bars of all seeds.

Colours are Okabe and Ito's, which colour-blind readers can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Circle
from torch import Tensor

from gardo.evaluation.statistics import bootstrap_mean
from toy.world import Layout, Mixture, panel, rewarded_places, spurious_place

COLOURS = ("#7f7f7f", "#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#cc79a7", "#009e73")
EXTENT = 8.2  # of a panel, either side of the centre
BARS = {  # measure: (title, top of the axis)
    "proxy": ("reward (proxy, optimised)", 1.55),
    "true": ("true reward", 1.05),
    "modes": ("modes covered, of 5", 5.0),
    "spurious_share": ("share in the spurious region", 1.05),
}
KEY = """\
Above: 1000 samples of seed 0 over
the contours of the proxy reward.

solid circle: a rewarded mode
(four on the ring, and the centre)

dotted: a mode without reward

dashed: the spurious region, which
only the proxy rewards

Below: means of {seeds} seeds, 95 %
bootstrap intervals; dots are seeds.

The layout is ours: the paper gives
its toy's caption and labels only."""


def picture(
    layout: Layout,
    titles: Mapping[str, str],
    positions: Mapping[str, Tensor],
    values: Mapping[str, Mapping[str, Tensor]],
    path: Path,
) -> None:
    """A panel an arm in the order of `titles`, then a panel of bars a measure."""
    figure = plt.figure(figsize=(13, 10), dpi=110, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[2, 1])
    *panels, key = upper.subplots(2, 4).flat
    for axis, (arm, title), colour in zip(panels, titles.items(), COLOURS, strict=True):
        _panel(axis, layout, positions[arm][:1000], colour)
        axis.set_title(title, fontsize=11)
    seeds = len(next(iter(values.values()))["proxy"])
    key.axis("off")
    key.text(0, 1, KEY.format(seeds=seeds), va="top", fontsize=9.5, transform=key.transAxes)
    for axis, (measure, (title, top)) in zip(lower.subplots(1, 4), BARS.items(), strict=True):
        _bars(axis, [values[arm][measure] for arm in titles], list(titles.values()))
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, top)
    figure.savefig(path)
    plt.close(figure)


def _panel(axis: Any, layout: Layout, x_B2: Tensor, colour: str) -> None:
    line = torch.linspace(-EXTENT, EXTENT, 160)
    grid = torch.cartesian_prod(line, line)
    proxy = panel(layout).rewards["proxy"].score(grid, [""] * len(grid)).view(160, 160).T
    axis.contourf(line, line, proxy, levels=8, cmap="Greys", vmax=2.5)
    axis.scatter(*x_B2.T, s=4, color=colour, alpha=0.6, linewidths=0)
    rewarded = {tuple(place) for place in rewarded_places(layout).tolist()}
    for mode in Mixture(layout).modes_K2.tolist():
        dense = tuple(mode) in rewarded
        axis.add_patch(
            Circle(mode, layout.covered_radius, fill=False, lw=1.2 if dense else 0.7,
                   ls="-" if dense else ":", color="black")
        )  # fmt: skip
    axis.add_patch(
        Circle(spurious_place(layout).tolist(), layout.spurious.region, fill=False, ls="--",
               lw=1.6, color="black")
    )  # fmt: skip
    axis.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), xticks=[], yticks=[], aspect="equal")


def _bars(axis: Any, values: list[Tensor], names: list[str]) -> None:
    for i, (value_S, colour) in enumerate(zip(values, COLOURS, strict=True)):
        interval = bootstrap_mean(value_S)
        reach = [[interval.mean - interval.low], [interval.high - interval.mean]]
        axis.bar(i, interval.mean, color=colour, alpha=0.75)
        axis.errorbar(i, interval.mean, yerr=reach, color="black", capsize=4, lw=1.2)
        spread = torch.linspace(-0.25, 0.25, len(value_S))
        axis.scatter(i + spread, value_S, s=6, color="black", alpha=0.5, linewidths=0)
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
