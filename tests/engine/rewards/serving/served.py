"""A server in a thread, with real rewards and with some that misbehave as they are told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import uvicorn

from gardo.config import reward_sections
from gardo.rewards.assembly import load_rewards
from gardo.rewards.base import Reward, RewardSettings
from gardo.rewards.serving.calls import CallSettings
from gardo.rewards.serving.client import Address, Remote, Server
from gardo.rewards.serving.server import ServeSettings, bound, make_app
from gardo.types import Prompt

CPU = torch.device("cpu")
SIZE = (32, 32)  # of the pictures
TOKEN = "a-token-of-the-tests"
QUICK = CallSettings(deadline=5, attempt=5, retries=3, first_pause=0.05, longest_pause=0.1)
PROMPTS = tuple(map(Prompt, ["two red circles", "one blue square", "three green triangles"]))


class Told(Reward):
    """Does what the prompt's metadata says: waits, fails, gives no number; else the mean."""

    Settings = RewardSettings
    calls: list[int]  # images of each call

    def __init__(self, settings: RewardSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.calls = []
        self.gate = threading.Event()
        self.gate.set()

    def score(self, images_B3HW, prompts):
        self.calls.append(len(prompts))
        for prompt in prompts:
            time.sleep(prompt.metadata.get("sleep", 0.0))
            if prompt.metadata.get("raise"):
                raise RuntimeError(f"told to by {prompt}")
        if any(prompt.metadata.get("hold") for prompt in prompts):
            assert self.gate.wait(20)
        value = images_B3HW.mean((1, 2, 3))
        nan = [bool(prompt.metadata.get("nan")) for prompt in prompts]
        return value.masked_fill(torch.tensor(nan), torch.nan)


class Pairs(Reward):
    """Compares by brightness."""

    Settings = RewardSettings

    def compare(self, first_N3HW, second_N3HW, prompts):
        return (first_N3HW.mean((1, 2, 3)) > second_N3HW.mean((1, 2, 3))).float()


def told() -> Told:
    return Told(RewardSettings(kind="told", role="held_out"), CPU)


def tiny(**sections: Mapping[str, object]) -> dict[str, Reward]:
    return load_rewards(reward_sections(dict(sections), "a test"), CPU)


def pictures(count: int, seed: int = 0, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


@contextmanager
def running(rewards: Mapping[str, Reward], *, at: int = 0, **options) -> Iterator[str]:
    """The URL of a server of these rewards, at a port that is free or is said."""
    settings = ServeSettings(port=at, token=TOKEN, **options)
    listening = bound(settings)
    config = uvicorn.Config(make_app(rewards, settings), log_level="error", timeout_keep_alive=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def remote(
    url: str,
    name: str,
    reward: type[Reward] | None = None,
    *,
    token=TOKEN,
    settings=QUICK,
    **options,
) -> Remote:
    """The client's side of a served reward."""
    section = options.pop("section", {"kind": name})
    plugin = reward or type(tiny(**{name: section})[name])
    said = (
        RewardSettings(kind=name, role="held_out")
        if reward
        else reward_sections({name: section}, "a test")[name]
    )
    server = Server(Address(url, token), settings, parallel=options.pop("parallel", 4))
    return Remote(said, CPU, plugin=plugin, name=name, server=server, **options)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
