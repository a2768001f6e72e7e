"""Ranks that wait for one another: how long, and for what they do not have to.

The launched ranks' time-out is shorter than what the slow rank is busy with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gardo import phases, train
from gardo.config import load
from gardo.loading import build_policy
from gardo.policies.weights import WeightFiles
from gardo.session import open_session
from tests.integration.launch import DEMO, Launched, settings_for

TIMEOUT, BUSY = 10, 14.0  # seconds


def slowed(work: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(BUSY)
        return work(*arguments, **named)

    return slow


def arguments(folder: Path, *settings: str) -> list[str]:
    return [str(DEMO), *settings_for(folder, f"distributed.timeout={TIMEOUT}", *settings)]


def export_slowly(folder: Path) -> int:
    phases.export_run = slowed(phases.export_run)
    return train.main(arguments(folder))


def test_ranks_part_before_one_exports_and_reports(tmp_path: Path) -> None:
    said = Launched(2, export_slowly, tmp_path).wait()
    assert "report" in said and "export" in said


def score_slowly(folder: Path) -> int:
    """One rank's rewards take longer than the others wait."""
    if os.environ["RANK"] == "1":
        train.scored = slowed(train.scored)
    return train.main(arguments(folder))


def test_a_rank_that_takes_too_long_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=f"rank 0.*(?s:.*)Timed out waiting {TIMEOUT}000ms"):
        Launched(2, score_slowly, tmp_path).wait()


def every_group_waits(folder: Path) -> int:
    """DeepSpeed's own groups too; torch gives new ones ten minutes on GPUs."""
    source, *rest = arguments(folder)
    sets = [s for s in rest if s != "--set"]
    with open_session(load(source, sets), quiet=True):
        groups = list(dist.distributed_c10d._world.pg_map)
        waits = {g._get_backend(torch.device("cpu")).options._timeout for g in groups}
        assert len(groups) > 1 and {w.total_seconds() for w in waits} == {TIMEOUT}, waits
    return 0


def test_every_group_of_ranks_waits_as_long_as_the_recipe_says(tmp_path: Path) -> None:
    Launched(2, every_group_waits, tmp_path).wait()


def test_the_base_is_digested_beside_the_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 GB of it; the first checkpoint asks, with all ranks waiting."""
    recipe = load(DEMO, ["distributed.engine=local", "run.steps=1"])
    digests: list[str] = []

    def slow(files: WeightFiles) -> str:
        time.sleep(0.5)
        digests.append("done")
        return "a digest"

    monkeypatch.setattr(WeightFiles, "sha256", slow)
    policy = build_policy(recipe, torch.device("cpu"))
    policy.identify()
    assert not digests
    assert policy.identity["sha256"] == "a digest" == policy.identity["sha256"]
    assert digests == ["done"]
