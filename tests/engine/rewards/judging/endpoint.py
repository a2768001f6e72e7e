"""A small OpenAI-compatible endpoint: judges by brightness, or does wrong what it is told to."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from PIL import Image

from gardo.config import reward_sections
from gardo.rewards.assembly import load_rewards
from tests.engine.rewards.serving.served import CPU

QUICK = {"deadline": 3.0, "attempt": 1.0, "retries": 2, "first_pause": 0.05}
LEVELS = ("bad", "poor", "fair", "good", "excellent")


class Endpoint(ThreadingHTTPServer):
    """`says`: a text, a status, bytes of a body or a choice, instead of its own answer."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Connection)
        self.says: object = None
        self.hangs = 0.0
        self.logprobs = True
        self.fails = ""  # what a prompt has that makes it fail
        self.every = 0  # so many questions of a judge make one with a foolish answer
        self.asked: Counter[tuple[int, bool]] = Counter()  # by judge: it has its own questions
        self.bodies: list[dict] = []
        self.keys: list[str | None] = []
        self.most = self.now = 0
        self.lock = threading.Lock()

    @property
    def where(self) -> str:
        return f"openai:http://127.0.0.1:{self.server_port}/v1"


class Connection(BaseHTTPRequestHandler):
    server: Endpoint

    def handle(self) -> None:
        with suppress(ConnectionError):  # who asked may be gone by the time of an answer
            super().handle()

    def do_GET(self) -> None:
        """No list of models, as some have none; it is there."""
        self.send_response(500)
        self.end_headers()

    def do_POST(self) -> None:
        server = self.server
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server.bodies.append(body)
        server.keys.append(self.headers.get("authorization"))
        time.sleep(server.hangs)
        judge = len(pictures_of(body)), "excellent" in text_of(body)
        with server.lock:
            server.now -= 1
            server.asked[judge] += 1
            nth = server.asked[judge]
        says = server.says
        if server.every and nth % server.every == 0:
            says = foolish()
        if server.fails and server.fails in text_of(body):
            says = 500
        if isinstance(says, int):
            self.send_response(says)
            self.end_headers()
            return
        content = says if isinstance(says, bytes) else completion(body, says, server.logprobs)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def completion(body: dict, says: object, logprobs: bool) -> bytes:
    if isinstance(says, str):
        choice: dict[str, Any] = {"message": {"content": says}, "finish_reason": "stop"}
    else:
        choice = says if isinstance(says, dict) else judged(body)
    if not logprobs:
        choice.pop("logprobs", None)
    usage = {"prompt_tokens": 100, "completion_tokens": 10}
    return json.dumps({"choices": [choice], "usage": usage}).encode()


def foolish() -> dict[str, Any]:
    """What answers no question of any judge."""
    return with_logprobs({"The": 0.9, "A": 0.1}) | {"finish_reason": "stop"}


def judged(body: dict) -> dict[str, Any]:
    """Its own answer: what is brighter is better."""
    bright, text = [picture.mean() / 255 for picture in pictures_of(body)], text_of(body)
    first = bright[0] if len(bright) == 1 else 1 / (1 + math.exp(-20 * (bright[0] - bright[-1])))
    if body.get("logprobs"):
        return with_logprobs(chances(text, first))
    return {"message": {"content": written(text, first)}, "finish_reason": "stop"}


def chances(text: str, value: float) -> dict[str, float]:
    """Probabilities of tokens, which leave a tenth to others; two spellings share a word's."""
    if "excellent" in text:
        near = {word: math.exp(-((4 * value - i) ** 2)) for i, word in enumerate(LEVELS)}
        return {f" {w.title()}": 0.9 * p / sum(near.values()) for w, p in near.items()}
    return {"Yes": 0.6 * value, " yes": 0.3 * value, "No": 0.9 * (1 - value), "The": 0.1}


def with_logprobs(chances: dict[str, float]) -> dict[str, Any]:
    top = [{"token": t, "logprob": math.log(p)} for t, p in chances.items() if p > 0]
    best = max(top, key=lambda one: one["logprob"])
    return {
        "message": {"content": best["token"].strip()},
        "finish_reason": "length",  # of one token
        "logprobs": {"content": [{**best, "top_logprobs": top}]},
    }


def written(text: str, value: float) -> str:
    better = f"Image {1 if value > 0.5 else 2}"
    if "Final Score" in text:
        return f"object (noun): 1\nFinal Score: {1 + 4 * value:.4f}"
    if "Style Score (1-5)" in text:
        names = ("Alignment", "Coherence", "Style")
        return "\n".join(f"{name} Score (1-5): {1 + 4 * value:.4f}" for name in names)
    if "sum to exactly 1.0" in text:
        names = ("Alignment", "Coherence", "Style")
        shares = f" Image 1: {value:.6f}\n Image 2: {1 - value:.6f}"
        return "\n\n".join(f"{name} Score:\n{shares}" for name in names)
    if "<answer>" in text:
        return f"<think>\n1. Image 1 is better?\n</think>\n<answer>{better} is better</answer>"
    if '"winner"' in text:
        return f"```json\n{json.dumps({'categories': [], 'winner': better})}\n```"
    if "Image 1 is better." in text:
        return f"Both are sharp. {better} is better."
    return f"It is fine.\nGrade: {1 + 4 * value:.4f}"


def pictures_of(body: dict) -> list[np.ndarray]:
    urls = [p["image_url"]["url"] for p in _content(body) if p["type"] == "image_url"]
    data = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
    return [np.asarray(Image.open(io.BytesIO(picture))) for picture in data]


def text_of(body: dict) -> str:
    return "\n".join(p["text"] for p in _content(body) if p["type"] == "text")


def marks_of(body: dict) -> list[str]:
    return re.findall(r"^=== [0-9a-f]{16} ===$", text_of(body), re.MULTILINE)


def _content(body: dict) -> list[dict]:
    return next(m["content"] for m in body["messages"] if m["role"] == "user")


@contextmanager
def serving(port: int = 0) -> Iterator[Endpoint]:
    with Endpoint(port) as server:
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield server
        server.shutdown()


def asked_at(endpoint: Endpoint, kind: str = "vlm", **settings: Any) -> Any:
    """A judge of a kind that asks the endpoint."""
    section = {"kind": kind, "role": "held_out", "where": endpoint.where, "model": "m",
               "calls": QUICK, **settings}  # fmt: skip
    if kind.endswith("_pair"):
        wrapped = {"kind": "preference", "role": "held_out", "judge": drop(section, "role")}
        return load_rewards(reward_sections({"judge": wrapped}, "a test"), CPU)["judge"].reward
    return load_rewards(reward_sections({"judge": section}, "a test"), CPU)["judge"]


def drop(section: dict, *names: str) -> dict:
    return {name: value for name, value in section.items() if name not in names}


def shades(*levels: float) -> torch.Tensor:
    """Grey pictures of these levels, [B, 3, 32, 32]."""
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 32, 32).clone()
