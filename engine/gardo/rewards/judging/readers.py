r"""Answers of judges -> values. What cannot be read for certain is no value: Unreadable says why.

A judge that reasons is read after its reasoning (`</think>`), so that what it considered is not
taken for its verdict. An answer that was cut off is not read: its number may lack digits.

What an answer repeats of the prompt must not decide. So the last score or verdict counts where a
judge writes freely; where its format has a place for the verdict (a tag, a key of a JSON object),
that place alone does, and there must be one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gardo.rewards.judging.questions import Answer

SHOWN = 200  # characters of an answer in a message
NUMBER = r"(-?\d+(?:\.\d+)?)(?![\w.]*\w)"  # and not the begin of another: 1e9, 4.5.6


class Unreadable(ValueError):
    """An answer without a value, and why."""


class Reader(Protocol):
    """Makes a value of an answer; `limits` are those of its values."""

    @property
    def limits(self) -> tuple[float, float]: ...

    def __call__(self, answer: Answer) -> float:
        """Unreadable."""


def said_after_thinking(answer: Answer) -> str:
    """The text without the reasoning before it. Unreadable, where it was cut off."""
    if answer.cut:
        raise Unreadable(f"cut off at max_tokens, at ...{answer.text[-80:]!r}; give it more")
    before, _, after = answer.text.rpartition("</think>")
    if not before and "<think>" in after:
        raise Unreadable(f"reasoning without an end: {_begins(after)}")
    return after


@dataclass(frozen=True)
class Number:
    """The last number that `pattern`, with one group, finds; between low and high.

    `unit`: then as a share of the way from low to high.
    """

    pattern: str
    low: float
    high: float
    unit: bool = False

    @property
    def limits(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.unit else (self.low, self.high)

    def __call__(self, answer: Answer) -> float:
        text = said_after_thinking(answer)
        found = re.findall(self.pattern, text)
        if not found:
            raise Unreadable(f"no score in {_begins(text)}")
        value = _number(found[-1], self.low, self.high)
        return (value - self.low) / (self.high - self.low) if self.unit else value


@dataclass(frozen=True)
class Scores:
    """The mean of scores `LABEL Score (1-5): x`; all that are named must be there."""

    labels: tuple[str, ...]
    low: float
    high: float

    @property
    def limits(self) -> tuple[float, float]:
        return self.low, self.high

    def __call__(self, answer: Answer) -> float:
        text = said_after_thinking(answer)
        values = []
        for label in self.labels:
            found = re.findall(rf"{label} Score(?: \([^)]*\))?:\s*{NUMBER}", text, re.IGNORECASE)
            if not found:
                raise Unreadable(f"no {label} Score in {_begins(text)}")
            values.append(_number(found[-1], self.low, self.high))
        return math.fsum(values) / len(values)


@dataclass(frozen=True)
class Shares:
    """The first image's share: the mean over `LABEL Score: Image 1: x Image 2: y`, with x + y = 1.

    Sums that are off by more than `slack` are no shares.
    """

    labels: tuple[str, ...]
    slack: float = 0.05
    limits: tuple[float, float] = (0.0, 1.0)

    def __call__(self, answer: Answer) -> float:
        text = said_after_thinking(answer)
        shares = []
        for label in self.labels:
            pattern = rf"{label} Score:\s*Image 1:\s*{NUMBER}\s*Image 2:\s*{NUMBER}"
            found = re.findall(pattern, text, re.IGNORECASE)
            if not found:
                raise Unreadable(f"no {label} Score of two images in {_begins(text)}")
            first, second = (_number(value, 0, 1) for value in found[-1])
            if abs(first + second - 1) > self.slack:
                raise Unreadable(f"{label} Score: {first:g} and {second:g} are no shares of 1")
            shares.append(first / (first + second))
        return math.fsum(shares) / len(shares)


VERDICTS = {
    r"image 1 is (?:the )?better": 1.0,
    r"image 2 is (?:the )?better": 0.0,
    r"(?:both|the two) images are equally good": 0.5,
}


@dataclass(frozen=True)
class Verdict:
    """1 for `Image 1 is better`, 0 for `Image 2 is better`, 0.5 for `Both ... equally good`.

    The last one of the text; with `tag`, what stands in the one pair of <tag>, which must be a
    verdict and nothing else.
    """

    tag: str | None = None
    limits: tuple[float, float] = (0.0, 1.0)

    def __call__(self, answer: Answer) -> float:
        text = said_after_thinking(answer)
        if self.tag is not None:
            return self._tagged(text, self.tag)
        found = [
            (match.start(), value)
            for pattern, value in VERDICTS.items()
            for match in re.finditer(rf"\b{pattern}\b", text, re.IGNORECASE)
        ]
        if not found:
            raise Unreadable(f"no verdict in {_begins(text)}")
        return max(found)[1]

    def _tagged(self, text: str, tag: str) -> float:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        if len(found) != 1:
            raise Unreadable(f"{len(found)} <{tag}>, not one, in {_begins(text)}")
        said = found[0].strip().rstrip(".")
        for pattern, value in VERDICTS.items():
            if re.fullmatch(pattern, said, re.IGNORECASE):
                return value
        raise Unreadable(f"no verdict in <{tag}>: {_begins(said)}")


@dataclass(frozen=True)
class Winner:
    """1 for `"winner": "Image 1"` of the one JSON object of the answer, 0 for `"Image 2"`."""

    key: str = "winner"
    limits: tuple[float, float] = (0.0, 1.0)

    def __call__(self, answer: Answer) -> float:
        text = said_after_thinking(answer)
        said = _one_object(text).get(self.key)
        values = {"image 1": 1.0, "image 2": 0.0, "tie": 0.5}
        name = said.strip().casefold() if isinstance(said, str) else ""
        if name not in values:
            raise Unreadable(f"{self.key}: {_begins(repr(said))} is neither Image 1 nor Image 2")
        return values[name]


@dataclass(frozen=True, eq=False)
class Choices:
    """The mean of the choices' values under their probabilities, among themselves.

    A model that gives all of them together less than `least` does not answer the question.
    """

    values: Mapping[str, float]
    least: float = 0.01

    @property
    def limits(self) -> tuple[float, float]:
        return min(self.values.values()), max(self.values.values())

    def __call__(self, answer: Answer) -> float:
        chances = answer.chances or {}
        mass = math.fsum(chances.get(choice, 0.0) for choice in self.values)
        if not (math.isfinite(mass) and mass > 0 and mass >= self.least):
            words = ", ".join(self.values)
            raise Unreadable(
                f"{words} have a probability of {mass:.2g} together (least: {self.least:g}); the "
                f"answer begins {_begins(answer.text)}"
            )
        mean = math.fsum(v * chances.get(c, 0.0) for c, v in self.values.items()) / mass
        low, high = self.limits
        return min(max(mean, low), high)  # the division's last bit


def _number(text: Any, low: float, high: float) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise Unreadable(f"{_begins(str(text))} is no score") from None
    if not low <= value <= high:
        raise Unreadable(f"a score of {value:g}, not in {low:g} to {high:g}")
    return value


def _one_object(text: str) -> dict[str, Any]:
    """The one JSON object of a text, in a code fence or not. A key twice is no answer."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise Unreadable(f"a key twice in {_begins(text)}")
        return dict(pairs)

    decoder, at, found = json.JSONDecoder(object_pairs_hook=unique), text.find("{"), []
    while at >= 0:
        try:
            said, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError):
            raise Unreadable(f"no JSON object in {_begins(text[at:])}") from None
        found.append(said)
        at = text.find("{", end)
    if len(found) != 1:
        raise Unreadable(f"{len(found)} JSON objects, not one, in {_begins(text)}")
    return found[0]  # type: ignore[no-any-return]


def _begins(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
