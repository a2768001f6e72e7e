"""What a run was made with, and the commands to go on with it, as the report has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gardo.report.environment import as_html, commands, facts, read_environment, throughput
from tests.engine.report.records import step_record

START: dict[str, Any] = {
    "at": "2026-01-31 12:00:00+00:00", "after_step": 0, "gardo": "0.1.0", "revision": "a76aed0",
    "packages": {"python": "3.12.3", "torch": "2.13.0"}, "system": "Linux 6.8 x86_64",
    "cuda": "12.8", "driver": "580.65.06", "ranks": 8, "machines": 1,
    "devices": [{"name": "A <GPU>", "bytes": 80e9}] * 8,
}  # fmt: skip


def steps() -> list[dict[str, Any]]:
    spent = {"sample": 6.0, "train": 2.0}
    rest = {"rows": {"train": 48}, "images_per_second": 12.0, "peak_bytes": 61.5e9}
    slow = step_record(1, seconds={"sample": 90.0, "train": 2.0}, **rest)
    return [slow, *(step_record(n, seconds=spent, **rest) for n in (2, 3))]


def test_throughput_leaves_out_the_first_step() -> None:
    speed = throughput(steps(), ranks=8)
    assert (speed.seconds_a_step, speed.rows_per_second) == (8.0, 48.0)
    assert speed.images_per_second == pytest.approx(12)
    assert speed.peak_bytes == 61_500_000_000
    assert throughput([]).seconds_a_step is None


def test_facts_are_of_the_last_start_and_name_every_revision() -> None:
    again = START | {"revision": "b0ff3a1+", "after_step": 20, "ranks": 4}
    said = dict(facts(steps(), [START, again]))
    assert said["gardo"] == "0.1.0 a76aed0, then 0.1.0 b0ff3a1+"
    assert said["Started"] == "2026-01-31 12:00:00+00:00; resumed after step 20"
    assert said["Devices"] == "8 x A <GPU> (80.0 GB)" and said["Ranks"] == "4"
    assert said["Peak memory of a rank"] == "61.50 GB" and said["CUDA"] == "12.8, driver 580.65.06"
    assert facts([], []) == []
    page = as_html(Path("runs/x"), steps(), {}, [START])
    assert "A &lt;GPU&gt;" in page and "<dt>Images a second</dt><dd>12.0</dd>" in page


def test_commands_name_the_run_as_its_user_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "my run"
    typed = [command for _, command in commands(folder, {"train": {"ema": {}}}, START)]
    assert typed == [
        "gardo train 'runs/my run/recipe.yaml' --resume --gpus 8",
        "gardo export 'runs/my run'",
        "gardo export 'runs/my run' --ema",
        "gardo report 'runs/my run'",
    ]
    alone = [command for _, command in commands(folder, {}, {})]
    assert alone[0].endswith("recipe.yaml' --resume") and len(alone) == 3
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert commands(folder, {}, {})[1][1] == "gardo export ~/'runs/my run'"


def test_an_environment_that_is_missing_or_damaged_is_none(tmp_path: Path) -> None:
    assert read_environment(tmp_path) == []
    for damaged in ("{", "[]", '{"starts": 3}', '{"starts": ["x"]}'):
        (tmp_path / "environment.json").write_text(damaged)
        assert read_environment(tmp_path) == []
