"""Judges at a real OpenAI-compatible endpoint: `transformers serve` with a tiny random model."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gardo.config import reward_sections
from gardo.rewards.assembly import load_rewards, meet_endpoints
from gardo.types import Prompt
from tests.engine.rewards.serving.served import CPU, SIZE, free_port, pictures
from tests.integration.tiny_vlm import save_tiny_vlm

PROMPT = Prompt("two red circles")
CALLS = {"attempt": 30.0, "deadline": 60.0, "retries": 1, "first_pause": 0.05}
STARTS = 120.0  # seconds that it may take, on a busy machine


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    port: int
    model: str
    log: Path

    def wait(self) -> None:
        end = time.monotonic() + STARTS
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(f"it does not answer: {self.log.read_text()}")

    def section(self, kind: str, **settings: Any) -> dict[str, Any]:
        where = f"openai:http://127.0.0.1:{self.port}/v1"
        return {"kind": kind, "where": where, "model": self.model, "calls": CALLS, **settings}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("live")
    model, port = save_tiny_vlm(folder / "model"), free_port()
    command = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", command, "serve", str(model), "--port", str(port),
             "--host", "127.0.0.1", "--device", "cpu"], stdout=log, stderr=log,
        )  # fmt: skip
    try:
        one = Served(process, port, str(model), folder / "log.txt")
        one.wait()
        yield one
    finally:
        process.kill()
        process.wait()


def judge(section: dict[str, Any]) -> Any:
    asked = {"judge": {"role": "held_out", **section}}
    return load_rewards(reward_sections(asked, "a test"), CPU)["judge"]


@pytest.mark.parametrize("kind", ["vlm", "unifiedreward"])
def test_a_real_answer_that_says_nothing_is_unreadable(served: Served, kind: str) -> None:
    one = judge(served.section(kind, max_tokens=8))
    one.meet(PROMPT, SIZE)  # it answers
    assert one.score(pictures(2), [PROMPT] * 2).isnan().all()
    costs = one.costs()
    assert (costs["questions"], costs["unreadable"], costs["unanswered"]) == (2, 2, 0), one.trouble
    assert costs["prompt_tokens"] > 2 * len(PROMPT) and 0 < costs["completion_tokens"] <= 16
    assert "two red circles" in one.exchange and "answer:" in one.exchange
    one.close()


def test_the_same_question_has_the_same_answer(served: Served) -> None:
    """At temperature 0, from another judge: nothing of it is kept here."""
    said = []
    for _ in range(2):
        one = judge(served.section("vlm", max_tokens=8))
        one.score(pictures(1), [PROMPT])
        said.append(one.exchange.partition("answer:")[2].partition(" tokens")[0])
        one.close()
    assert said[0] == said[1] != ""


@pytest.mark.parametrize("kind", ["yes_no", "deqa"])
def test_a_judge_of_probabilities_is_refused_before_training(served: Served, kind: str) -> None:
    asked = {"judge": {"role": "held_out", **served.section(kind)}}
    with pytest.raises(ValueError, match=r"^rewards.judge.where: .*logprobs"):
        meet_endpoints(reward_sections(asked, "a test"), prompt=PROMPT, size=SIZE)


def test_a_pair_is_shown_as_two_pictures(served: Served) -> None:
    pair = {**served.section("unifiedreward_pair", max_tokens=4)}
    wrapped = judge({"kind": "preference", "judge": pair})
    wrapped.meet(PROMPT, SIZE)
    verdict = wrapped.reward.compare(pictures(1), pictures(1, seed=1), [PROMPT])
    assert verdict.isnan().all() and wrapped.costs()["unreadable"] == 1
    assert wrapped.exchange.count("[a picture, 32 x 32]") == 2


def test_when_it_dies_images_have_no_value(served: Served) -> None:
    """The last test of the file: it ends the server."""
    one = judge(served.section("vlm", max_tokens=4, calls={**CALLS, "deadline": 5.0}))
    one.meet(PROMPT, SIZE)
    served.process.kill()
    served.process.wait()
    assert one.score(torch.rand(2, 3, *SIZE), [PROMPT] * 2).isnan().all()
    assert one.costs()["unanswered"] == 2 and "ConnectError" in one.trouble
