"""The report while a run goes on: seldom, and never what ends it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from gardo.report import live
from gardo.report.live import EVERY, LiveReport
from tests.engine.report.clock import Clock
from tests.engine.report.records import step_record, write_log


def test_it_is_written_once_a_minute_and_told_the_end(tmp_path: Path) -> None:
    clock = Clock()
    report = LiveReport(tmp_path, clock)
    write_log(tmp_path / "metrics.jsonl", [step_record(1)])
    page = tmp_path / "report.html"
    clock.now += EVERY - 1
    report.write()
    assert not page.exists()
    clock.now += 1
    report.write()
    assert "The run goes on" in page.read_text()
    page.unlink()
    clock.now += EVERY - 1
    report.write()
    assert not page.exists()
    report.close()
    assert "The run goes on" not in page.read_text()


def test_a_short_run_writes_none_of_its_own(tmp_path: Path) -> None:
    write_log(tmp_path / "metrics.jsonl", [step_record(1)])
    LiveReport(tmp_path, Clock()).close()
    assert not (tmp_path / "report.html").exists()


def test_what_takes_long_is_done_more_seldom(tmp_path: Path, monkeypatch) -> None:
    clock, written = Clock(), []

    def slow(folder: Path, *, live: bool) -> None:
        written.append(clock.now)
        clock.now += 10

    monkeypatch.setattr(live, "write_report", slow)
    report = LiveReport(tmp_path, clock)
    for _ in range(1200):
        clock.now += 1
        report.write()
    assert [b - a for a, b in pairwise(written)] == [510.0] * 2


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    clock = Clock()
    report = LiveReport(tmp_path / "gone", clock)
    clock.now += EVERY
    report.write()
    report.close()
