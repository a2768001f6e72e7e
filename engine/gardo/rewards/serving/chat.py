"""A vision-language model behind an OpenAI-compatible endpoint: one question, one answer.

POST URL/chat/completions, as vLLM, SGLang, TGI, `transformers serve` and hosted services take it.
Pictures travel as PNG, which loses nothing.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2 as httpx
from PIL import Image
from torch import Tensor

from gardo.rewards.serving.calls import Breaker, Caller, CallFailed, CallSettings, Transient
from gardo.rewards.serving.client import TRANSIENT

KEY = "GARDO_OPENAI_KEY"  # the environment variable


@dataclass(frozen=True)
class Question:
    """What is asked: texts and pictures (uint8 [3, H, W], on the host) in the order shown."""

    system: str
    parts: tuple[str | Tensor, ...]

    def messages(self) -> list[dict[str, Any]]:
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": as_png(part)}}
            for part in self.parts
        ]
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": content}]


class Chat:
    """Asks one model at one endpoint, so many questions at a time, at temperature 0."""

    def __init__(
        self, url: str, model: str, settings: CallSettings, *, parallel: int, max_tokens: int
    ) -> None:
        self.url, self.model, self.max_tokens = url.rstrip("/"), model, max_tokens
        self.caller = Caller(settings, Breaker(settings.breaker, settings.cooldown))
        self._threads = ThreadPoolExecutor(parallel, "gardo-chat")
        key = os.environ.get(KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(headers=headers, trust_env=False, follow_redirects=False)

    def begin(self, questions: Sequence[Question]) -> Callable[[], list[str | CallFailed]]:
        """Begins to ask; what is returned waits for an answer to each, or why there is none."""
        asked = [self._threads.submit(self._answered, question) for question in questions]
        return lambda: [one.result() for one in asked]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._http.close()

    def _answered(self, question: Question) -> str | CallFailed:
        body = {
            "model": self.model,
            "messages": question.messages(),
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        try:
            return self.caller(lambda seconds: self._sent(body, seconds))
        except CallFailed as error:
            return error

    def _sent(self, body: dict[str, Any], seconds: float) -> str:
        try:
            said = self._http.post(f"{self.url}/chat/completions", json=body, timeout=seconds)
        except httpx.TransportError as error:
            raise Transient(f"{self.url}: {type(error).__name__} {error}".rstrip()) from None
        if said.status_code != 200:
            why = f"{self.url}: {said.status_code} {said.text[:200]}"
            raise Transient(why) if said.status_code in TRANSIENT else CallFailed(why)
        try:
            answer = said.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise Transient(f"{self.url}: no chat completion: {said.text[:200]}") from None
        if not isinstance(answer, str):
            raise CallFailed(f"{self.url}: an answer without text")
        return answer


def as_png(picture_3HW: Tensor) -> str:
    """A data URL of a picture, uint8 [3, H, W]."""
    file = io.BytesIO()
    Image.fromarray(picture_3HW.permute(1, 2, 0).numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
