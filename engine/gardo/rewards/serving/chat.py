"""A vision-language model behind an OpenAI-compatible endpoint: one question, one answer.

POST URL/chat/completions, as vLLM, SGLang, TGI, `transformers serve` and hosted services take it.
Pictures travel as PNG, which loses nothing.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from gardo.rewards.serving.calls import (
    Breaker,
    Caller,
    CallFailed,
    CallSettings,
    Transient,
    first_line,
)
from gardo.rewards.serving.line import Line
from gardo.rewards.serving.wire import secret

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
        """ValueError for a URL or a key that cannot be used."""
        self.model, self.max_tokens = model, max_tokens
        self.caller = Caller(settings, Breaker(settings.breaker, settings.cooldown))
        self._threads = ThreadPoolExecutor(parallel, "gardo-chat")
        self._line = Line(url, secret(KEY, os.environ.get(KEY)))

    def begin(self, questions: Sequence[Question]) -> Callable[[], list[str | CallFailed]]:
        """Begins to ask; what is returned waits for an answer to each, or why there is none."""
        asked = [self._threads.submit(self._answered, question) for question in questions]
        return lambda: [one.result() for one in asked]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._line.close()

    def _answered(self, question: Question) -> str | CallFailed:
        try:
            body = json.dumps({
                "model": self.model,
                "messages": question.messages(),
                "temperature": 0,
                "max_tokens": self.max_tokens,
            })  # fmt: skip
            return self.caller(lambda seconds: self._sent(body.encode(), seconds))
        except CallFailed as error:
            return error
        except Exception as error:  # whatever it is: other ranks would wait for this one
            return CallFailed(first_line(error))

    def _sent(self, body: bytes, seconds: float) -> str:
        line = self._line
        said = line.ask("POST", "/chat/completions", seconds, body, "application/json")
        try:
            answer = json.loads(said)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            begins = said[:200].decode(errors="replace")
            raise Transient(f"{line.url}: no chat completion: {begins!r}") from None
        if not isinstance(answer, str):
            raise CallFailed(f"{line.url}: an answer without text", answered=True)
        return answer


def as_png(picture_3HW: Tensor) -> str:
    """A data URL of a picture, uint8 [3, H, W]."""
    file = io.BytesIO()
    Image.fromarray(picture_3HW.permute(1, 2, 0).numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
