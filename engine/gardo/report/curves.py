"""The curves of a run's report, and of several runs': evaluations, metrics, time and memory.

Every function takes the records of each run under its name; the page of one run calls it "". Then
colours tell roles, else runs. A chart without a value is left out, and so is one whose values never
change or are those of another chart: notes say so in a line.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from gardo.report.chart import line_chart, stacked_chart
from gardo.report.glossary import meaning
from gardo.report.interactive import figure, figures
from gardo.report.metrics_log import Record
from gardo.report.page import number, text
from gardo.report.series import Mark, Series, finite
from gardo.report.verdict import Gap, gaps

Runs = Mapping[str, Sequence[Record]]

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
_JUDGES = {
    "proxy": "What the run optimises.",
    "held_out": "Not seen by the run: where it falls as the proxy rises, the proxy is exploited.",
    "auxiliary": "Judges beside the proxy: the gate is where their ranks disagree with its.",
}
_GAP = (
    "How far the proxy has moved since the first evaluation, and how far the held-out rewards, in "
    "standard deviations between prompts. A gap that grows because held-out falls is hacking."
)
_SMOOTHED = 15  # a moving mean covers this part of a run; it is drawn from 3 steps on


@dataclass
class Charts:
    """Figures of some runs, and what needs no figure."""

    runs: Runs
    marks: Sequence[Mark] = ()
    made: list[str] = field(default_factory=list)
    unchanged: dict[str, float] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)
    _seen: dict[object, str] = field(default_factory=dict)

    @property
    def single(self) -> bool:
        return len(self.runs) == 1

    def add(
        self, series: Sequence[Series], title: str, unit: str, path: str, *, zero: bool = False
    ) -> None:
        """A line chart; `path` is what the glossary calls its values, or a sentence on them."""
        values = tuple(tuple(map(str, one.y)) for one in series)
        distinct = {value for one in series for value in one.y if finite(value)}
        points = sum(len(one.y) for one in series)
        if not distinct:
            return
        if values in self._seen:
            self.same[title] = self._seen[values]
        elif len(distinct) == 1 and points > len(series):
            self.unchanged[title] = distinct.pop()
        else:
            self._seen[values] = title
            entry = meaning(path)
            drawn = line_chart(series, title, y_label=unit, marks=self.marks, y_from_zero=zero)
            sentence = path if path.endswith(".") else ""
            self.made.append(figure(drawn, entry.meaning if entry else sentence))

    def add_each(
        self,
        keys: Sequence[str],
        title: str,
        unit: str,
        path: str,
        *,
        factor: float = 1.0,
        zero: bool = False,
        color: int = 5,
        smooth: bool = True,
    ) -> None:
        """A line chart of the value under `keys` in every record, a curve for each run."""
        series = []
        for index, (label, records) in enumerate(self.runs.items()):
            y = [_at(record, keys) for record in records]
            if not any(map(finite, y)):
                continue
            y = [factor * value if finite(value) else None for value in y]
            window = len(y) // _SMOOTHED
            series.append(
                Series(
                    label,
                    [record["step"] for record in records],
                    y,
                    color=color if self.single else index,
                    smooth=(window if window >= 3 else 1) if smooth else 0,
                )
            )
        self.add(series, title, unit, path, zero=zero)

    def as_html(self) -> str:
        notes = [f"{title} {number(value)}" for title, value in self.unchanged.items()]
        lines = [f"Without change: {', '.join(notes)}."] if notes else []
        lines += [f"{title}: the values of {other}." for title, other in self.same.items()]
        said = f'<p class="soft">{text(" ".join(lines))}</p>' if lines else ""
        return figures(self.made) + said


def evaluation_charts(runs: Runs, marks: Sequence[Mark] = ()) -> Charts:
    """A chart for each reward with its intervals, one of proxy against held-out, diversity."""
    charts = Charts(runs, marks)
    for name, role in reward_names(chain.from_iterable(runs.values())).items():
        series = []
        for index, (label, records) in enumerate(runs.items()):
            rows = [one.get("rewards", {}).get(name, {}) for one in records]
            mean, low, high = ([row.get(key) for row in rows] for key in ("mean", "low", "high"))
            if any(map(finite, mean)):
                color = _COLOR.get(role, 7) if charts.single else index
                x = [one["step"] for one in records]
                series.append(Series(label, x, mean, low, high, color=color, points=True))
        unit = f"{ROLES.get(role, role)}, mean and 95 % interval"
        charts.add(series, name, unit, _JUDGES.get(role, ""))
    _add_gap(charts)
    _add_diversity(charts)
    return charts


def _add_gap(charts: Charts) -> None:
    """What the proxy gained beside what held-out rewards did; of several runs the difference."""
    found = {label: gaps(records) for label, records in charts.runs.items()}
    unit = "change in standard deviations between prompts"
    if charts.single:
        (moves,) = found.values()
        series = [_moves("proxy", moves, 0), _moves("held_out", moves, 1)] if moves else []
    else:
        series = [
            _moves("gap", moves, index, label)
            for index, (label, moves) in enumerate(found.items())
            if moves
        ]
        unit = "the gap, in standard deviations"
    charts.add(series, "Proxy against held-out", unit, _GAP, zero=True)


def _moves(what: str, moves: Sequence[Gap], color: int, label: str = "") -> Series:
    x, y = [one.step for one in moves], [getattr(one, what) for one in moves]
    return Series(label or ROLES[what], x, y, color=color, points=True)


def _add_diversity(charts: Charts) -> None:
    """Of one run every kind relative to its start, on one axis; of several a chart for each."""
    records = list(chain.from_iterable(charts.runs.values()))
    names = dict.fromkeys(name for one in records for name in one.get("diversity", {}))
    if not charts.single:
        for name in names:
            keys = ("diversity", name)
            charts.add_each(keys, f"Diversity: {name}", "", ".".join(keys), smooth=False)
        return
    x = [one["step"] for one in records]
    values = {name: [_at(one, ("diversity", name)) for one in records] for name in names}
    relative = all(finite(value[0]) and value[0] > 0 for value in values.values())
    series = []
    for index, (name, y) in enumerate(values.items()):
        start = y[0]
        if relative and finite(start):
            y = [100 * value / start if finite(value) else None for value in y]
        series.append(Series(name, x, y, color=3 + index, points=True))
    unit = f"% of its value at step {x[0]}" if relative and x else "higher is more varied"
    charts.add(series, "Diversity", unit, "How unlike the images of a prompt are.")


def step_charts(runs: Runs, marks: Sequence[Mark] = ()) -> Charts:
    """Rewards while training, then every metric, then time and memory of each phase."""
    charts = Charts(runs, marks)
    records = list(chain.from_iterable(runs.values()))
    for name, role in reward_names(records).items():
        unit = f"{ROLES.get(role, role)}, mean over a step's samples"
        keys, color = ("rewards", name, "mean"), _COLOR.get(role, 7)
        charts.add_each(keys, f"{name} while training", unit, "", color=color)
    known = list(_METRICS)
    seen = dict.fromkeys(name for step in records for name in step.get("metrics", {}))
    for name in sorted(seen, key=lambda name: known.index(name) if name in known else len(known)):
        title, unit, factor, zero = _METRICS.get(name, (name, "", 1.0, False))
        charts.add_each(
            ("metrics", name),
            title,
            unit,
            f"metrics.{name}",
            factor=factor,
            zero=zero,
            smooth=name not in _EXACT,
        )
    _add_spent(charts, records)
    return charts


def _add_spent(charts: Charts, records: Sequence[Record]) -> None:
    """Seconds by phase, throughput, memory by phase; of several runs without phases."""
    if charts.single and records:
        x = [step["step"] for step in records]
        phases = dict.fromkeys(name for step in records for name in step.get("seconds", {}))
        layers = {
            name: [_at(step, ("seconds", name)) or 0.0 for step in records] for name in phases
        }
        drawn = stacked_chart(x, layers, "Time of a step", y_label="seconds, by phase")
        charts.made.append(figure(drawn, "Seconds that the first rank spent in each phase."))
    keys, unit = ("images_per_second",), "images a second, all ranks"
    charts.add_each(keys, "Throughput", unit, keys[0], zero=True)
    names = dict.fromkeys(name for step in records for name in step.get("memory", {}))
    unit = "GB allocated at a phase's peak, fullest rank"
    if not charts.single:
        charts.add_each(("peak_bytes",), "Memory", "GB", "peak_bytes", factor=1e-9, zero=True)
    elif names:
        x = [step["step"] for step in records]
        series = [
            Series(name, x, [(_at(step, ("memory", name)) or math.nan) / 1e9 for step in records])
            for name in names
        ]
        charts.add(series, "Memory of a step", unit, "memory.*", zero=True)


def _at(record: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    """The number under these keys, or None."""
    found: Any = record
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, int | float) else None


def resets(steps: Sequence[Record]) -> list[Mark]:
    """Resets of the reference, for the charts; other events are only listed."""
    return [
        Mark(step["step"], "reference reset", event)
        for step in steps
        for event in step.get("events", ())
        if event.startswith("reference reset")
    ]


def reward_names(records: Iterable[Record]) -> dict[str, str]:
    """Every reward's role, proxies first."""
    roles = {
        name: str(value.get("role", ""))
        for record in records
        for name, value in record.get("rewards", {}).items()
    }
    order = list(ROLES)
    rank = {role: order.index(role) if role in order else len(order) for role in roles.values()}
    return dict(sorted(roles.items(), key=lambda item: rank[item[1]]))
