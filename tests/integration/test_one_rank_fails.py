"""Whatever becomes of what one rank of two asks: its images have no value, and both go on."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gardo.config import load
from gardo.report.metrics_log import step_records
from gardo.rewards.serving.calls import CallFailed, Transient
from gardo.rewards.serving.line import Line
from gardo.rewards.serving.wire import TOKEN, Scored, pack_answer
from gardo.session import open_session
from gardo.train import train
from tests.engine.rewards.serving import served
from tests.integration.cases import Case
from tests.integration.launch import Launched
from tests.integration.recipes import recipe

CASE = Case("gardo", "lora", "stage3")
CALLS = {"deadline": 1.0, "attempt": 0.5, "retries": 1, "first_pause": 0.05, "breaker": 1000}


def failing(error: Exception) -> Callable[[], bytes]:
    def answer() -> bytes:
        raise error

    return answer


def late() -> bytes:
    time.sleep(2)  # beyond the deadline
    raise Transient("no answer")


FLAWS: dict[str, Callable[[], bytes]] = {  # one in each iteration
    "no connection": failing(Transient("refused")),
    "the reward failed": failing(CallFailed("500")),
    "a bug": failing(ZeroDivisionError("a bug")),
    "late": late,
    "no answer": lambda: b"rubbish",
    "too few values": lambda: pack_answer(Scored(torch.zeros(1))),
    "features": lambda: pack_answer(Scored(torch.zeros(2, 3))),
    "NaN": lambda: pack_answer(Scored(torch.full((2,), torch.nan))),
    "infinite": lambda: pack_answer(Scored(torch.full((2,), torch.inf))),
}


def train_flawed(file: Path) -> None:
    """A rank; the second is told nonsense in all iterations but the last."""
    with open_session(load(str(file)), quiet=True) as session:
        ask, flaws = Line.ask, list(FLAWS.values())

        def flawed(line: Line, *arguments: Any) -> bytes:
            if session.finished < len(flaws):
                return flaws[session.finished]()
            return ask(line, *arguments)

        if os.environ["RANK"] == "1":
            Line.ask = flawed  # type: ignore[method-assign]
        train(session)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one-rank")
    made = recipe(CASE, folder)
    with served.running(served.tiny(tiny_shape={}, tiny_fidelity={})) as url:
        made["rewards"]["tiny_shape"]["where"] = url
        made["rewards"]["dinov3"]["dtype"] = "float32"
        made["scoring"] = {"calls": CALLS, "max_failed": 0.5}
        made["rollout"] = {"batch": 2, "overlap": True}
        made["run"]["steps"] = len(FLAWS) + 1
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(made))
        Launched(2, train_flawed, file, env={TOKEN: served.TOKEN}).wait()
    return list(step_records(folder / CASE.run))


@pytest.mark.parametrize("flaw", FLAWS)
def test_its_images_have_no_value_and_the_others_train(
    steps: list[dict[str, Any]], flaw: str
) -> None:
    step = steps[list(FLAWS).index(flaw)]
    assert step["rewards"]["tiny_shape"]["valid"] == 4
    assert step["rewards"]["tiny_purity"]["valid"] == 8
    assert "skipped_updates" not in step["metrics"]


def test_when_it_is_over_all_have_values(steps: list[dict[str, Any]]) -> None:
    assert len(steps) == len(FLAWS) + 1
    assert all(reward["valid"] == 8 for reward in steps[-1]["rewards"].values())
