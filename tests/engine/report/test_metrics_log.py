"""The log survives crashes and resumes, and gives back what was written."""

import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gardo.report.metrics_log import MetricsLog, missing, read_metrics
from tests.engine.report.records import evaluation_record, step_record, write_log


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


def test_damaged_lines_are_left_out_said_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_log(path, [step_record(step) for step in range(1, 7)])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1], lines[2] = lines[1].replace(b'"step": 2', b'"step": '), b"[" * 100_000 + b"\n"
    path.write_bytes(b"".join(lines))
    assert [record["step"] for record in read_metrics(path)] == [1, 4, 5, 6]
    said = [f"{path}: not a record, and left out: line 2-3", f"{path}: nothing of step 2-3"]
    assert missing(path) == said
    with MetricsLog(path, from_step=5) as log:
        log.write(step_record(5))
    assert path.read_bytes().splitlines(keepends=True)[:4] == lines[:4]
    assert [record["step"] for record in read_metrics(path)] == [1, 4, 5]


def test_lost_lines_are_said(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_log(path, [step_record(1), step_record(2), evaluation_record(2)])
    assert missing(path) == [] and missing(path, 2) == []
    assert missing(path, 5) == [f"{path}: nothing of step 3-5"]
    write_log(path.with_name("other"), [step_record(1), step_record(3)])
    assert missing(path.with_name("other")) == [f"{path.with_name('other')}: nothing of step 2"]


def test_lines_wait_in_memory_for_room(tmp_path: Path) -> None:
    """Of a real limit on the size of files, which a line passes in its middle."""
    path = tmp_path / "m.jsonl"
    limit, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsLog(path) as log:
        log.write(step_record(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, hard))
        try:
            log.write(step_record(2))
            assert log.problem is not None
            log.write(step_record(3))
            log.sync()
            assert [record["step"] for record in read_metrics(path)] == [1]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        log.write(step_record(4))
        assert log.problem is None
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]


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
