"""Images without a value: masked and counted while they are few, the end of the run where many."""

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


def run(folder: Path, *, role: str = "proxy", max_failed: float = 0.25, **settings: int) -> Path:
    """Trains three iterations of 8 images on a reward that fails as it is told."""
    made = recipe(CASE, folder)
    made["rewards"] |= {
        "judge": {"kind": "tests.engine.failing_reward:Failing", "role": role, **settings}
    }
    made["scoring"] = {"max_failed": max_failed}
    made["evaluate"] |= {"prompt_count": 1}
    with open_session(check(made, "a test"), source="a test", quiet=True) as session:
        train(session)
    return folder / CASE.run


def test_a_few_are_masked_and_counted(tmp_path):
    for step in step_records(run(tmp_path, every_nth=4)):
        assert (
            step["rewards"]["judge"]["valid"] == 6 and step["rewards"]["tiny_shape"]["valid"] == 8
        )


def test_many_end_the_run_with_the_reason_and_what_is_saved(tmp_path):
    with pytest.raises(RunStopped) as stopped:
        run(tmp_path, every_nth=2, first=2)  # an evaluation and an iteration
    said = str(stopped.value)
    assert said.startswith("rewards.judge: 4 of 8 images of iteration 2 have no value")
    assert "scoring.max_failed: 0.25; rank 0: no grade in 'Hm.'" in said
    assert said.endswith("--resume goes on after step 1")
    assert (tmp_path / CASE.run / "checkpoints/step-000001").is_dir()


def test_in_the_first_iteration_nothing_is_saved_yet(tmp_path):
    with pytest.raises(RunStopped, match=r"of iteration 1 .*nothing is saved yet"):
        run(tmp_path, every_nth=1)


def test_the_share_is_the_recipes(tmp_path):
    assert len(step_records(run(tmp_path, every_nth=2, max_failed=0.5))) == 3


def test_what_is_only_reported_ends_nothing(tmp_path):
    steps = step_records(run(tmp_path, role="held_out", every_nth=2))
    assert [step["rewards"]["judge"]["valid"] for step in steps] == [4, 4, 4]
