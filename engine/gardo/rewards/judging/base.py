"""A reward that asks a vision-language model, in this process or behind an endpoint.

    where: here, worker, URL    `path`: a Qwen2-VL or Qwen2.5-VL, run by transformers
    where: openai:URL           `model`: what an OpenAI-compatible endpoint calls any model

A judge's own file says what is asked of one picture (`Grader`: it scores) or of two (`Comparer`:
it compares, and `preference` makes a reward of it), and how the answer is read. Everything is asked
at temperature 0. What has no answer, or one that cannot be read, is NaN: masked and counted.

Shapes: B images of this rank, N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, Field, model_validator

from gardo.rewards._files import MODEL_WEIGHTS, TOKENIZER_FILES, ConfigFolder, ModelRewardSettings
from gardo.rewards.base import Held, Holds, Pending, Reward, RewardSettings
from gardo.rewards.judging.planned import answered
from gardo.rewards.judging.questions import Answer, Question, Unanswered, Voice, as_data, mark_of
from gardo.rewards.judging.qwen_vl import class_of
from gardo.rewards.judging.readers import Reader
from gardo.rewards.judging.templates import SYSTEM
from gardo.rewards.serving.calls import CallSettings, first_line
from gardo.rewards.serving.chat import OPENAI, Chat, reach
from gardo.rewards.serving.line import checked_url
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

PLANNED_ANSWER = 1024  # tokens, for `gardo plan`, where the recipe says no max_tokens
COSTS = (
    "questions", "known", "unanswered", "unreadable", "prompt_tokens", "completion_tokens",
    "seconds", "longest",
)  # fmt: skip


def template(**samples: str | float) -> AfterValidator:
    """Of a field: a text that is filled in with values like these, as str.format does."""

    def check(text: str) -> str:
        try:
            text.format(**samples)
        except (ValueError, LookupError, AttributeError, TypeError):
            shown = " and ".join(f"{{{name}}}" for name in samples)
            raise ValueError(
                f"only {shown} are filled in; write other braces twice: {{{{ and }}}}"
            ) from None
        return text

    return AfterValidator(check)


class JudgeSettings(ModelRewardSettings):
    """`kind`, and what is asked, are each judge's own."""

    of_the_client: ClassVar[set[str]] = RewardSettings.of_the_client | {
        "model",
        "parallel",
        "cache",
        "calls",
    }
    where: str = Field(
        "here",
        pattern=r"^(here|worker|worker:[A-Za-z][A-Za-z0-9_-]*|(openai:)?https?://[^\s]+)$",
        description="as any reward's; or openai: and the URL of an OpenAI-compatible endpoint",
    )
    model: str | None = Field(
        None, min_length=1, description="where: openai:URL: what the endpoint calls it"
    )
    path: Annotated[ConfigFolder, MODEL_WEIGHTS, TOKENIZER_FILES] = Field(
        "", description="else: hub id or folder of a Qwen2-VL or Qwen2.5-VL"
    )
    dtype: Literal["tf32", "float32", "bfloat16", "float16"] = Field(
        "bfloat16",
        description="of the model in this process",
    )
    batch: int = Field(8, ge=1, description="questions that the model in this process has at once")
    most_pixels: int = Field(
        1 << 20, ge=28 * 28, description="of a picture, for the model in this process"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="of an answer; what the question needs if left out"
    )
    parallel: int = Field(
        16, ge=1, le=1024, description="questions at a time that each rank asks an endpoint"
    )
    cache: int = Field(
        4096, ge=0, description="answers of an endpoint that are kept, for the same question again"
    )
    calls: CallSettings = Field(
        CallSettings(deadline=300, attempt=240),
        description="how long an endpoint is waited for; minutes, because reasoning takes them",
    )  # reasoning takes minutes

    @model_validator(mode="after")
    def _someone_answers(self) -> Self:
        if self.where.startswith(OPENAI):
            try:
                checked_url(self.url)
            except ValueError as error:
                raise ValueError(f"where: {error}") from None
            if self.model is None:
                raise ValueError("model: is missing; give the name that the endpoint has for it")
            if self.path:
                raise ValueError(f"path: {self.path!r}: the endpoint has the model; leave it out")
        elif self.model is not None:
            raise ValueError(
                f"model: {self.model!r} is an endpoint's; give path, or where: openai:URL"
            )
        elif not self.path and not self.where.startswith("http"):  # a server knows its own
            raise ValueError(
                "path: is missing; give a Qwen2-VL or Qwen2.5-VL, or where: openai:URL and model"
            )
        return self

    @property
    def url(self) -> str:
        return self.where.removeprefix(OPENAI)


@dataclass
class Exchange:
    """A question, what was answered, and what it was worth: for people."""

    question: Question
    answer: Answer | Unanswered
    value: float
    why: str = ""  # it has no value

    def __str__(self) -> str:
        asked = self.question
        parts = [p if isinstance(p, str) else _size_of(p) for p in asked.parts]
        lines = ["system:", *_indented(asked.system), "user:", *_indented("\n".join(parts))]
        if isinstance(self.answer, Answer):
            lines += ["answer:", *_indented(self.answer.text)]
            chances = self.answer.chances or {}
            lines += [f"    P({choice}) = {chance:.4g}" for choice, chance in chances.items()]
            tokens = f"{self.answer.prompt_tokens} + {self.answer.completion_tokens} tokens"
            lines.append(f"    {tokens}, {self.answer.seconds:.2f} s")
        return "\n".join([*lines, f"value: {self.why or f'{self.value:.6g}'}"])


class Judge(Reward):
    """Asks its voice. A subclass is a `Grader` or a `Comparer`."""

    asks: int = 1  # pictures a question
    reader: Reader
    max_tokens: int

    def __init__(self, settings: Any, device: torch.device) -> None:
        super().__init__(settings, device)
        self.reader, needed = self.reading()
        self.max_tokens = settings.max_tokens or needed
        self.limits = self.reader.limits
        if settings.max_tokens and self.reader.choices:
            raise ValueError("max_tokens: the first token of the answer is read; leave it out")
        self.voice = _voice(settings, device)
        self._trouble = ""
        self._exchange: Exchange | None = None
        self._costs: dict[str, float] = dict.fromkeys(COSTS, 0)

    def reading(self) -> tuple[Reader, int]:
        """How answers are read, and how many tokens they may need."""
        raise NotImplementedError  # pragma: no cover

    def text(self, prompt: str) -> str:
        """What is asked, after the pictures; `prompt` stands between marks already."""
        raise NotImplementedError  # pragma: no cover

    def pictures(self, shown: Sequence[Tensor], prompt: Prompt) -> Sequence[Tensor]:
        """All that a question shows, uint8 [3, H, W]. Unanswered."""
        return shown

    @property
    def remote(self) -> bool:
        return bool(self.settings.where.startswith(OPENAI))

    @property
    def at_once(self) -> int:
        """Pairs that are worth asking together."""
        return min(64, 4 * self.settings.parallel) if self.remote else 0

    @property
    def trouble(self) -> str:
        return self._trouble

    @property
    def exchange(self) -> str:
        return str(self._exchange or "")

    def costs(self) -> dict[str, float] | None:
        said, self._costs = self._costs, dict.fromkeys(COSTS, 0)
        return said

    def meet(self, prompt: Prompt, size: tuple[int, int]) -> None:
        """ValueError, where the endpoint does not answer as this judge needs it."""
        if not self.remote:
            return
        grey = torch.full((3, *size), 128, dtype=torch.uint8)
        try:
            reach(self.settings.url, self.settings.model, self.settings.calls)
        except Unanswered as error:
            raise ValueError(f"where: {error}") from None
        try:
            (said,) = self.voice.begin([self.question([grey] * self.asks, prompt)])()
        except Unanswered as error:
            raise ValueError(str(error)) from None
        if isinstance(said, Unanswered):
            raise ValueError(f"where: {said}")

    def close(self) -> None:
        self.voice.close()

    @classmethod
    def holds(cls, settings: JudgeSettings) -> list[Held] | None:
        if settings.where.startswith(OPENAI):
            return []
        class_name = class_of(settings.path) if settings.path else None
        if class_name is None:
            return None
        most = settings.most_pixels
        tokens = settings.max_tokens or PLANNED_ANSWER
        see = partial(answered, pictures=cls.asks, most_pixels=most, tokens=tokens)
        mark = Holds(class_name, side=math.isqrt(most), see=see)
        return [Held(mark, settings.path, (settings.path, settings.revision))]

    def question(self, shown: Sequence[Tensor], prompt: Prompt) -> Question:
        """Unanswered, where something that it shows cannot be had."""
        pictures = self.pictures(shown, prompt)
        mark = mark_of(prompt)
        text = self.text(f"{mark}\n{as_data(prompt)}\n{mark}")
        system = SYSTEM.format(mark=mark) if mark in text else ""
        return Question(system, (*pictures, text), self.reader.choices, self.max_tokens)

    def begin_questions(self, shown: Sequence[Tensor], prompts: Sequence[Prompt]) -> Pending:
        """Asks about rows of float pictures [B, 3, H, W], `asks` of them; waits for values [B]."""
        good = torch.stack([p.isfinite().flatten(1).all(1) for p in shown]).all(0).tolist()
        if not all(good):
            self._trouble = f"pictures that are not finite: {len(good) - sum(good)}"
        bytes_ = [(p.detach().nan_to_num().clamp(0, 1) * 255).round().byte().cpu() for p in shown]
        asked: dict[int, Question] = {}
        for row in (i for i, ok in enumerate(good) if ok):
            try:
                asked[row] = self.question([p[row] for p in bytes_], prompts[row])
            except Exception as error:  # whatever it is: other ranks would wait for this one
                self._trouble = first_line(error)
        wait = self.voice.begin(list(asked.values()))

        def values() -> Tensor:
            value_B = torch.full((len(prompts),), torch.nan)
            for (row, question), answer in zip(asked.items(), wait(), strict=True):
                value_B[row] = self._value(question, answer)
            return value_B.to(self.device)

        return values

    def _value(self, question: Question, answer: Answer | Unanswered) -> float:
        value, why, costs = torch.nan, "", self._costs
        costs["questions"] += 1
        known = isinstance(answer, Answer) and answer.known
        costs["known"] += known
        if not known:
            costs["seconds"] += answer.seconds
            costs["longest"] = max(costs["longest"], answer.seconds)
        try:
            if isinstance(answer, Unanswered):
                raise answer
            if not known:
                costs["prompt_tokens"] += answer.prompt_tokens
                costs["completion_tokens"] += answer.completion_tokens
            value = self.reader(answer)
        except Exception as error:  # of a reader too: other ranks would wait for this one
            costs["unanswered" if isinstance(error, Unanswered) else "unreadable"] += 1
            why = self._trouble = first_line(error)
        if self._exchange is None or not why:
            self._exchange = Exchange(question, answer, value, why)
        return value


def added_up(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several ranks, or answers; of the longest the longest."""
    total = {name: sum(one.get(name, 0) for one in costs) for name in COSTS}
    return total | {"longest": max(one.get("longest", 0) for one in costs)}


def spent(costs: Mapping[str, float]) -> str:
    """Of questions, for people."""
    tokens = costs["prompt_tokens"] + costs["completion_tokens"]
    return (
        f"{costs['questions']:.0f} questions ({costs['known']:.0f} known, "
        f"{costs['unanswered']:.0f} unanswered, {costs['unreadable']:.0f} unreadable), "
        f"{tokens:,.0f} tokens, {costs['seconds']:.1f} s, the longest {costs['longest']:.1f} s"
    )


class Grader(Judge):
    """Scores a picture by one question."""

    def begin(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Pending | None:
        return self.begin_questions([images_B3HW], prompts) if self.remote else None

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.begin_questions([images_B3HW], prompts)()


class Comparer(Judge):
    """Compares two pictures by one question; the other order is another question."""

    asks = 2

    def compare(self, first_N3HW: Tensor, second_N3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.begin_questions([first_N3HW, second_N3HW], prompts)()


def _voice(settings: JudgeSettings, device: torch.device) -> Voice:
    """ValueError, opening with the field."""
    if settings.where.startswith(OPENAI):
        return Chat(
            settings.url, settings.model or "", settings.calls,
            parallel=settings.parallel, cache=settings.cache,
        )  # fmt: skip
    from gardo.rewards.judging.local import LocalVoice

    most = settings.most_pixels
    return LocalVoice(
        settings.path, settings.revision, settings.dtype, device,
        batch=settings.batch, min_pixels=min(56 * 56, most), max_pixels=most,
    )  # fmt: skip


def _size_of(picture_3HW: Tensor) -> str:
    return f"[a picture, {picture_3HW.shape[2]} x {picture_3HW.shape[1]}]"


def _indented(text: str) -> list[str]:
    return [f"    {line}" for line in text.splitlines()]
