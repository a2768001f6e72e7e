"""The log survives crashes and resumes, the screen tells, the report is safe to open."""

import io
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from gardo.report.chart import Mark, Series, line_chart, nice_ticks, stacked_chart, tick_labels
from gardo.report.html import write_report
from gardo.report.metrics_log import MetricsLog, read_metrics
from gardo.report.pictures import save_grid
from gardo.report.progress import Progress, format_duration, format_interval, format_number
from gardo.report.verdict import judge

EVIL = "two <script>alert('x')</script> circles & a \"square\""


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    record = {
        "kind": "step",
        "step": step,
        "seconds": {"sample": 18.2, "reward": 3.1, "train": 24.0},
        "rewards": {
            "hpsv2": {"mean": 0.312 + step / 1000, "std": 0.1, "role": "proxy", "valid": 96},
            "aesthetic": {"mean": 5.5, "std": 0.1, "role": "auxiliary", "valid": 96},
            "pickscore": {"mean": 22.41, "std": 0.1, "role": "held_out", "valid": 96},
        },
        "metrics": {
            "kl": 1.9e-4, "ratio": 1.0, "ratio_error": 3e-5, "clip_fraction": 0.11,
            "gate_share": 0.004, "diversity": 17.3, "loss": 0.1,
        },
        "events": [],
    }  # fmt: skip
    return record | changes


def evaluation_record(step: int, *, proxy: float = 0.0, held_out: float = 0.0) -> dict[str, Any]:
    def around(value: float, **extra: str) -> dict[str, Any]:
        return {"mean": value, "low": value - 0.01, "high": value + 0.01, **extra}

    return {
        "kind": "evaluation",
        "step": step,
        "seconds": 4.1,
        "rewards": {
            "count": around(0.6 + proxy, role="proxy"),
            "quality": around(0.9 + held_out, role="held_out"),
        },
        "change": {"count": around(proxy), "quality": around(held_out)},
        "diversity": {"layout": 3.0 - step / 100},
        "images": f"samples/step-{step:05d}.png",
        "image_count": 288,
        "prompt_count": 36,
        "prompts": [EVIL, "one green triangle"],
    }


def write_log(path: Path, records: list[dict[str, Any]]) -> None:
    with MetricsLog(path) as log:
        for record in records:
            log.write(record)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    records = [evaluation_record(0)]
    records += [
        step_record(step, events=["reference reset (kl)"] * (step == 7)) for step in range(1, 61)
    ]
    records.append(evaluation_record(60, proxy=0.1))
    write_log(tmp_path / "metrics.jsonl", records)
    (tmp_path / "recipe.yaml").write_text("run: {name: <i>flux</i>}\nnote: '</pre><script>'\n")
    for step in (0, 60):
        save_grid(torch.rand(4, 3, 8, 8), tmp_path / f"samples/step-{step:05d}.png", 2)
    return tmp_path


# The log.


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-320, -0.0, math.pi * 1e-7, 2.0**-1074, 1 / 3]
    write_log(
        tmp_path / "m.jsonl", [step_record(1, metrics={str(i): v for i, v in enumerate(values)})]
    )
    read = read_metrics(tmp_path / "m.jsonl")[0]["metrics"].values()
    assert [value.hex() for value in read] == [value.hex() for value in values]


def test_not_finite_numbers_stay_strict_json_and_text_stays_text(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    record = evaluation_record(0) | {"prompts": ["nan", "inf"], "diversity": {"layout": math.nan}}
    record["rewards"] = {"a": {"mean": math.inf, "low": -math.inf, "role": "nan"}}
    write_log(path, [record])

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    read = read_metrics(path)[0]
    assert math.isnan(read["diversity"]["layout"])
    assert read["rewards"]["a"] == {"mean": math.inf, "low": -math.inf, "role": "nan"}
    assert read["prompts"] == ["nan", "inf"]


@given(st.text(st.characters(), max_size=30))
def test_any_prompt_comes_back(tmp_path_factory: pytest.TempPathFactory, prompt: str) -> None:
    path = tmp_path_factory.mktemp("log") / "m.jsonl"
    write_log(path, [evaluation_record(0) | {"prompts": [prompt]}])
    assert read_metrics(path)[0]["prompts"] == [prompt]


def test_each_line_is_there_before_the_next(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        for step in (1, 2, 3):
            log.write(step_record(step))
            assert len(read_metrics(tmp_path / "m.jsonl")) == step


def test_resume_drops_later_records_and_keeps_earlier_bytes(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_log(path, [evaluation_record(0), *(step_record(step) for step in range(1, 6))])
    before = path.read_bytes().splitlines(keepends=True)
    with MetricsLog(path, from_step=4) as log:
        assert path.read_bytes() == b"".join(before[:4])
        log.write(step_record(4, events=["again"]))
    records = read_metrics(path)
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert records[-1]["events"] == ["again"]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_torn_last_line_is_skipped_and_mended(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.jsonl"
    write_log(path, [step_record(1), step_record(2)])
    path.write_bytes(path.read_bytes()[:-cut])
    kept = [1, 2] if cut == 1 else [1]  # without its newline alone a record is whole
    assert [record["step"] for record in read_metrics(path)] == kept
    with MetricsLog(path, from_step=9) as log:
        log.write(step_record(9))
    assert [record["step"] for record in read_metrics(path)] == [*kept, 9]


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_log(path, [step_record(1), step_record(2)])
    path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step": ', 1))
    with pytest.raises(ValueError, match="line 1"):
        read_metrics(path)


def test_a_finished_log_is_not_overwritten(tmp_path: Path) -> None:
    write_log(tmp_path / "m.jsonl", [step_record(1)])
    with pytest.raises(FileExistsError):
        MetricsLog(tmp_path / "m.jsonl")
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"kind": "stepp", "step": 1}, ValueError),
        ({"kind": "step", "step": -1}, ValueError),
        ({"kind": "step", "step": 1.5}, ValueError),
        ({"kind": "step", "step": 1, "metrics": {"loss": torch.tensor(1.0)}}, TypeError),
    ],
)
def test_a_bad_record_is_refused_and_leaves_no_trace(
    tmp_path: Path, record: dict[str, Any], error: type[Exception]
) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.write(step_record(1))
        with pytest.raises(error):
            log.write(record)
    assert len(read_metrics(tmp_path / "m.jsonl")) == 1


# The screen.


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def screen() -> Iterator[tuple[Progress, Clock, io.StringIO]]:
    clock, text = Clock(), io.StringIO()
    console = Console(file=text, width=80, force_terminal=False)
    with Progress(500, console=console, clock=clock) as progress:
        yield progress, clock, text


def test_phases_are_timed_and_add_up(screen: tuple[Progress, Clock, io.StringIO]) -> None:
    progress, clock, _ = screen
    for seconds in (2.0, 3.0):
        with progress.phase("sample"):
            clock.now += seconds
        clock.now += 10  # between phases nothing is counted
    with pytest.raises(KeyError), progress.phase("train"):
        clock.now += 1
        raise KeyError
    assert progress.take_seconds() == {"sample": 5.0, "train": 1.0}
    assert progress.seconds == {} == progress.take_seconds()


def test_phases_do_not_nest(screen: tuple[Progress, Clock, io.StringIO]) -> None:
    progress, _, _ = screen
    inner = pytest.raises(RuntimeError, match="nest")
    with progress.phase("sample"), inner, progress.phase("reward"):
        pass
    with progress.phase("reward"):
        pass
    assert list(progress.take_seconds()) == ["sample", "reward"]


def test_plain_lines(screen: tuple[Progress, Clock, io.StringIO]) -> None:
    progress, clock, text = screen
    with progress.phase("load"):
        clock.now += 5000  # before the first step: no part of the time left
    progress.take_seconds()
    for step in (1, 2):
        with progress.phase("train"):
            clock.now += 60
        progress.step(step_record(step, events=["reference reset (kl)"] * (step == 2)))
    first = "step 1/500  sample 18.2s  reward 3.1s  train 24.0s"
    first += "  |  hpsv2 0.313  pickscore 22.41 (held out)"
    measures = "             kl 1.9e-4  ratio 1 +- 3e-5  clip 11 %  gate 0.4 %"
    measures += "  diversity 17.3  |  ETA "
    second = first.replace("1/500", "2/500").replace("0.313", "0.314 (+0.001)")
    second = second.replace("22.41", "22.41 (+0.00)")
    assert text.getvalue().splitlines() == [
        first,
        measures + "8h19m",
        second,
        measures + "8h18m",
        "             reference reset (kl)",
    ]


def test_evaluation_lines(screen: tuple[Progress, Clock, io.StringIO]) -> None:
    progress, _, text = screen
    progress.evaluation(evaluation_record(60, proxy=0.1))
    assert text.getvalue().splitlines() == [
        "evaluation at step 60  288 images  36 prompts  4.1s",
        "             count 0.700 [0.690, 0.710]  change +0.100 [+0.090, +0.110]  (proxy)",
        "             quality 0.900 [0.890, 0.910]  change +0.000 [-0.010, +0.010]  (held out)",
        "             diversity  layout 2.40",
    ]


def test_a_sparse_or_broken_record_prints(screen: tuple[Progress, Clock, io.StringIO]) -> None:
    progress, _, text = screen
    progress.step({"kind": "step", "step": 1})
    progress.step({"kind": "step", "step": 2, "metrics": {"kl": math.nan, "unknown": 1.0}})
    progress.message("[bold]a bracket is not markup[/bold] :smile:")
    assert "step 1/500\n" in text.getvalue() and "kl nan" in text.getvalue()
    assert "[bold]a bracket is not markup[/bold] :smile:\n" in text.getvalue()


def test_history_gives_the_start_to_compare_with() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=False)
    Progress(9, console=console, history=[step_record(1)]).step(step_record(5))
    assert "hpsv2 0.317 (+0.004)" in text.getvalue()


def test_disabled_measures_and_is_silent() -> None:
    clock, text = Clock(), io.StringIO()
    with Progress(5, enabled=False, console=Console(file=text), clock=clock) as progress:
        with progress.phase("sample"):
            clock.now += 2
        progress.step(step_record(1))
        progress.evaluation(evaluation_record(0))
        progress.message("hello")
    assert progress.take_seconds() == {"sample": 2.0} and text.getvalue() == ""


def test_terminal_has_a_live_line_and_gives_the_cursor_back() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, _environ={"TERM": "xterm"})
    with Progress(5, console=console) as progress:
        with progress.phase("sample"):
            progress.message("loading")
        progress.step(step_record(1))
    assert "step 1/5" in text.getvalue() and "sample" in text.getvalue()
    assert text.getvalue().rindex("\x1b[?25h") > text.getvalue().rindex("\x1b[?25l")


def test_formats() -> None:
    numbers = [0.66666, 22.412, 1.94e-4, 0.0, 12345.6, 0.99999, -3e-5, 2e9, math.nan]
    assert [format_number(value, 3) for value in numbers] == [
        "0.667", "22.4", "1.94e-4", "0", "12346", "1.00", "-3e-5", "2e9", "nan",
    ]  # fmt: skip
    assert format_number(None) == "-"
    assert format_interval({"mean": 0.6666, "low": 0.61, "high": 0.72}) == "0.667 [0.610, 0.720]"
    assert (
        format_interval({"mean": 0.5, "low": math.nan, "high": math.nan}, signed=True) == "+0.5000"
    )
    durations = [4.4, 59.7, 723, 21132, 100000, math.nan]
    assert [format_duration(value) for value in durations] == [
        "4s", "1m00s", "12m03s", "5h52m", "1d03h", "?",
    ]  # fmt: skip


# Pictures.


def test_grid_places_pixels_row_by_row(tmp_path: Path) -> None:
    images = torch.zeros(3, 3, 1, 2)
    images[0, 0] = 1.0  # red
    images[1, 1] = 7.0  # clamped to green
    images[2, 2, 0, 1] = 0.5
    images[2, 0, 0, 0] = math.nan
    save_grid(images.to(torch.bfloat16), tmp_path / "new" / "a.png", columns=2, scale=3, padding=1)
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.size == (2 * 6 + 3, 2 * 3 + 3)
        gap = picture.getpixel((0, 0))
        assert picture.getpixel((1, 1)) == picture.getpixel((6, 3)) == (255, 0, 0)
        assert picture.getpixel((8, 1)) == (0, 255, 0) and picture.getpixel((7, 1)) == gap
        assert picture.getpixel((1, 5)) == (0, 0, 0) and picture.getpixel((4, 5)) == (0, 0, 128)
        assert picture.getpixel((8, 5)) == gap
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 1, 4, 4), (3, 4, 4)])
def test_grid_refuses_other_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected images"):
        save_grid(torch.zeros(shape), tmp_path / "a.png", 2)
    assert not list(tmp_path.iterdir())


# Charts.


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 10))
def test_ticks_are_few_even_and_inside(low: float, width: float, target: int) -> None:
    high = low + width
    ticks = nice_ticks(low, high, target)
    assert len(ticks) <= target + 1 and all(
        low - width / 1e6 <= t <= high + width / 1e6 for t in ticks
    )
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


def paths(chart: str) -> list[list[tuple[float, float]]]:
    """Points of every line in the chart that is not filled."""
    found = []
    for element in svg(chart).iter():
        if element.tag.endswith("path") and element.get("fill") == "none":
            numbers = re.findall(r"-?[\d.]+", element.get("d", "").split("V")[0])
            found.append(
                [(float(a), float(b)) for a, b in zip(numbers[::2], numbers[1::2], strict=False)]
            )
    return found


def test_a_line_has_gaps_where_values_are_missing() -> None:
    y = [1.0, 2.0, math.nan, 3.0, None, 5.0, 4.0]
    first, second = paths(line_chart([Series("a", range(7), y)], "t"))
    assert len(first) == 2 and len(second) == 2
    assert first[0][1] > first[1][1], "larger values are higher up"
    assert svg(line_chart([Series("a", range(7), y)], "t")).find(".//circle") is not None


def test_everything_drawn_is_inside_the_chart() -> None:
    series = Series(
        "a", [0, 10, 20], [1.0, 5.0, -2.0], [0.0, 4.0, -9.0], [2.0, 9.0, 0.0], points=True
    )
    chart = svg(line_chart([series, series], "t", marks=[Mark(10, "reset"), Mark(99, "late")]))
    xs = [float(e.get(key, 0)) for e in chart.iter() for key in ("x1", "x2", "cx")]
    ys = [float(e.get(key, 0)) for e in chart.iter() for key in ("y1", "y2", "cy")]
    assert max(xs) <= 560 and max(ys) <= 280 and min(xs + ys) >= 0
    assert sum(e.get("class") == "mark" for e in chart.iter()) == 2  # one, and its legend


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
    chart = svg(stacked_chart([1, 2], {"a": [1.0, 1.0], "b": [3.0, math.nan]}, "t"))
    assert "4" in [e.text for e in chart.iter()]
    svg(stacked_chart([], {}, "empty"))


def test_labels_are_escaped_and_a_standalone_chart_is_a_file() -> None:
    chart = line_chart([Series("<b>", [0], [1.0]), Series("&", [0], [2.0])], "<i>", standalone=True)
    assert "<b>" not in chart and "<i>" not in chart
    assert svg(chart).tag == "{http://www.w3.org/2000/svg}svg"


# The verdict.


@pytest.mark.parametrize(
    ("proxy", "held_out", "tone", "words"),
    [
        (0.1, 0.0, "good", "count rose by 0.100 [0.090, 0.110], from 0.600 to 0.700."),
        (0.1, -0.2, "bad", "quality fell by 0.200 [0.190, 0.210], from 0.900 to 0.700."),
        (0.0, -0.2, "bad", "count did not clearly change: +0.000 [-0.010, +0.010]"),
        (0.005, 0.0, "", "count did not clearly change"),
    ],
)
def test_verdict(proxy: float, held_out: float, tone: str, words: str) -> None:
    middle = evaluation_record(30, proxy=9, held_out=-9)
    last = evaluation_record(60, proxy=proxy, held_out=held_out)
    verdict = judge([evaluation_record(0), middle, last])
    assert verdict.tone == tone and words in " ".join(verdict.sentences)
    assert "layout 3.00 to 2.40 (-20\u00a0%)" in verdict.sentences[-1]
    assert ("hacking" in verdict.conclusion) == (proxy == 0.1 and held_out == -0.2)


def test_verdict_concludes_nothing_without_intervals() -> None:
    last = evaluation_record(60, proxy=0.1)
    del last["change"]
    assert judge([evaluation_record(0), last]).tone == ""
    last["change"] = {"count": {"mean": 0.1, "low": math.nan, "high": math.nan}}
    assert "no interval" in judge([evaluation_record(0), last]).sentences[0]
    assert judge([]).sentences == judge([last]).sentences == ()


# The report.


def test_report_shows_the_run(run_folder: Path) -> None:
    path = write_report(run_folder)
    page = path.read_text()
    assert path == run_folder / "report.html"
    assert "count rose by 0.100 [0.090, 0.110]" in page and "reference reset (kl): step 7" in page
    assert page.count("data:image/png;base64,") == 2
    for title in (
        "KL to the reference",
        "Gate share",
        "Ratio error",
        "Time of a step",
        "Diversity",
        "max |ratio - 1|",
    ):
        assert title in page
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 3 + 3 + 7 + 1
    for chart in charts:
        svg(chart)


def test_report_is_escaped_and_fetches_nothing(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    assert "<script" not in page and "<i>flux" not in page
    assert "two &lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; circles &amp; a" in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page
    assert "href" not in page and set(re.findall(r"""src=["']?(.{15})""", page)) == {
        "data:image/png;"
    }
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    "records", [[], [step_record(1)], [evaluation_record(0)], [{"kind": "step", "step": 1}]]
)
def test_report_of_an_unfinished_run_says_what_is_missing(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    write_log(tmp_path / "metrics.jsonl", records)
    page = write_report(tmp_path).read_text()
    kinds = {record["kind"] for record in records}
    assert ("No evaluation was logged." in page) == ("evaluation" not in kinds)
    assert ("No training step was logged." in page) == ("step" not in kinds)
    assert "No evaluation left a picture." in page and "nothing to compare" in page
    assert "No recipe.yaml" in page and f"<h1>{tmp_path.name}</h1>" in page


def test_report_survives_numbers_that_are_not_finite(tmp_path: Path) -> None:
    broken = step_record(2, metrics={"kl": math.nan, "loss": math.inf})
    last = evaluation_record(3, proxy=math.nan)
    last["diversity"] = {"layout": math.nan}
    write_log(tmp_path / "metrics.jsonl", [evaluation_record(0), step_record(1), broken, last])
    page = write_report(tmp_path).read_text()
    assert "1 step logged numbers that are not finite." in page


def test_report_takes_pictures_only_from_the_runs_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_grid(torch.rand(1, 3, 4, 4), tmp_path / "secret.png", 1)
    outside = evaluation_record(0) | {"images": "../secret.png"}
    no_picture = evaluation_record(1) | {"images": "metrics.jsonl"}
    write_log(run / "metrics.jsonl", [outside, no_picture])
    page = write_report(run).read_text()
    assert "data:image" not in page and "No evaluation left a picture." in page


def test_large_and_many_pictures_are_reduced(tmp_path: Path) -> None:
    records = [evaluation_record(step) for step in range(30)]
    write_log(tmp_path / "metrics.jsonl", records)
    for step in range(30):
        size = 900 if step == 0 else 4
        save_grid(torch.zeros(1, 3, size, size), tmp_path / f"samples/step-{step:05d}.png", 1)
    page = write_report(tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 15 and "15 more pictures" in page
    assert len(page) < 300_000
