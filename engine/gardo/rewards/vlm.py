"""A vision-language model's grade of a picture.

    rewards:
      grade: {kind: vlm, role: auxiliary, where: "openai:http://gpu7:8000/v1", model: Qwen/...}

    value = (grade - low) / (high - low)       the grade: the number behind the last `Grade:`

The model is shown the picture and the prompt, between marks and as data to be judged, and asked
for a grade; `question` may be another, and `answer` a regular expression, whose one group finds the
grade; the last that it finds counts. An answer
without a grade, or with one out of range, is NaN: the image is masked. An endpoint's key, if it
wants one, is the environment variable GARDO_OPENAI_KEY.

Nothing is said here of how good a judge the model is.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from gardo.rewards.base import About
from gardo.rewards.judging.base import Grader, JudgeSettings, template
from gardo.rewards.judging.readers import Pattern, Reader, Scores
from gardo.rewards.judging.templates import GRADE


def _one_group(pattern: str | None) -> str | None:
    if pattern is None:
        return None
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"{pattern!r} has {groups} groups; one is the grade")
    return pattern


class VlmSettings(JudgeSettings):
    kind: Literal["vlm"] = "vlm"
    question: Annotated[str, template(low=1.0, high=1.0)] = Field(
        GRADE, description="after the prompt; may have {low} and {high}"
    )
    answer: Annotated[str | None, AfterValidator(_one_group)] = Field(
        None, description="a regular expression whose one group is the grade, if not `Grade: N`"
    )
    low: float = Field(1.0, description="the worst grade")
    high: float = Field(5.0, description="the best grade")

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low: {self.low:g} is not below high: {self.high:g}")
        return self


class Vlm(Grader):
    Settings = VlmSettings
    about = About(
        "(grade - low) / (high - low), a grade that a model gives",
        "0 to 1",
        "the model's",
        "protocol and parsing; no published model",
    )

    def reading(self) -> tuple[Reader, int]:
        its = self.settings
        if its.answer is None:
            return Scores(("Grade",), its.low, its.high, unit=True), 256
        return Pattern(its.answer, its.low, its.high), 256

    def text(self, prompt: str) -> str:
        its = self.settings
        return f"{prompt}\n{its.question.format(low=its.low, high=its.high)}"


PLUGIN = Vlm
