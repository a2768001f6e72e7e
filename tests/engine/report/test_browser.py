"""The report in a real browser: it reads values off, zooms and smooths, by hand and by key.

Needs Chromium or Chrome on the PATH and `pip install playwright`; `./run test --all` runs it.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gardo.report.html import write_report
from gardo.report.pictures import save_grid
from tests.engine.report.records import evaluation_record, step_record, write_log

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
STEPS = 60

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with driver.sync_playwright() as playing:
        started = playing.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    records = [evaluation_record(0)]
    for step in range(1, STEPS + 1):
        event = ["reference reset (kl)"] * (step == 30)
        record = step_record(step, events=event, images_per_second=3 + step % 3,
                             peak_bytes=10**9)  # fmt: skip
        record["metrics"] |= {"kl": step / 100, "loss": math.sin(step), "grad_norm": step % 7}
        records.append(record)
    records.append(evaluation_record(STEPS, proxy=0.1, held_out=-0.02))
    write_log(folder / "metrics.jsonl", records)
    for step in (0, STEPS):
        save_grid(torch.rand(4, 3, 32, 32), folder / f"samples/step-{step:05d}.png", 2)
    return write_report(folder)


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    yield from opened(browser, report, width=1280, scheme="light")


def opened(browser: Any, report: Path, width: int, scheme: str) -> Iterator[Any]:
    """The page in a window; at the end, nothing was asked of a network and no script failed."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, trouble = context.new_page(), []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda message: trouble.append(message.text))
    asked = lambda request: request.url.startswith(("file:", "data:")) or trouble.append(request)  # noqa: E731
    page.on("request", asked)
    page.goto(report.as_uri())
    yield page
    context.close()
    assert trouble == []


def chart(page: Any, title: str) -> Any:
    return page.locator("figure.plot", has=page.locator(f'svg[aria-label="{title}"]'))


def x_ticks(figure: Any) -> list[int]:
    return [int(label) for label in figure.locator(".x-ticks text").all_text_contents()]


def move(page: Any, figure: Any, across: float) -> None:
    figure.scroll_into_view_if_needed()
    box = figure.locator("svg.chart").bounding_box()
    page.mouse.move(box["x"] + across * box["width"], box["y"] + box["height"] / 2)


def test_values_are_read_off_under_the_pointer(page: Any) -> None:
    figure = chart(page, "KL to the reference")
    move(page, figure, 0.5)
    tip = figure.locator(".tip")
    step, value = re.fullmatch(r"step (\d+)(?:reference.*)?(0\.\d+)", tip.text_content()).groups()
    assert 20 < int(step) < 40 and float(value) == int(step) / 100
    others = page.locator(".cursor.shown").count()
    assert others > 3, "the same step in the charts beside it"
    page.mouse.move(0, 0)
    assert not tip.is_visible() and page.locator(".cursor.shown").count() == 0


def test_a_phase_and_an_interval_are_read_off_too(page: Any) -> None:
    time = chart(page, "Time of a step")
    move(page, time, 0.5)
    said = time.locator(".tip").text_content()
    assert "sample 18.2" in said and "together 45.3" in said
    count = chart(page, "count")
    move(page, count, 0.98)
    assert count.locator(".tip").text_content() == "step 600.7 [0.69, 0.71]"


def test_a_drag_zooms_every_chart_of_the_steps_and_a_double_click_shows_all(page: Any) -> None:
    figure, other = chart(page, "KL to the reference"), chart(page, "Loss")
    whole = x_ticks(other)
    before = figure.locator(".y-ticks text").all_text_contents()
    move(page, figure, 0.3)
    page.mouse.down()
    move(page, figure, 0.5)
    page.mouse.up()
    ticks = x_ticks(other)
    assert ticks and min(ticks) > 10 and max(ticks) < 40 and whole != ticks
    assert figure.locator(".y-ticks text").all_text_contents() != before, "fitted to what is seen"
    assert x_ticks(chart(page, "count")) != ticks, "evaluations are apart"
    assert figure.locator(".reset").is_visible()
    figure.locator("svg.chart").dblclick()
    assert x_ticks(other) == whole and not figure.locator(".reset").is_visible()
    assert figure.locator(".y-ticks text").all_text_contents() == before


def test_keys_do_all_of_it(page: Any) -> None:
    figure = chart(page, "KL to the reference")
    figure.focus()
    tip = figure.locator(".tip")
    page.keyboard.press("Home")
    assert tip.text_content() == "step 10.01"
    page.keyboard.press("ArrowRight")
    assert tip.text_content() == "step 20.02"
    page.keyboard.press("Shift+ArrowRight")
    assert tip.text_content() == "step 120.12"
    whole = x_ticks(figure)
    page.keyboard.press("+")
    assert x_ticks(figure) != whole and tip.is_visible()
    page.keyboard.press("Escape")
    assert x_ticks(figure) == whole
    page.keyboard.press("Tab")
    assert not tip.is_visible()


def test_a_mark_is_named_where_it_stands(page: Any) -> None:
    figure = chart(page, "Loss")
    figure.focus()
    page.keyboard.press("Home")
    for _ in range(29):
        page.keyboard.press("ArrowRight")
    assert figure.locator(".tip").text_content().startswith("step 30reference reset (kl)")


def test_smoothing_smooths(page: Any) -> None:
    figure = chart(page, "Loss")
    slider = page.locator('input[type="range"]:visible')
    slider.fill("0")
    assert figure.locator(".mean").count() == 0
    slider.fill("20")
    assert figure.locator("path.mean").count() == 1
    ys = [
        float(y) for y in re.findall(r" ([\d.]+)", figure.locator("path.mean").get_attribute("d"))
    ]
    raw = figure.locator(".faint .line").first.get_attribute("d")
    raws = [float(y) for y in re.findall(r" ([\d.]+)", raw)]
    assert max(ys) - min(ys) < 0.5 * (max(raws) - min(raws))
    move(page, figure, 0.5)
    assert "(mean " in figure.locator(".tip").text_content()
    assert chart(page, "KL to the reference").locator(".mean").count() == 0, "a saw tooth"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone(browser: Any, report: Path, scheme: str) -> None:
    for page in opened(browser, report, width=390, scheme=scheme):
        assert page.evaluate("document.documentElement.scrollWidth") == 390, "nothing sticks out"
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (back == "rgb(255, 255, 255)") == (scheme == "light")
        table = page.locator(".scroll").first
        assert table.evaluate("one => one.scrollWidth > one.clientWidth"), "the table scrolls"
        narrow = page.locator("figure.plot").first.bounding_box()
        assert narrow["width"] <= 390 - 2 * 14


def test_a_live_page_is_read_again_when_nobody_is_at_it(browser: Any, report: Path) -> None:
    folder = report.parent
    live = write_report(folder, live=True)
    whole = live.read_text().replace('data-refresh="60"', 'data-refresh="1"')
    context = browser.new_context()
    page = context.new_page()
    path = folder / "live.html"
    path.write_text(whole)
    page.goto(path.as_uri())
    path.write_text(whole.replace("<h1>", "<h1>Again: "))
    page.locator("h1", has_text="Again: ").wait_for(timeout=20_000)
    context.close()
