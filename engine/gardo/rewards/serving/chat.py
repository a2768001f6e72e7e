"""A vision-language model behind an OpenAI-compatible endpoint: the voice of a judge.

POST URL/chat/completions, as vLLM, SGLang, TGI, `transformers serve` and hosted services take it.
Pictures travel as PNG, which loses nothing. Probabilities of words are those among the TOP most
likely tokens that the endpoint reports: one that ignores `logprobs` cannot answer such a question,
and says nothing of it, so that has an error here.

The same question is asked once: its answer is kept, by the digest of its bytes, and one that is on
its way is waited for.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from torch import Tensor

from gardo.rewards.judging.questions import Answer, Answers, Question, Unanswered, choice_of
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
TOP = 20  # most that endpoints give
SOON = CallSettings(deadline=10, attempt=5, retries=2)  # to hear whether anybody is there


class Chat:
    """Asks one model at one endpoint, so many questions at a time, at temperature 0."""

    def __init__(
        self, url: str, model: str, settings: CallSettings, *, parallel: int, cache: int = 0
    ) -> None:
        """ValueError for a URL or a key that cannot be used."""
        self.model = model
        self.caller = Caller(settings, Breaker(settings.breaker, settings.cooldown))
        self._threads = ThreadPoolExecutor(parallel, "gardo-chat")
        self._line = Line(url, secret(KEY, os.environ.get(KEY)))
        self._known: OrderedDict[bytes, Future[Answer]] = OrderedDict()
        self._most, self._lock = cache, threading.Lock()

    def begin(self, questions: Sequence[Question]) -> Answers:
        asked = [self._threads.submit(self._answered, question) for question in questions]
        return lambda: [one.result() for one in asked]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._line.close()

    def _answered(self, question: Question) -> Answer | Unanswered:
        try:
            body = json.dumps(self._asks(question)).encode()
            digest = hashlib.sha256(body).digest()
            mine, answer = self._place(digest)
            if not mine:
                return dataclasses.replace(answer.result(), known=True)
            try:
                answer.set_result(self._asked(question, body))
            except BaseException as error:
                self._forget(digest)
                answer.set_exception(error)
            return answer.result()
        except Unanswered as error:
            return error
        except Exception as error:  # whatever it is: other ranks would wait for this one
            return Unanswered(first_line(error))

    def _place(self, digest: bytes) -> tuple[bool, Future[Answer]]:
        """Where the answer to a question is or will be, and whether it is the caller's to get."""
        with self._lock:
            if found := self._known.get(digest):
                self._known.move_to_end(digest)
                return False, found
            place: Future[Answer] = Future()
            if self._most:
                self._known[digest] = place
                while len(self._known) > self._most:
                    self._known.popitem(last=False)
            return True, place

    def _forget(self, digest: bytes) -> None:
        with self._lock:
            self._known.pop(digest, None)

    def _asks(self, question: Question) -> dict[str, Any]:
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": as_png(part)}}
            for part in question.parts
        ]
        system = [{"role": "system", "content": question.system}] if question.system else []
        chances = {"logprobs": True, "top_logprobs": TOP} if question.choices else {}
        return {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 1 if question.choices else question.max_tokens,
            **chances,
        }

    def _asked(self, question: Question, body: bytes) -> Answer:
        began = time.monotonic()
        try:
            answer = self.caller(lambda seconds: self._sent(question, body, seconds))
        except CallFailed as error:
            raise Unanswered(str(error)) from None
        return dataclasses.replace(answer, seconds=time.monotonic() - began)

    def _sent(self, question: Question, body: bytes, seconds: float) -> Answer:
        line = self._line
        said = line.ask("POST", "/chat/completions", seconds, body, "application/json")
        try:
            answer = json.loads(said)
            (choice, *_) = answer["choices"]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            begins = said[:200].decode(errors="replace")
            raise Transient(f"{line.url}: no chat completion: {begins!r}") from None
        if not isinstance(text, str):
            raise CallFailed(f"{line.url}: an answer without text", answered=True)
        usage = answer.get("usage")
        chances = None
        if question.choices:
            chances = chances_of(choice, question.choices)
            if chances is None:
                raise CallFailed(
                    f"{line.url}: {self.model} answers without logprobs, and probabilities are "
                    "what this judge reads; serve it with what gives them (vLLM, SGLang), or run "
                    "it here with `path`",
                    answered=True,
                )
        return Answer(
            text,
            chances,
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
            cut=not question.choices and choice.get("finish_reason") == "length",
        )


def reach(url: str, model: str, calls: CallSettings) -> None:
    """Unanswered, in seconds, where nobody answers at an endpoint: it is not running.

    `calls` are for the patience of a run, which others wait for; here a user does.
    """
    line = Line(url, secret(KEY, os.environ.get(KEY)))
    seconds = {"deadline": min(SOON.deadline, calls.deadline), "attempt": SOON.attempt}
    tried = Caller(SOON.model_copy(update=seconds), Breaker(1, 0.0))

    def ask(seconds: float) -> None:
        with suppress(CallFailed):  # no list of models, or a key is wanted: somebody is there
            line.ask("GET", "/models", seconds)

    try:
        tried(ask)
    except CallFailed as error:
        if not error.answered:
            port = f" --port {number}" if (number := urlsplit(url).port) else ""
            raise Unanswered(
                f"{error}; start what serves {model} there, e.g. `vllm serve {model}{port}`, or "
                "give another URL"
            ) from None
    finally:
        line.close()


def chances_of(choice: Any, choices: Sequence[str]) -> Mapping[str, float] | None:
    """The probability of each of the choices to begin the answer; None without logprobs."""
    try:
        top = choice["logprobs"]["content"][0]["top_logprobs"]
        said = [(str(one["token"]), float(one["logprob"])) for one in top]
    except (LookupError, TypeError, ValueError):
        return None
    if not said or not all(logprob <= 1e-6 for _, logprob in said):  # NaN too
        return None
    found = dict.fromkeys(choices, 0.0)
    for token, logprob in said:
        name = choice_of(token, choices)
        if name is not None:
            found[name] += math.exp(logprob)
    return found


def as_png(picture_3HW: Tensor) -> str:
    """A data URL of a picture, uint8 [3, H, W]."""
    file = io.BytesIO()
    Image.fromarray(picture_3HW.permute(1, 2, 0).numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and value >= 0 else 0
