"""Quality in five levels, by token probability: DeQA's kind of score, of any model.

    rewards:
      quality: {kind: deqa, role: held_out, path: Qwen/Qwen2.5-VL-7B-Instruct}

    value = sum of level * P(level) / sum of P(level)    excellent 5, good 4, fair 3, poor 2, bad 1

P is that of the word as the first of the answer. (Q-Align, arXiv 2312.17090; DeQA-Score,
arXiv 2501.11561, whose own model class is not in transformers.) The prompt plays no part in it: it
is not shown. It needs probabilities: a model in this process or a worker, or an endpoint that heeds
`logprobs`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gardo.rewards.base import About
from gardo.rewards.judging.base import Grader, JudgeSettings
from gardo.rewards.judging.readers import Choices
from gardo.rewards.judging.templates import LEVELS, QUALITY


class DeqaSettings(JudgeSettings):
    kind: Literal["deqa"] = "deqa"
    least: float = Field(
        0.01, ge=0, lt=1, description="probability of the levels together below which it is masked"
    )


class Deqa(Grader):
    Settings = DeqaSettings
    about = About(
        "mean level under P(excellent .. bad), 5 to 1",
        "1 to 5",
        "the model's",
        "on tiny random models; DeQA's own: no",
    )

    def reading(self) -> tuple[Choices, int]:
        return Choices(LEVELS, self.settings.least), 1

    def text(self, prompt: str) -> str:
        return QUALITY


PLUGIN = Deqa
