"""Line and stacked charts as SVG text, without a plotting library.

A chart scales with the width it is given. Its colours are CSS variables, light and dark, defined
by `CHART_CSS`, which the page must contain once; `standalone=True` puts them inside the SVG, which
then is a file of its own. Else the chart carries its values as JSON in `data-chart`, for the
script of `interactive.py`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from gardo.report.axes import nice_ticks, tick_labels
from gardo.report.series import MOST_POINTS, Mark, Series, bucket, finite, smoothed, thinned

CHART_CSS = """
:root{--ink:#1d2126;--soft:#5d6570;--line:#e1e4e8;--page:#ffffff;--mark:#8b8f98;
--c0:#2667b8;--c1:#c55a11;--c2:#23855b;--c3:#8a46ad;
--c4:#a8324a;--c5:#0f7f8c;--c6:#7a6a12;--c7:#5d6570}
@media (prefers-color-scheme:dark){
:root{--ink:#e7e9ec;--soft:#a2a9b3;--line:#343a42;--page:#15181c;--mark:#7c838d;
--c0:#6ba6ee;--c1:#f0924f;--c2:#5cc695;--c3:#c48ae4;
--c4:#ef7f93;--c5:#4fc3d0;--c6:#cdb94a;--c7:#a2a9b3}}
svg.chart{display:block;width:100%;height:auto;font-family:system-ui,sans-serif}
svg.chart text{fill:var(--soft);font-size:12px}
svg.chart text.title{fill:var(--ink);font-size:14px;font-weight:600}
svg.chart .unit{fill:var(--soft);font-size:12px;font-weight:400}
svg.chart .grid{stroke:var(--line);stroke-width:1}
svg.chart .axis{stroke:var(--soft);stroke-width:1}
svg.chart .mark{stroke:var(--mark);stroke-width:1;stroke-dasharray:4 4}
svg.chart .data{overflow:visible}
svg.chart .line{stroke-width:1.8;stroke-linejoin:round}
svg.chart .faint{stroke-opacity:.35}svg.chart .faint .line{stroke-width:1}
svg.chart .bar{stroke-width:1.4}
svg.chart .dot{stroke-width:6.8;stroke-linecap:round}
""".strip()

_COLORS = 8
_LETTER = 6.7  # upper estimate of a 12 px letter's width
_MOST_FULL_MARKS = 25
_MARGIN, _RIGHT, _BOTTOM, _LEGEND_ROW = 12, 20, 40, 18  # pixels
_CENTRED = 'text-anchor="middle"'
_Entry = tuple[str, str]  # a legend's label and how its line looks


@dataclass(frozen=True)
class _Frame:
    """The plot's rectangle, what maps data to it, and what is drawn: around it, and of the data."""

    width: float
    height: float
    left: float
    top: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    parts: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)

    @property
    def right(self) -> float:
        return self.width - _RIGHT

    @property
    def bottom(self) -> float:
        return self.height - _BOTTOM

    def at_x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def at_y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def path(self, x: Sequence[float], y: Sequence[float]) -> str:
        points = (f"{self.at_x(a):.1f} {self.at_y(b):.1f}" for a, b in zip(x, y, strict=True))
        return "M" + "L".join(points)


@dataclass(frozen=True)
class _Curve:
    """A series as it is drawn: thinned to each `stride`-th point, with its moving mean, or []."""

    series: Series
    mean: Sequence[float | None]
    stride: int

    @classmethod
    def of(cls, one: Series) -> "_Curve":
        few = thinned(one)
        stride = math.ceil(len(one.y) / max(1, len(few.y)))
        if one.smooth < 2:
            return cls(few, [], stride)
        mean = replace(one, y=smoothed(one.y, one.smooth), low=None, high=None)
        return cls(few, thinned(mean).y, stride)


def line_chart(
    series: Sequence[Series],
    title: str,
    *,
    x_label: str = "step",
    y_label: str = "",
    marks: Sequence[Mark] = (),
    y_from_zero: bool = False,
    width: int = 560,
    height: int = 280,
    standalone: bool = False,
) -> str:
    """Curves over a shared axis as one `<svg>`; all strings are escaped.

    Args:
        series: the curves; without a finite value among them the chart says "no data".
        title: above the plot; `y_label` (what is measured, its unit) follows it in a softer tone.
        x_label: under the plot's right end.
        marks: events as dashed vertical lines; those outside the curves' range are left out.
        y_from_zero: let the y axis contain 0, for quantities such as shares and norms.
        width: of the drawing's own coordinates; it is shown at the width of its place.
        height: likewise.
        standalone: include namespace and colours, to be written as an `.svg` file.
    """
    curves = [
        _Curve.of(replace(one, color=index if one.color is None else one.color))
        for index, one in enumerate(series)
    ]
    x_all: list[float] = []
    y_all: list[float] = []
    for one in (curve.series for curve in curves):
        for a, b, *ends in zip(one.x, one.y, one.low or one.y, one.high or one.y, strict=True):
            if finite(b):
                x_all.append(a)
                y_all += [b, *filter(finite, ends)]
    legend = _legend(curves)
    if x_all:
        marks = [mark for mark in marks if min(x_all) <= mark.x <= max(x_all)]
        legend += [(kind, 'class="mark"') for kind in dict.fromkeys(mark.kind for mark in marks)]
    frame = _frame(x_all, y_all, y_from_zero, legend, (width, height))
    _head(frame, title, y_label, x_label, legend, bool(x_all))
    if x_all:
        _marks(frame, marks)
    for index, curve in enumerate(curves):
        _curve(frame, curve, 5.0 * (index - (len(curves) - 1) / 2) if curve.series.low else 0.0)
    said = _values(frame, curves, y_from_zero, marks if x_all else ())
    return _svg(frame, title, None if standalone else said)


def stacked_chart(
    x: Sequence[float],
    layers: Mapping[str, Sequence[float]],
    title: str,
    *,
    x_label: str = "step",
    y_label: str = "",
    width: int = 560,
    height: int = 280,
    standalone: bool = False,
) -> str:
    """Areas stacked, the first at the bottom; missing values count as 0. Else as `line_chart`."""
    size = max(1, math.ceil(len(x) / MOST_POINTS))
    x = bucket(x, size)
    base = [0.0] * len(x)
    outlines: list[tuple[list[float], list[float]]] = []
    curves: list[_Curve] = []
    for label, values in layers.items():
        layer = bucket([value if finite(value) else 0.0 for value in values], size)
        top = [below + value for below, value in zip(base, layer, strict=True)]
        curves.append(_Curve(Series(label, x, layer, color=len(curves)), [], size))
        outlines.append((base, top))
        base = top
    full = bool(x) and bool(layers)
    legend = [(label, _stroke(index)) for index, label in enumerate(layers)] if full else []
    frame = _frame(x if full else [], base if full else [], True, legend, (width, height))
    _head(frame, title, y_label, x_label, legend, full)
    for index, (below, top) in enumerate(outlines if full else ()):
        outline = frame.path([*x, *reversed(x)], [*top, *reversed(below)])
        color = _color(index)
        add = frame.data.append
        add(f'<path d="{outline}Z" fill="{color}" fill-opacity=".7" stroke="{color}"/>')
    said = {**_values(frame, curves, True, ()), "stacked": True}
    return _svg(frame, title, None if standalone else said)


def _legend(curves: Sequence[_Curve]) -> list[_Entry]:
    """What the title does not say: the curves where they are several, and what is smoothed."""
    if len(curves) > 1:
        return [(one.series.label, _stroke(one.series.color or 0)) for one in curves]
    return [
        entry
        for one in curves
        if one.mean
        for entry in (
            ("each step", _stroke(one.series.color or 0, faint=True)),
            (f"mean of {one.series.smooth} steps", _stroke(one.series.color or 0)),
        )
    ]


def _frame(
    x: Sequence[float],
    y: Sequence[float],
    y_from_zero: bool,
    legend: Sequence[_Entry],
    size: tuple[int, int],
) -> _Frame:
    """Ranges with some air, room for title, legend rows and the longest tick label."""
    width, height = size
    x_low, x_high = (min(x), max(x)) if x else (0.0, 1.0)
    if x_low == x_high:
        x_low, x_high = max(x_low - 1, min(x_low, 0.0)), x_high + 1
    air = 0.02 * (x_high - x_low)
    y_low, y_high = (min(y), max(y)) if y else (0.0, 1.0)
    if y_from_zero:
        y_low, y_high = min(y_low, 0.0), max(y_high, 0.0)
    if y_high - y_low <= 1e-12 * max(abs(y_low), abs(y_high)):
        y_low, y_high = y_low - (abs(y_low) / 10), y_high + (abs(y_high) / 10 or 1.0)
    y_air = 0.06 * (y_high - y_low)
    y_low -= 0 if y_low == 0 else y_air
    y_high += 0 if y_high == 0 else y_air
    labels = tick_labels(nice_ticks(y_low, y_high))
    rows = max((row for _, _, row in _placed(legend, width)), default=-1) + 1
    return _Frame(
        width=width,
        height=height,
        left=18 + _LETTER * max(map(len, labels)),
        top=36 + _LEGEND_ROW * rows,
        x_range=(x_low - air, x_high + air),
        y_range=(y_low, y_high),
    )


def _placed(legend: Sequence[_Entry], width: int) -> list[tuple[_Entry, float, int]]:
    """Each entry with its left end and its row, wrapped to the width."""
    placed: list[tuple[_Entry, float, int]] = []
    left, row = float(_MARGIN), 0
    for entry in legend:
        needs = 24 + _LETTER * len(entry[0]) + 14
        if left > _MARGIN and left + needs > width:
            left, row = float(_MARGIN), row + 1
        placed.append((entry, left, row))
        left += needs
    return placed


def _head(
    frame: _Frame, title: str, y_label: str, x_label: str, legend: Sequence[_Entry], full: bool
) -> None:
    """Title, legend, axes with their ticks; "no data" if there is none."""
    add = frame.parts.append
    soft = f'<tspan class="unit" dx="8">{escape(y_label)}</tspan>' if y_label else ""
    add(f'<text class="title" x="{_MARGIN}" y="20">{escape(title)}{soft}</text>')
    for (label, style), left, row in _placed(legend, int(frame.width)):
        y = 40.0 + _LEGEND_ROW * row
        add(f'<line x1="{left:.0f}" x2="{left + 18:.0f}" y1="{y - 4}" y2="{y - 4}" {style}/>')
        add(f'<text x="{left + 24:.0f}" y="{y}">{escape(label)}</text>')
    bottom, right = frame.bottom, frame.right
    if not full:
        add(f'<text x="{frame.width / 2}" y="{(frame.top + bottom) / 2}" {_CENTRED}>no data</text>')
        return
    add('<g class="y-ticks">')
    ticks = nice_ticks(*frame.y_range)
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        y = frame.at_y(tick)
        add(f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        add(f'<text x="{frame.left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    add('</g><g class="x-ticks">')
    ticks = nice_ticks(*frame.x_range, target=max(2, int((right - frame.left) / 75)))
    if len(ticks) > 1 and ticks[1] - ticks[0] < 1:  # steps are whole
        ticks = [tick for tick in ticks if abs(tick - round(tick)) < 1e-6]
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        x = frame.at_x(tick)
        add(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        add(f'<text x="{x:.1f}" y="{bottom + 17}" {_CENTRED}>{label}</text>')
    add(f'</g><line class="axis" x1="{frame.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    add(f'<text x="{right}" y="{bottom + 33}" text-anchor="end">{escape(x_label)}</text>')


def _marks(frame: _Frame, marks: Sequence[Mark]) -> None:
    """Full-height lines, or short ones over the axis where many would hide the curves."""
    length = frame.bottom - frame.top if len(marks) <= _MOST_FULL_MARKS else 12
    frame.parts.append('<g class="marks">')
    for mark in marks:
        x = f"{frame.at_x(mark.x):.1f}"
        hover = f"<title>{escape(mark.label or mark.kind)}, step {mark.x:g}</title>"
        ends = f'y1="{frame.bottom - length}" y2="{frame.bottom}"'
        frame.parts.append(f'<line class="mark" x1="{x}" x2="{x}" {ends}>{hover}</line>')
    frame.parts.append("</g>")


def _curve(frame: _Frame, curve: _Curve, dodge: float) -> None:
    """A curve with its band or its error bars, and its mean; gaps where values are missing."""
    one = curve.series
    add, color = frame.data.append, _color(one.color or 0)
    add(f'<g class="curve" stroke="{color}" fill="none" transform="translate({dodge:g} 0)">')
    rows = list(zip(one.x, one.y, one.low or one.y, one.high or one.y, strict=True))
    if one.low and not one.points:
        band = [(a, low, high) for a, _, low, high in rows if finite(low) and finite(high)]
        if len(band) > 1:
            at, lows, highs = zip(*band, strict=True)
            outline = frame.path([*at, *reversed(at)], [*highs, *reversed(lows)])
            add(f'<path d="{outline}Z" fill="{color}" fill-opacity=".16" stroke="none"/>')
    faint = ' class="faint"' if curve.mean else ""
    add(f"<g{faint}>")
    for piece in _pieces(one.x, one.y):
        if len(piece) > 1:
            add(f'<path class="line" d="{frame.path(*zip(*piece, strict=True))}"/>')
        elif not one.points:
            add(_dot(frame.at_x(piece[0][0]), frame.at_y(piece[0][1])))
    add("</g>")
    for piece in _pieces(one.x, curve.mean) if curve.mean else ():
        add(f'<path class="line mean" d="{frame.path(*zip(*piece, strict=True))}"/>')
    if one.points:
        for a, b, low, high in rows:
            if finite(b):
                add(_point(frame, one.label, (a, b, low, high)))
    add("</g>")


def _point(frame: _Frame, label: str, row: tuple[float, float, float | None, float | None]) -> str:
    """A dot, its error bar, and what shows on hovering."""
    a, b, low, high = row
    x, y = frame.at_x(a), frame.at_y(b)
    bar, hover = "", f"{label}, step {a:g}: {b:.4g}"
    if finite(low) and finite(high) and low < high:
        bar = f'<path class="bar" d="M{x:.1f} {frame.at_y(high):.1f}V{frame.at_y(low):.1f}"/>'
        hover += f" [{low:.4g}, {high:.4g}]"
    return f"<g><title>{escape(hover)}</title>{bar}{_dot(x, y)}</g>"


def _dot(x: float, y: float) -> str:
    """A line without length: it stays round where a chart is stretched."""
    return f'<path class="dot" d="M{x:.1f} {y:.1f}h0"/>'


def _pieces(x: Sequence[float], y: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    """Runs of finite values."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(x, y, strict=True):
        if finite(b):
            pieces[-1].append((a, b))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _color(index: int) -> str:
    return f"var(--c{index % _COLORS})"


def _stroke(index: int, faint: bool = False) -> str:
    return f'stroke="{_color(index)}" stroke-width="3"' + (' stroke-opacity=".4"' if faint else "")


def _values(
    frame: _Frame, curves: Sequence[_Curve], y_from_zero: bool, marks: Sequence[Mark]
) -> dict[str, Any]:
    """What the script needs to say values and to stretch the chart; missing values are null."""
    return {
        "plot": [round(edge, 1) for edge in (frame.left, frame.top, frame.right, frame.bottom)],
        "x": frame.x_range,
        "y": frame.y_range,
        "fromZero": y_from_zero,
        "marks": [[mark.x, mark.label or mark.kind] for mark in marks],
        "curves": [
            {
                "label": curve.series.label,
                "color": _color(curve.series.color or 0),
                "smooth": curve.series.smooth,
                "stride": curve.stride,
                **{
                    name: [_brief(value) for value in getattr(curve.series, name) or ()]
                    for name in ("x", "y", "low", "high")
                },
            }
            for curve in curves
        ],
    }


def _brief(value: float | None) -> float | None:
    """Five significant digits, or null."""
    return float(f"{value:.5g}") if finite(value) else None


def _svg(frame: _Frame, title: str, values: Mapping[str, Any] | None) -> str:
    """The whole drawing; without `values` it is a file of its own."""
    left, top, wide, high = (
        frame.left,
        frame.top,
        frame.right - frame.left,
        frame.bottom - frame.top,
    )
    place = f'x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{high:.1f}"'
    box = f'viewBox="{left:.1f} {top:.1f} {wide:.1f} {high:.1f}"'
    data = f'<svg class="data" {place} {box}><g>{"".join(frame.data)}</g></svg>'
    size = f'viewBox="0 0 {frame.width} {frame.height}" role="img" aria-label="{escape(title)}"'
    body = "".join(frame.parts) + (data if frame.data else "")
    if values is not None:
        said = escape(json.dumps(values, separators=(",", ":")))
        return f'<svg class="chart" {size} data-chart="{said}">{body}</svg>'
    alone = f'xmlns="http://www.w3.org/2000/svg" width="{frame.width}" height="{frame.height}"'
    style = f'<style>{CHART_CSS}</style><rect width="100%" height="100%" fill="var(--page)"/>'
    return f'<svg class="chart" {alone} {size}>{style}{body}</svg>'
