"""A server in a thread, with real rewards and with some that misbehave as they are told."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import torch

from gardo.config import reward_sections
from gardo.rewards.assembly import load_rewards
from gardo.rewards.base import Reward, RewardSettings
from gardo.rewards.serving.calls import CallSettings
from gardo.rewards.serving.client import Remote, Server
from gardo.rewards.serving.line import Address
from gardo.rewards.serving.server import (
    MOST_CONNECTIONS,
    ServeSettings,
    bound,
    make_app,
    web_server,
)
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
    connections = options.pop("most_connections", MOST_CONNECTIONS)
    settings = ServeSettings(port=at, token=TOKEN, **options)
    listening = bound(settings)
    server = web_server(make_app(rewards, settings), most_connections=connections)
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


@contextmanager
def speaking(*said: bytes, slow: bytes = b"") -> Iterator[str]:
    """The URL of a server that says one of these to each question, the last one from then on.

    After each it goes on with `slow`, a byte every 0.1 s, and closes.
    """
    left = list(said)
    listening = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def answer(line: socket.socket) -> None:
        with line, suppress(OSError):
            line.settimeout(5)
            head, _, body = line.recv(1 << 16).partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head.lower())
            while length and len(body) < int(length[1]):
                body += line.recv(1 << 16)
            line.sendall(left.pop(0) if len(left) > 1 else left[0])
            for byte in slow:
                line.sendall(bytes([byte]))
                ended.wait(0.1)

    def serve() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=[listening.accept()[0]], daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        ended.set()
        listening.close()


def http(body: bytes, status: int = 200, **headers: object) -> bytes:
    """An answer as it goes over the line."""
    said = {"content_length": len(body), "connection": "close", **headers}
    lines = [f"HTTP/1.1 {status} OK", *(f"{k.replace('_', '-')}: {v}" for k, v in said.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body
