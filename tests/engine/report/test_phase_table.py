"""The table of phases: means over the steps after the first, in one order, as text and HTML."""

from __future__ import annotations

from typing import Any

import pytest

from gardo.report.phase_table import as_html, as_text, phase_rows, throughput
from tests.engine.report.records import step_record


def steps() -> list[dict[str, Any]]:
    spent = [
        {"train": 90.0, "sample": 10.0, "other": 5.0},
        {"train": 3.0, "sample": 1.0, "mine<b>": 1.0, "other": 0.0},
        {"train": 5.0, "sample": 1.0, "checkpoint": 2.0, "other": 1.0},
    ]
    return [
        step_record(
            number,
            seconds=seconds,
            calls={"sample": 4, "train": 2},
            rows={"sample": 40, "train": 16},
            images_per_second=10 / sum(seconds.values()),
            peak_bytes=number * 1_000_000_000,
            memory={"train": 2_000_000_000},
        )
        for number, seconds in enumerate(spent, start=1)
    ]


def test_phases_are_means_over_the_warm_steps() -> None:
    rows = phase_rows(steps())
    assert [row.name for row in rows] == ["sample", "train", "checkpoint", "mine<b>", "other"]
    assert [row.seconds for row in rows] == [1.0, 4.0, 1.0, 0.5, 0.5]
    assert sum(row.share for row in rows) == pytest.approx(1.0)
    train = rows[1]
    assert (train.calls, train.rows, train.peak) == (2, 16, 2_000_000_000)
    assert train.cells() == ("train", "4.000", "57.1 %", "2", "16", "4", "2.00")


def test_the_rate_is_of_all_warm_seconds() -> None:
    said = throughput(steps())
    assert said.startswith("7 s a step, 1.43 images a second") and "3.00 GB" in said
    assert throughput([step_record(1)]) == ""


def test_one_step_is_better_than_none() -> None:
    assert phase_rows(steps()[:1])[-1].seconds == 5.0


def test_text_is_aligned_and_html_is_escaped() -> None:
    text = as_text(steps()).splitlines()
    assert text[0].split() == ["phase", "seconds", "share", "calls", "rows", "rows/s", "peak", "GB"]
    assert text[1].index("1.000") == text[2].index("4.000")
    page = as_html(steps())
    assert "<td>mine&lt;b&gt;</td>" in page and "<b>" not in page
