"""Charts: ticks, gaps, extremes, and nothing outside the picture."""

import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gardo.report.axes import nice_ticks, tick_labels
from gardo.report.chart import line_chart, stacked_chart
from gardo.report.series import Mark, Series


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 10))
def test_ticks_are_few_even_and_inside(low: float, width: float, target: int) -> None:
    high = low + width
    ticks = nice_ticks(low, high, target)
    slack = width / 1e6 + math.ulp(max(abs(low), abs(high)))
    assert len(ticks) <= target + 1 and all(low - slack <= t <= high + slack for t in ticks)
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        mantissa, power = (float(part) for part in f"{step:e}".split("e"))
        # each of the two ticks is rounded to a multiple of the largest number's last place
        rounding = 2 * math.ulp(max(abs(low), abs(high))) / 10.0**power
        assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-3 + rounding
    labels = tick_labels(ticks)
    assert len(set(labels)) == len(labels), "two ticks read the same"


def test_tick_labels() -> None:
    assert tick_labels([0, 0.05, 0.1]) == ["0", "0.05", "0.10"]
    assert tick_labels([-1e-4, 0, 1e-4]) == ["\u22121e\u22124", "0", "1e\u22124"]
    assert tick_labels([0.99999, 1.0, 1.00001]) == ["0.99999", "1.00000", "1.00001"]
    assert tick_labels([0, 500, 1000]) == ["0", "500", "1000"]


def svg(chart: str) -> ET.Element:
    return ET.fromstring(chart)


Points = list[tuple[float, float]]


def drawn(chart: str, *, filled: bool) -> list[Points]:
    """Points of every line in the chart, or of every filled area."""
    found = []
    for element in svg(chart).iter("path"):
        if (element.get("fill") is not None) == filled and element.get("class") != "dot":
            numbers = re.findall(r"-?[\d.]+", element.get("d", "").split("V")[0])
            found.append(
                [(float(a), float(b)) for a, b in zip(numbers[::2], numbers[1::2], strict=True)]
            )
    return found


def test_a_line_has_gaps_where_values_are_missing() -> None:
    y = [1.0, 2.0, math.nan, 3.0, None, 5.0, 4.0]
    chart = line_chart([Series("a", range(7), y)], "t")
    first, second = drawn(chart, filled=False)
    assert len(first) == 2 and len(second) == 2
    assert first[0][1] > first[1][1], "larger values are higher up"
    assert len(svg(chart).findall(".//path[@class='dot']")) == 1, "3.0 has no neighbour"


def test_everything_drawn_is_inside_the_chart() -> None:
    series = Series(
        "a", [0, 10, 20], [1.0, 5.0, -2.0], [0.0, 4.0, -9.0], [2.0, 9.0, 0.0], points=True
    )
    chart = svg(line_chart([series, series], "t", marks=[Mark(10, "reset"), Mark(99, "late")]))
    dots = [e.get("d", "").strip("Mh0").split() for e in chart.iterfind(".//path[@class='dot']")]
    assert len(dots) == 6
    xs = [float(e.get(key, 0)) for e in chart.iter() for key in ("x1", "x2")]
    ys = [float(e.get(key, 0)) for e in chart.iter() for key in ("y1", "y2")]
    xs, ys = xs + [float(x) for x, _ in dots], ys + [float(y) for _, y in dots]
    assert max(xs) <= 560 and max(ys) <= 280 and min(xs + ys) >= 0
    assert sum(e.get("class") == "mark" for e in chart.iter()) == 2  # one, and its legend


def test_a_chart_carries_its_values_for_the_script_and_a_file_does_not() -> None:
    series = Series('a "b"', [0, 1], [1.0, math.nan], [0.123456, None], [2.0, math.inf])
    chart = line_chart([series], "t", marks=[Mark(1, "reset", "reset <kl>")])
    values = json.loads(svg(chart).get("data-chart", ""))
    (curve,) = values["curves"]
    assert curve["label"] == 'a "b"' and curve["x"] == [0, 1] and curve["y"] == [1.0, None]
    assert curve["low"] == [0.12346, None] and curve["high"] == [2.0, None]
    assert values["marks"] == [], "the mark is outside the known values"
    assert "data-chart" not in line_chart([series], "t", standalone=True)


def test_what_may_be_smoothed_is_drawn_faint_under_its_mean() -> None:
    chart = svg(line_chart([Series("a", range(40), [0.0, 1.0] * 20, smooth=4)], "t"))
    (mean,) = chart.iterfind(".//path[@class='line mean']")
    (faint,) = chart.iterfind(".//g[@class='faint']/path")

    def height(path: ET.Element) -> float:
        ys = [float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", path.get("d", ""))]
        return max(ys) - min(ys)

    assert height(mean) < 0.4 * height(faint)
    plain = svg(line_chart([Series("a", range(40), [0.0, 1.0] * 20, smooth=1)], "t"))
    assert plain.find(".//path[@class='line mean']") is None


@pytest.mark.parametrize(
    "y", [[], [math.nan] * 3, [0.0] * 3, [5.0], [1e300, -1e300], [1e-300, 2e-300]]
)
def test_extreme_curves_draw(y: list[float]) -> None:
    chart = line_chart([Series("a", range(len(y)), y)], "t", y_from_zero=True)
    assert ("no data" in chart) == (not y or math.isnan(y[0]))
    assert "nan" not in chart and "inf" not in chart
    svg(chart)


def test_a_long_curve_is_thinned_but_keeps_its_extremes() -> None:
    y = [0.0] * 20_000
    y[777] = 50.0
    chart = line_chart([Series("a", range(20_000), y)], "t")
    assert len(chart) < 60_000
    assert re.search(r">50<", chart), "the spike left the axis"


def test_stacked_layers_add_up() -> None:
    chart = stacked_chart([1, 2], {"a": [1.0, 1.0], "b": [3.0, math.nan]}, "t")
    a, b = drawn(chart, filled=True)  # along the top from left to right, and back below
    assert b[2:] == a[1::-1], "b stands on a"
    left, right = (a[3][1] - a[0][1], a[2][1] - a[1][1])
    assert left == right > 20
    assert b[3][1] - b[0][1] == pytest.approx(3 * left, abs=0.3), "coordinates have one decimal"
    assert b[2] == b[1], "a missing value counts as 0"
    assert "no data" in stacked_chart([], {}, "empty")


def test_labels_are_escaped_and_a_standalone_chart_is_a_file() -> None:
    chart = line_chart([Series("<b>", [0], [1.0]), Series("&", [0], [2.0])], "<i>", standalone=True)
    assert "<b>" not in chart and "<i>" not in chart
    assert svg(chart).tag == "{http://www.w3.org/2000/svg}svg"
