r"""Answers of judges -> values. What cannot be read for certain is no value: Unreadable says why.

A judge that reasons is read after its reasoning (`</think>`), so that what it considered is not
taken for its verdict. An answer that was cut off is not read: its number may lack digits.

What an answer repeats of the prompt must not decide. So where a judge writes freely the last score
counts, or the last sentence about the pictures, and it must be readable; where its format has a
place for the verdict (a tag, a key of a JSON object), that place alone does, and there must be one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gardo.rewards.judging.questions import Answer

LONGEST = 1 << 16  # characters of an answer that are worth reading
SHOWN = 200  # characters of an answer in a message


class Unreadable(ValueError):
    """An answer without a value, and why."""


class Reader(Protocol):
    """Makes a value of an answer, within `limits`, by the probabilities of `choices` if any."""

    @property
    def limits(self) -> tuple[float, float]: ...

    @property
    def choices(self) -> tuple[str, ...]: ...

    def __call__(self, answer: Answer) -> float:
        """Unreadable."""


class Text:
    """A reader of what is written."""

    choices: tuple[str, ...] = ()


def verdict_text(answer: Answer) -> str:
    """The text after the reasoning. Unreadable, where it was cut off or is no answer."""
    if answer.cut:
        raise Unreadable(f"cut off at max_tokens, at ...{answer.text[-80:]!r}; give it more")
    if len(answer.text) > LONGEST:
        raise Unreadable(f"an answer of {len(answer.text)} characters: {_begins(answer.text)}")
    text = re.split(r"</think(?:ing)?>", answer.text, flags=re.IGNORECASE)[-1]
    if re.search(r"<think(?:ing)?>", text, re.IGNORECASE):
        raise Unreadable(f"reasoning without an end: {_begins(text)}")
    return text


def plain(text: str) -> str:
    r"""Without what a model sets around words: `**4**`, `\boxed{4}`, quotes."""
    text = re.sub(r"\\(?:boxed|text|mathbf)\{([^{}]{0,80})\}", r"\1", text)
    return re.sub(r"[*`$\"'“”‘’]", "", text)


# ---- scores --------------------------------------------------------------------------------------

FIGURES = r"[+-]?(?:\d{1,12}(?:\.\d{1,24})?|\.\d{1,24})"
# and not the begin of another: 1e9, 4.5.6, 3,5, 4 1/2, 2 to 3, 4-5
ALONE = r"(?!\w|[.,]\d|[ \t]*(?:[\d%/⁄]|[-–—][ \t]*\d|(?:to|or|out)\b))"


def labelled(text: str, label: str) -> str:
    """What stands behind the last `LABEL:` or `LABEL (1-5):`. Unreadable."""
    behind = re.split(rf"(?<!\w){label}(?: ?\([^()\n]{{0,20}}\))?\s*[:=]", text, flags=re.I)
    if len(behind) < 2:
        raise Unreadable(f"no {label} in {_begins(text)}")
    return behind[-1]


def _score(text: str, label: str, low: float, high: float) -> float:
    behind = labelled(text, label)
    whole = rf"(?:\s*(?:/|out of)\s*{high:g}(?:\.0+)?)?"  # 4/5, where 5 is the most
    found = re.match(rf"\s*\[?({FIGURES}){whole}{ALONE}", behind, re.I)
    if found is None:
        raise Unreadable(f"no number behind {label}: {_begins(behind)}")
    return _within(found[1], low, high)


@dataclass(frozen=True)
class Scores(Text):
    """The mean of the scores behind the labels, which must all be there.

    `unit`: then as a share of the way from low to high.
    """

    labels: tuple[str, ...]
    low: float
    high: float
    unit: bool = False

    @property
    def limits(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.unit else (self.low, self.high)

    def __call__(self, answer: Answer) -> float:
        text = plain(verdict_text(answer))
        values = [_score(text, label, self.low, self.high) for label in self.labels]
        mean = math.fsum(values) / len(values)
        return (mean - self.low) / (self.high - self.low) if self.unit else mean


@dataclass(frozen=True)
class Pattern(Text):
    """The last number that a regular expression with one group finds, as a share of its range."""

    pattern: str
    low: float
    high: float
    limits: tuple[float, float] = (0.0, 1.0)

    def __call__(self, answer: Answer) -> float:
        text = verdict_text(answer)
        found = re.findall(self.pattern, text)
        if not found:
            raise Unreadable(f"no score in {_begins(text)}")
        return (_within(found[-1], self.low, self.high) - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Shares(Text):
    """The first image's share: the mean over `LABEL: Image 1: x Image 2: y`, with x + y = 1.

    Sums that are off by more than `slack` are no shares.
    """

    labels: tuple[str, ...]
    slack: float = 0.05
    limits: tuple[float, float] = (0.0, 1.0)

    def __call__(self, answer: Answer) -> float:
        text = plain(verdict_text(answer))
        shares = [self._share(text, label) for label in self.labels]
        return math.fsum(shares) / len(shares)

    def _share(self, text: str, label: str) -> float:
        behind = labelled(text, label)
        first, second = (
            rf"[\s,;•-]*Image {n}\s*[:=]\s*({FIGURES}(?!\w|[.,]\d)\s*%?)" for n in (1, 2)
        )
        found = re.match(first + second, behind, re.I)
        if found is None:
            raise Unreadable(f"no numbers of two images behind {label}: {_begins(behind)}")
        percent = [one.endswith("%") for one in found.groups()]
        most = 100 if all(percent) else 1
        one, two = (_within(part.rstrip("% \t\n"), 0, most) / most for part in found.groups())
        if abs(one + two - 1) > self.slack or percent[0] != percent[1]:
            raise Unreadable(f"{label}: {found[1]} and {found[2]} are no shares of 1")
        return one / (one + two)


# ---- verdicts ------------------------------------------------------------------------------------

OPENING = (
    r"(?:(?:so|thus|hence|therefore|overall|in (?:all|conclusion|summary)|(?:final )?(?:conclusion|"
    r"verdict|answer))[,:]?\s+)*(?:i (?:think|believe|conclude)(?: that)?\s+)?"
)
ADVERBS = r"(?:(?:the|slightly|clearly|much|overall|significantly|a bit|somewhat|far)\s+)*"
BETTER = re.compile(
    rf"{OPENING}(?:the )?image ([12]) is {ADVERBS}(?:better|superior)(?: one| image| overall)?"
    r"(?: than (?:the )?image [12])?",
    re.IGNORECASE,
)
EQUAL = re.compile(
    rf"{OPENING}(?:both images|the two images|images? 1 and (?:image )?2) are equally good",
    re.IGNORECASE,
)
ABOUT = re.compile(r"\b(?:images?|pictures?|both|first|second|former|latter)\b", re.IGNORECASE)


def said_of(sentence: str) -> float | None:
    """1 for `Image 1 is better`, 0 for `Image 2 is better`, 0.5 for both; None for anything else.

    The sentence says that and nothing else.
    """
    sentence = " ".join(sentence.split())
    if found := BETTER.fullmatch(sentence):
        return float(found[1] == "1")
    return 0.5 if EQUAL.fullmatch(sentence) else None


@dataclass(frozen=True)
class Verdict(Text):
    """Which image is better: the last sentence about them; with `tag`, what its one pair holds."""

    tag: str | None = None
    limits: tuple[float, float] = (0.0, 1.0)

    def __call__(self, answer: Answer) -> float:
        text = verdict_text(answer)
        if self.tag is not None:
            text = self._tagged(text, self.tag)
        sentences = [part for part in re.split(r"[.!?;\n]", plain(text)) if ABOUT.search(part)]
        value = said_of(sentences[-1]) if sentences else None
        if value is None or (self.tag is not None and len(sentences) != 1):
            raise Unreadable(f"no verdict in {_begins(text)}")
        return value

    def _tagged(self, text: str, tag: str) -> str:
        parts = re.split(rf"<{tag}>", text, flags=re.IGNORECASE)
        if len(parts) != 2:
            raise Unreadable(f"{len(parts) - 1} <{tag}>, not one, in {_begins(text)}")
        inside = re.split(rf"</{tag}>", parts[1], flags=re.IGNORECASE)
        if len(inside) != 2:
            raise Unreadable(f"a <{tag}> without its end in {_begins(text)}")
        return inside[0]


@dataclass(frozen=True)
class Winner(Text):
    """1 for `"winner": "Image 1"` of the one JSON object that has it, 0 for `"Image 2"`."""

    key: str = "winner"
    limits: tuple[float, float] = (0.0, 1.0)

    def __call__(self, answer: Answer) -> float:
        text = verdict_text(answer)
        found = [one for one in _objects(text) if self.key in one]
        if len(found) != 1:
            raise Unreadable(f"{len(found)} JSON objects with {self.key} in {_begins(text)}")
        said = found[0][self.key]
        name = plain(said).strip().rstrip(".").casefold() if isinstance(said, str) else ""
        values = {"image 1": 1.0, "image 2": 0.0, "tie": 0.5}
        value = values.get(name, said_of(name))
        if value is None:
            raise Unreadable(f"{self.key}: {_begins(repr(said))} is neither Image 1 nor Image 2")
        return value


def _objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects of a text, in a code fence or not. A key twice is no answer."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise Unreadable(f"a key twice in {_begins(text)}")
        return dict(pairs)

    decoder, found = json.JSONDecoder(object_pairs_hook=unique), []
    opens, at = re.compile(r'\{\s*["}]'), 0  # a brace of the prose opens none
    while begin := opens.search(text, at):
        try:
            said, at = decoder.raw_decode(text, begin.start())
        except Unreadable:
            raise
        except (ValueError, RecursionError):
            raise Unreadable(f"no JSON object in {_begins(text[begin.start() :])}") from None
        found.append(said)
    return found


# ---- probabilities -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Choices:
    """The mean of the choices' values under their probabilities, among themselves.

    A model that gives all of them together less than `least` does not answer the question.
    """

    values: Mapping[str, float]
    least: float = 0.01

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(self.values)

    @property
    def limits(self) -> tuple[float, float]:
        return min(self.values.values()), max(self.values.values())

    def __call__(self, answer: Answer) -> float:
        chances = answer.chances or {}
        mass = math.fsum(chances.get(choice, 0.0) for choice in self.values)
        if not (math.isfinite(mass) and mass > 0 and mass >= self.least):
            raise Unreadable(
                f"{', '.join(self.values)} have a probability of {mass:.2g} together (least: "
                f"{self.least:g}); the answer begins {_begins(answer.text)}"
            )
        mean = math.fsum(v * chances.get(c, 0.0) for c, v in self.values.items()) / mass
        low, high = self.limits
        return min(max(mean, low), high)  # the division's last bit


def _within(text: Any, low: float, high: float) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        raise Unreadable(f"{_begins(str(text))} is no score") from None
    if not low <= value <= high:
        raise Unreadable(f"a score of {value:g}, not in {low:g} to {high:g}")
    return value


def _begins(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
