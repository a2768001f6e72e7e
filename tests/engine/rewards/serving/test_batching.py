"""The threads of several rewards: one computes at a time, and an end does not wait for a hang."""

from __future__ import annotations

import threading
import time

import torch

from gardo.rewards.serving import batching
from gardo.rewards.serving.batching import Scorer
from gardo.rewards.serving.wire import Request
from gardo.types import Prompt
from tests.engine.rewards.serving.served import CPU, RewardSettings, Told, pictures, told

ONE = (Prompt("a"),)


class Precise(RewardSettings):
    dtype: str = "float32"


class Flag(Told):
    """Whether products are in TF32 at the beginning and at the end of its computing."""

    def score(self, images_B3HW, prompts):
        before = torch.backends.cuda.matmul.allow_tf32
        time.sleep(0.02)
        return torch.tensor([float(before), float(torch.backends.cuda.matmul.allow_tf32)])


def test_rewards_of_one_process_compute_in_their_own_precision():
    rewards = {
        dtype: Flag(Precise(kind="flag", role="held_out", dtype=dtype), CPU)
        for dtype in ("tf32", "float32")
    }
    scorers = {
        dtype: Scorer(dtype, reward, most_together=1, most_waiting=99)
        for dtype, reward in rewards.items()
    }
    asked = [
        (dtype, scorer.ask(Request((pictures(2),), ONE * 2)))
        for _ in range(8)
        for dtype, scorer in scorers.items()
    ]
    for dtype, answer in asked:
        assert answer.result(20).values.tolist() == [float(dtype == "tf32")] * 2
    for scorer in scorers.values():
        scorer.close()


def test_a_reward_that_hangs_does_not_keep_the_server_from_ending(monkeypatch):
    monkeypatch.setattr(batching, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(batching, "COMPUTING", threading.Lock())
    reward = told()
    reward.gate.clear()
    scorer = Scorer("told", reward, most_together=1, most_waiting=9)
    answer = scorer.ask(Request((pictures(1),), (Prompt("a", {"hold": True}),)))
    left = scorer.ask(Request((pictures(1),), ONE))
    while not reward.calls:
        time.sleep(0.01)
    began = time.monotonic()
    scorer.close()
    assert time.monotonic() - began < 5 and left.cancelled() and not answer.done()
    reward.gate.set()
    answer.result(20)


def test_what_is_cancelled_leaves_the_queue():
    reward = told()
    reward.gate.clear()
    scorer = Scorer("told", reward, most_together=1, most_waiting=9)
    scorer.ask(Request((pictures(1),), (Prompt("a", {"hold": True}),)))
    while not reward.calls:
        time.sleep(0.01)
    answer = scorer.ask(Request((pictures(3),), ONE * 3))
    assert scorer.waiting == 3
    answer.cancel()
    assert scorer.waiting == 0
    reward.gate.set()
    scorer.close()
    assert reward.calls == [1]
