"""Images without a value: masked and counted while few; no update where many, then the end."""

from __future__ import annotations

from pathlib import Path

import pytest

from gardo.bad_updates import RunStopped
from gardo.config import check
from gardo.report.metrics_log import step_records
from gardo.session import open_session
from gardo.train import train
from tests.integration.cases import Case
from tests.integration.recipes import recipe

CASE = Case("gardo", "lora", "local", steps=3)


def run(
    folder: Path, *, role: str = "proxy", max_failed: float = 0.25, in_a_row: int = 9,
    **settings: int,
) -> Path:  # fmt: skip
    """Trains three iterations of 8 images on a reward that fails as it is told."""
    made = recipe(CASE, folder)
    made["rewards"] |= {
        "judge": {"kind": "tests.engine.failing_reward:Failing", "role": role, **settings}
    }
    made["scoring"] = {"max_failed": max_failed}
    made["train"]["bad_updates"] = {"in_a_row": in_a_row}
    made["evaluate"] |= {"prompt_count": 1}
    with open_session(check(made, "a test"), source="a test", quiet=True) as session:
        train(session)
    return folder / CASE.run


def test_a_few_are_masked_and_counted(tmp_path):
    for step in step_records(run(tmp_path, every_nth=4)):
        assert (
            step["rewards"]["judge"]["valid"] == 6 and step["rewards"]["tiny_shape"]["valid"] == 8
        )


def test_too_many_leave_the_updates_out_and_the_run_goes_on(tmp_path):
    first, second, third = step_records(run(tmp_path, every_nth=2, first=2))  # 2: an evaluation
    assert [step["metrics"].get("skipped_updates", 0) for step in (first, second, third)] == [
        0, 2, 2,
    ]  # fmt: skip
    (event,) = second["events"]
    assert event == (
        "2 of 2 updates left out: rewards.judge: 4 of 8 images have no value "
        "(scoring.max_failed: 0.25); rank 0: no grade in 'Hm.'"
    )


def test_many_for_long_end_the_run_with_the_reason_and_what_is_saved(tmp_path):
    with pytest.raises(RunStopped) as stopped:
        run(tmp_path, every_nth=1, in_a_row=4)
    said = str(stopped.value)
    assert "4 updates in a row could not be made (train.bad_updates)" in said
    assert "the last in iteration 2: rewards.judge: 8 of 8 images have no value" in said
    assert said.endswith("--resume goes on after step 2")
    assert (tmp_path / CASE.run / "checkpoints/step-000002").is_dir()


def test_the_share_is_the_recipes(tmp_path):
    steps = step_records(run(tmp_path, every_nth=2, max_failed=0.5))
    assert not any("skipped_updates" in step["metrics"] for step in steps)


def test_what_is_only_reported_stops_nothing(tmp_path):
    steps = step_records(run(tmp_path, role="held_out", every_nth=2))
    assert [step["rewards"]["judge"]["valid"] for step in steps] == [4, 4, 4]
    assert not any("skipped_updates" in step["metrics"] for step in steps)
