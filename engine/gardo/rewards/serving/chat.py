"""A vision-language model behind an OpenAI-compatible endpoint: the voice of a judge.

POST URL/chat/completions, as vLLM, SGLang, TGI, `transformers serve` and hosted services take it.
Pictures travel as PNG, which loses nothing. Probabilities of words are those among the TOP most
likely tokens that the endpoint reports: one that ignores `logprobs` cannot answer such a question,
and says nothing of it, so that has an error here.

The same question is asked once: its answer is kept, by the digest of its texts and pictures, and
one that is on its way is waited for. A picture of several questions is made a PNG once, as long as
the last PNG_BYTES hold it.
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
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL import Image

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

if TYPE_CHECKING:
    from torch import Tensor

OPENAI = "openai:"  # how `where` begins
KEY = "GARDO_OPENAI_KEY"  # the environment variable
TOP = 20  # most that endpoints give
PNG_BYTES = 128 << 20
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
        self._pngs = Pngs(PNG_BYTES)

    def begin(self, questions: Sequence[Question]) -> Answers:
        try:
            asked = [self._threads.submit(self._answered, question) for question in questions]
        except RuntimeError:
            over: list[Answer | Unanswered] = [Unanswered("the run is over")] * len(questions)
            return lambda: over
        return lambda: [_result(one) for one in asked]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._line.close()

    def _answered(self, question: Question) -> Answer | Unanswered:
        began = time.monotonic()
        try:
            digest = digest_of(question)
            mine, answer = self._place(digest)
            if not mine:
                return dataclasses.replace(answer.result(), known=True)
            try:
                said = self._asked(question)
                answer.set_result(dataclasses.replace(said, seconds=time.monotonic() - began))
            except BaseException as error:
                self._forget(digest)
                answer.set_exception(error)
            return answer.result()
        except Exception as error:  # whatever it is: other ranks would wait for this one
            return Unanswered(first_line(error), time.monotonic() - began)

    def _said(self, body: bytes, seconds: float) -> bytes:
        """The body of the answer. A refusal, and a failure that comes again, are the question's."""
        try:
            return self._line.ask("POST", "/chat/completions", seconds, body, "application/json")
        except CallFailed as error:
            raise CallFailed(str(error), answered=True) from None

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
            else {"type": "image_url", "image_url": {"url": self._pngs(part)}}
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

    def _asked(self, question: Question) -> Answer:
        """CallFailed."""
        body = json.dumps(self._asks(question)).encode()
        return self.caller(lambda seconds: self._sent(question, body, seconds))

    def _sent(self, question: Question, body: bytes, seconds: float) -> Answer:
        line = self._line
        said = self._said(body, seconds)
        try:
            answer = json.loads(said)
        except (ValueError, RecursionError):
            begins = said[:200].decode(errors="replace")
            raise Transient(f"{line.url}: no chat completion: {begins!r}") from None
        try:  # what is whole and no completion is so the next time too
            (choice, *_) = answer["choices"]
            text = text_of(choice["message"]["content"])
        except (ValueError, LookupError, TypeError):
            begins = said[:200].decode(errors="replace")
            why = f"{line.url}: an answer without text: {begins!r}"
            raise CallFailed(why, answered=True) from None
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
    if not said or not all(logprob <= 1e-3 for _, logprob in said):  # NaN too
        return None
    found = dict.fromkeys(choices, 0.0)
    for token, logprob in dict(said).items():  # some list the token that was taken twice
        name = choice_of(token, choices)
        if name is not None:
            found[name] += math.exp(min(logprob, 0.0))
    return found


def text_of(content: Any) -> str:
    """The text of a message's content, which may come in parts. TypeError where there is none."""
    if isinstance(content, str):
        return content
    texts = [part["text"] for part in content if part.get("type") == "text"]
    if not texts:
        raise TypeError("no text")
    return "".join(texts)


def digest_of(question: Question) -> bytes:
    """Of all that decides its answer, but the model."""
    digest = hashlib.sha256(
        repr((question.system, question.choices, question.max_tokens)).encode(errors="replace")
    )
    for part in question.parts:
        data = part.encode(errors="replace") if isinstance(part, str) else raw(part)
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.digest()


def raw(picture_3HW: Tensor) -> bytes:
    return repr(picture_3HW.shape).encode() + picture_3HW.contiguous().numpy().tobytes()


class Pngs:
    """Data URLs of pictures, the last ones kept up to so many bytes; for many threads."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._known: OrderedDict[bytes, str] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, picture_3HW: Tensor) -> str:
        digest = hashlib.sha256(raw(picture_3HW)).digest()
        with self._lock:
            if found := self._known.get(digest):
                self._known.move_to_end(digest)
                return found
        made = as_png(picture_3HW)
        with self._lock:
            if digest not in self._known:
                self._known[digest] = made
                self._bytes += len(made)
            while self._bytes > self._most:
                self._bytes -= len(self._known.popitem(last=False)[1])
        return made


def _result(asked: Future[Answer | Unanswered]) -> Answer | Unanswered:
    try:
        return asked.result()
    except CancelledError:
        return Unanswered("the run is over")


def as_png(picture_3HW: Tensor) -> str:
    """A data URL of a picture, uint8 [3, H, W]."""
    file = io.BytesIO()
    Image.fromarray(picture_3HW.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, Mapping) else None
    return value if isinstance(value, int) and value >= 0 else 0
