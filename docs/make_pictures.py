"""Photographs pages of this program in a browser, for README.md and the docs: docs/pictures/.

    ./run demo && ./run study
    python docs/make_pictures.py

Needs Chromium or Chrome on the PATH and `pip install playwright`. The browser is told to have no
network.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from gardo.compare import read, write_page
from gardo.report.html import write_report

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "pictures"
BROWSERS = ("chromium", "google-chrome", "chrome")
RUN = ROOT / "runs" / "tiny-flux-gardo"  # of ./run demo
ARMS = [ROOT / "runs" / "study" / f"{arm}_counts-seed3" for arm in ("no_kl", "uniform_kl", "gardo")]
ANCHOR = "h2"  # pictures begin and end at headings


def main() -> int:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no browser on the PATH; install one of {', '.join(BROWSERS)}", file=sys.stderr)
        return 2
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playing:
        report, compared = write_report(RUN), Path(scratch) / "compare.html"
        write_page(read(ARMS), compared)
        started = playing.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        for name, path, width, scheme, until in (
            ("report-1280-light", report, 1280, "light", "Evaluations"),
            ("report-390-dark", report, 390, "dark", "Evaluations"),
            ("compare-1280-light", compared, 1280, "light", "Evaluation curves"),
        ):
            context = started.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
            )
            page = context.new_page()
            page.goto(path.as_uri())
            height = min(3 * width, int(top_of(page, until)))
            clip = {"x": 0, "y": 0, "width": width, "height": height}
            page.screenshot(path=FOLDER / f"{name}.png", clip=clip, full_page=True)
            print(f"docs/pictures/{name}.png: {width} x {height}")
        for name in charts(started, report):
            print(f"docs/pictures/{name}.png")
    return 0


def top_of(page: Page, heading: str) -> float:
    """Where a section begins, pixels from the page's top."""
    box = page.get_by_role("heading", name=heading, exact=False).first.bounding_box()
    assert box is not None, heading
    return float(box["y"])


def charts(started, report: Path) -> Iterator[str]:
    """A chart with its values under the pointer."""
    page = started.new_context(viewport={"width": 1280, "height": 900}, offline=True).new_page()
    page.goto(report.as_uri())
    figure = page.locator("figure.plot", has=page.locator('svg[aria-label="Gate share"]'))
    figure.scroll_into_view_if_needed()
    box = figure.locator("svg.chart").bounding_box()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 0.5 * box["height"])
    figure.screenshot(path=FOLDER / "chart.png")
    yield "chart"


if __name__ == "__main__":
    sys.exit(main())
