"""The curves of a run's report: evaluations, training metrics, time and memory, over steps."""

import math
from collections.abc import Sequence

from gardo.report.chart import Mark, Series, line_chart, smoothed, stacked_chart
from gardo.report.metrics_log import Record

ROLES = {"proxy": "proxy", "held_out": "held out", "auxiliary": "auxiliary"}  # in reading order
_COLOR = {"proxy": 0, "held_out": 1, "auxiliary": 2}

# Metrics every algorithm may log: title, what the axis shows, factor, whether the axis contains 0.
_METRICS = {
    "loss": ("Loss", "", 1.0, False),
    "policy_loss": ("Policy loss", "", 1.0, False),
    "kl": ("KL to the reference", "mean over elements, gated rows", 1.0, True),
    "kl_loss": ("KL in the loss", "mean over all rows, as weighed, without beta", 1.0, True),
    "rows_left_out": ("Rows left out", "without advantage and KL", 1.0, True),
    "gate_share": ("Gate share", "samples under the KL term, %", 100.0, True),
    "disagreement": (
        "Rank disagreement",
        "win rate by the proxy above the auxiliaries'",
        1.0,
        True,
    ),
    "clip_fraction": ("Clip fraction", "rows whose ratio is clipped, %", 100.0, True),
    "ratio": ("Ratio", "mean of new over old probability", 1.0, False),
    "ratio_error": ("Ratio error", "max |ratio - 1| of a row", 1.0, True),
    "grad_norm": ("Gradient norm", "before clipping", 1.0, True),
    "diversity": ("Diversity while training", "", 1.0, False),
    "lr": ("Learning rate", "", 1.0, True),
}
_EXACT = ("kl", "lr")  # a saw tooth and a schedule: a moving mean would only blur them


def evaluation_charts(evaluations: Sequence[Record], marks: Sequence[Mark]) -> list[str]:
    """A chart for each reward with its intervals, one for diversity."""
    x = [one["step"] for one in evaluations]
    charts = []
    for name, role in reward_names(evaluations).items():
        rows = [one.get("rewards", {}).get(name, {}) for one in evaluations]
        ends = {key: [row.get(key) for row in rows] for key in ("mean", "low", "high")}
        series = Series(
            name, x, ends["mean"], ends["low"], ends["high"], color=_COLOR.get(role, 7), points=True
        )
        unit = f"{ROLES.get(role, role)}, mean and 95 % interval"
        charts.append(line_chart([series], name, y_label=unit, marks=marks))
    charts.append(_diversity_chart(evaluations, marks))
    return charts


def _diversity_chart(evaluations: Sequence[Record], marks: Sequence[Mark]) -> str:
    """Every kind of diversity relative to its start, so that kinds of any size share the axis."""
    x = [one["step"] for one in evaluations]
    rows = [one.get("diversity", {}) for one in evaluations]
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: [row.get(name) for row in rows] for name in names}
    relative = all(value[0] is not None and value[0] > 0 for value in values.values())
    series = []
    for index, (name, y) in enumerate(values.items()):
        if relative:
            y = [None if value is None else 100 * value / y[0] for value in y]
        series.append(Series(name, x, y, color=3 + index, points=True))
    unit = f"% of its value at step {x[0]}" if relative else "higher is more varied"
    return line_chart(series, "Diversity", y_label=unit, marks=marks)


def step_charts(steps: Sequence[Record], marks: Sequence[Mark]) -> list[str]:
    """Rewards while training, then every metric, then time and memory of each phase."""
    x = [step["step"] for step in steps]
    charts = []
    for name, role in reward_names(steps).items():
        y = [step.get("rewards", {}).get(name, {}).get("mean") for step in steps]
        unit = f"{ROLES.get(role, role)}, mean over a step's samples"
        charts.append(_noisy(x, y, f"{name} while training", unit, marks, _COLOR.get(role, 7)))
    known = list(_METRICS)
    seen = dict.fromkeys(name for step in steps for name in step.get("metrics", {}))
    for name in sorted(seen, key=lambda name: known.index(name) if name in known else len(known)):
        title, unit, factor, zero = _METRICS.get(name, (name, "", 1.0, False))
        values = [step.get("metrics", {}).get(name) for step in steps]
        y = [None if value is None else factor * value for value in values]
        charts.append(_noisy(x, y, title, unit, marks, 5, zero, name not in _EXACT))
    phases = dict.fromkeys(name for step in steps for name in step.get("seconds", {}))
    layers = {name: [step.get("seconds", {}).get(name, 0.0) for step in steps] for name in phases}
    charts.append(stacked_chart(x, layers, "Time of a step", y_label="seconds, by phase"))
    if any("images_per_second" in step for step in steps):
        rate = [step.get("images_per_second") for step in steps]
        charts.append(_noisy(x, rate, "Throughput", "images a second, all ranks", marks, 5, True))
    if any("memory" in step for step in steps):
        charts.append(_memory_chart(steps, x))
    return charts


def _memory_chart(steps: Sequence[Record], x: Sequence[float]) -> str:
    rows = [step.get("memory", {}) for step in steps]
    phases = dict.fromkeys(name for row in rows for name in row)
    series = [Series(name, x, [row.get(name, math.nan) / 1e9 for row in rows]) for name in phases]
    unit = "GB allocated at a phase's peak, fullest rank"
    return line_chart(series, "Memory of a step", y_label=unit, y_from_zero=True)


def _noisy(
    x: Sequence[float],
    y: Sequence[float | None],
    title: str,
    unit: str,
    marks: Sequence[Mark],
    color: int,
    zero: bool = False,
    smooth: bool = True,
) -> str:
    """A per-step curve; a long one is drawn faint under its moving mean."""
    window = len(x) // 15
    if window < 3 or not smooth:
        series = [Series("", x, y, color=color)]
    else:
        label = f"mean of {window} steps"
        series = [
            Series("each step", x, y, color=color, faint=True),
            Series(label, x, smoothed(y, window), color=color),
        ]
    return line_chart(series, title, y_label=unit, marks=marks, y_from_zero=zero)


def resets(steps: Sequence[Record]) -> list[Mark]:
    """Resets of the reference, for the charts; other events are only listed."""
    return [
        Mark(step["step"], "reference reset", event)
        for step in steps
        for event in step.get("events", ())
        if event.startswith("reference reset")
    ]


def reward_names(records: Sequence[Record]) -> dict[str, str]:
    """Every reward's role, proxies first."""
    roles = {
        name: str(value.get("role", ""))
        for record in records
        for name, value in record.get("rewards", {}).items()
    }
    order = list(ROLES)
    rank = {role: order.index(role) if role in order else len(order) for role in roles.values()}
    return dict(sorted(roles.items(), key=lambda item: rank[item[1]]))
