"""Line and stacked charts as SVG text, without a plotting library.

A chart scales with the width it is given. Its colours are CSS variables, light and dark, defined
by `CHART_CSS`, which the page must contain once; `standalone=True` puts them inside the SVG, which
then is a file of its own.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import pairwise
from typing import TypeGuard

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
""".strip()

_COLORS = 8
_LETTER = 6.7  # upper estimate of a 12 px letter's width
_MOST_FULL_MARKS = 25
_MOST_POINTS = 500  # more than these are drawn as means of neighbours with their range
_MARGIN, _RIGHT, _BOTTOM, _LEGEND_ROW = 12, 20, 40, 18  # pixels
_CENTRED = 'text-anchor="middle"'
_Entry = tuple[str, str]  # a legend's label and how its line looks


@dataclass(frozen=True)
class Series:
    """One curve. Values that are None, NaN or infinite are gaps.

    `low` and `high` are drawn as error bars where `points` is set, else as a band. `faint` is for
    raw data under a smoothed curve. `color` is one of eight; the chart chooses by position without
    it.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    color: int | None = None
    points: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Mark:
    """An event: a dashed vertical line, hovering shows `label`.

    Marks of one `kind` share a legend entry.
    """

    x: float
    kind: str
    label: str = ""


@dataclass(frozen=True)
class _Frame:
    """The plot's rectangle and what maps data to it."""

    width: float
    height: float
    left: float
    top: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    parts: list[str] = field(default_factory=list)

    def at_x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.width - self.left - _RIGHT)

    def at_y(self, value: float) -> float:
        low, high = self.y_range
        bottom = self.height - _BOTTOM
        return bottom - (value - low) / (high - low) * (bottom - self.top)

    def path(self, x: Sequence[float], y: Sequence[float]) -> str:
        points = (f"{self.at_x(a):.1f} {self.at_y(b):.1f}" for a, b in zip(x, y, strict=True))
        return "M" + "L".join(points)


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
    series = [
        replace(_thin(one), color=index if one.color is None else one.color)
        for index, one in enumerate(series)
    ]
    x_all: list[float] = []
    y_all: list[float] = []
    for one in series:
        for a, b, *ends in zip(one.x, one.y, one.low or one.y, one.high or one.y, strict=True):
            if _finite(b):
                x_all.append(a)
                y_all += [b, *filter(_finite, ends)]
    legend = [(one.label, _stroke(one.color or 0, one.faint)) for one in series]
    legend = legend if len(legend) > 1 else []  # the title names a single curve
    if x_all:
        marks = [mark for mark in marks if min(x_all) <= mark.x <= max(x_all)]
        legend += [(kind, 'class="mark"') for kind in dict.fromkeys(mark.kind for mark in marks)]
    frame = _frame(x_all, y_all, y_from_zero, legend, (width, height))
    _head(frame, title, y_label, x_label, legend, bool(x_all))
    if x_all:
        _marks(frame, marks)
    for index, one in enumerate(series):
        _curve(frame, one, dodge=5.0 * (index - (len(series) - 1) / 2) if one.low else 0.0)
    return _svg(frame, title, standalone)


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
    size = max(1, math.ceil(len(x) / _MOST_POINTS))
    x = _bucket(x, size)
    base = [0.0] * len(x)
    outlines: list[tuple[list[float], list[float]]] = []
    for values in layers.values():
        thinned = _bucket([value if _finite(value) else 0.0 for value in values], size)
        top = [below + value for below, value in zip(base, thinned, strict=True)]
        outlines.append((base, top))
        base = top
    full = bool(x) and bool(layers)
    legend = [(label, _stroke(index)) for index, label in enumerate(layers)] if full else []
    frame = _frame(x if full else [], base if full else [], True, legend, (width, height))
    _head(frame, title, y_label, x_label, legend, full)
    for index, (below, top) in enumerate(outlines if full else []):
        outline = frame.path([*x, *reversed(x)], [*top, *reversed(below)])
        color = _color(index)
        add = frame.parts.append
        add(f'<path d="{outline}Z" fill="{color}" fill-opacity=".7" stroke="{color}"/>')
    return _svg(frame, title, standalone)


def nice_ticks(low: float, high: float, target: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high], about `target` of them."""
    raw = (high - low) / max(target, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """One notation for all: as many decimals as their distance needs, or a common power of ten."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if largest == 0:
        return ["0" for _ in ticks]
    distance = min((b - a for a, b in pairwise(ticks)), default=largest)
    power = math.floor(math.log10(largest) + 1e-9)
    exponent = power if not -3 <= power < 5 else 0
    decimals = max(0, exponent - math.floor(math.log10(distance) + 1e-9))
    labels = []
    for tick in ticks:
        zero = abs(tick) < distance * 1e-6
        text = "0" if zero else f"{tick / 10.0**exponent:.{decimals}f}"
        labels.append(
            (text if zero or not exponent else f"{text}e{exponent}").replace("-", "\u2212")
        )
    return labels


def smoothed(y: Sequence[float | None], window: int) -> list[float | None]:
    """Centred moving mean of the finite values over `window` neighbours; None where none is."""
    half = window // 2
    result: list[float | None] = []
    for index in range(len(y)):
        near = [value for value in y[max(0, index - half) : index + half + 1] if _finite(value)]
        result.append(_mean(near) if near else None)
    return result


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _bucket(values: Sequence[float], size: int) -> list[float]:
    return [_mean(values[start : start + size]) for start in range(0, len(values), size)]


def _thin(one: Series) -> Series:
    """A long curve as means of neighbours, with their smallest and largest value as a band."""
    if len(one.y) <= _MOST_POINTS or one.points:
        return one
    size = math.ceil(len(one.y) / _MOST_POINTS)
    rows = [
        [value for value in one.y[start : start + size] if _finite(value)]
        for start in range(0, len(one.y), size)
    ]
    return replace(
        one,
        x=_bucket(one.x, size),
        y=[_mean(row) if row else None for row in rows],
        low=[min(row, default=None) for row in rows],
        high=[max(row, default=None) for row in rows],
    )


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
    bottom, right = frame.height - _BOTTOM, frame.width - _RIGHT
    if not full:
        add(f'<text x="{frame.width / 2}" y="{(frame.top + bottom) / 2}" {_CENTRED}>no data</text>')
        return
    ticks = nice_ticks(*frame.y_range)
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        y = frame.at_y(tick)
        add(f'<line class="grid" x1="{frame.left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        add(f'<text x="{frame.left - 7:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    ticks = nice_ticks(*frame.x_range, target=max(2, int((right - frame.left) / 75)))
    if len(ticks) > 1 and ticks[1] - ticks[0] < 1:  # steps are whole
        ticks = [tick for tick in ticks if abs(tick - round(tick)) < 1e-6]
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        x = frame.at_x(tick)
        add(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        add(f'<text x="{x:.1f}" y="{bottom + 17}" {_CENTRED}>{label}</text>')
    add(f'<line class="axis" x1="{frame.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    add(f'<text x="{right}" y="{bottom + 33}" text-anchor="end">{escape(x_label)}</text>')


def _marks(frame: _Frame, marks: Sequence[Mark]) -> None:
    """Full-height lines, or short ones over the axis where many would hide the curves."""
    length = frame.height - _BOTTOM - frame.top if len(marks) <= _MOST_FULL_MARKS else 12
    for mark in marks:
        if frame.x_range[0] <= mark.x <= frame.x_range[1]:
            x = f"{frame.at_x(mark.x):.1f}"
            hover = f"<title>{escape(mark.label or mark.kind)}, step {mark.x:g}</title>"
            ends = f'y1="{frame.height - _BOTTOM - length}" y2="{frame.height - _BOTTOM}"'
            frame.parts.append(f'<line class="mark" x1="{x}" x2="{x}" {ends}>{hover}</line>')


def _curve(frame: _Frame, one: Series, dodge: float) -> None:
    """A curve with its band or its error bars; gaps where values are missing."""
    add, color = frame.parts.append, _color(one.color or 0)
    rows = [
        (a, b, low, high)
        for a, b, low, high in zip(one.x, one.y, one.low or one.y, one.high or one.y, strict=True)
    ]
    if not one.points:
        band = [(a, low, high) for a, _, low, high in rows if _finite(low) and _finite(high)]
        if one.low and len(band) > 1:
            at, lows, highs = zip(*band, strict=True)
            outline = frame.path([*at, *reversed(at)], [*highs, *reversed(lows)])
            add(f'<path d="{outline}Z" fill="{color}" fill-opacity=".16"/>')
    look = 'stroke-opacity=".35" stroke-width="1"' if one.faint else 'stroke-width="1.8"'
    if one.points:
        look += f' transform="translate({dodge:g} 0)"'
    for piece in _pieces(one.x, one.y):
        if len(piece) == 1 and not one.points:
            x, y = frame.at_x(piece[0][0]), frame.at_y(piece[0][1])
            add(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.6" fill="{color}"/>')
        else:
            path = frame.path(*zip(*piece, strict=True))
            add(f'<path d="{path}" fill="none" stroke="{color}" stroke-linejoin="round" {look}/>')
    if one.points:
        for a, b, low, high in rows:
            if _finite(b):
                add(_point(frame, one.label, color, dodge, (a, b, low, high)))


def _point(
    frame: _Frame,
    label: str,
    color: str,
    dodge: float,
    row: tuple[float, float, float | None, float | None],
) -> str:
    """A dot, its error bar with caps, and what shows on hovering."""
    a, b, low, high = row
    x, y = frame.at_x(a) + dodge, frame.at_y(b)
    bar, hover = "", f"{label}, step {a:g}: {b:.4g}"
    if _finite(low) and _finite(high) and low < high:
        top, bottom = frame.at_y(high), frame.at_y(low)
        lines = f"M{x:.1f} {top:.1f}V{bottom:.1f}" + "".join(
            f"M{x - 4:.1f} {end:.1f}h8" for end in (top, bottom)
        )
        bar = f'<path d="{lines}" fill="none" stroke="{color}" stroke-width="1.4"/>'
        hover += f" [{low:.4g}, {high:.4g}]"
    dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.4" fill="{color}"/>'
    return f"<g><title>{escape(hover)}</title>{bar}{dot}</g>"


def _pieces(x: Sequence[float], y: Sequence[float | None]) -> list[list[tuple[float, float]]]:
    """Runs of finite values."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(x, y, strict=True):
        if _finite(b):
            pieces[-1].append((a, b))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _color(index: int) -> str:
    return f"var(--c{index % _COLORS})"


def _stroke(index: int, faint: bool = False) -> str:
    return f'stroke="{_color(index)}" stroke-width="3"' + (' stroke-opacity=".4"' if faint else "")


def _svg(frame: _Frame, title: str, standalone: bool) -> str:
    extra, style = "", ""
    if standalone:
        extra = f' xmlns="http://www.w3.org/2000/svg" width="{frame.width}" height="{frame.height}"'
        style = f'<style>{CHART_CSS}</style><rect width="100%" height="100%" fill="var(--page)"/>'
    head = f'<svg class="chart"{extra} viewBox="0 0 {frame.width} {frame.height}" role="img"'
    return f'{head} aria-label="{escape(title)}">{style}{"".join(frame.parts)}</svg>'
