"""UnifiedReward's score of a picture (arXiv 2503.05236).

    rewards:
      quality: {kind: unifiedreward, role: proxy, where: "openai:http://gpu7:8000/v1",
                model: CodeGoat24/UnifiedReward-2.0-qwen-7b}

    version 1.5    what stands after `Final Score:`, 1 to 5
    version 2.0    of the scores for alignment, coherence and style, 1 to 5 each, their mean; or one

The questions are the models' own (judging/templates.py), but for the system message and the marks
around the prompt. Its verdicts on pairs are `unifiedreward_pair`.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from gardo.rewards.base import About
from gardo.rewards.judging.base import Grader, JudgeSettings
from gardo.rewards.judging.readers import Reader, Scores
from gardo.rewards.judging.templates import UNIFIED_POINT


class UnifiedRewardSettings(JudgeSettings):
    kind: Literal["unifiedreward"] = "unifiedreward"
    version: Literal["1.5", "2.0"] = Field("2.0", description="of the model: what it is asked")
    aspect: Literal["mean", "alignment", "coherence", "style"] = Field(
        "mean", description="version 2.0: which of its three scores"
    )

    @model_validator(mode="after")
    def _one_score(self) -> Self:
        if self.version == "1.5" and self.aspect != "mean":
            raise ValueError(f"aspect: {self.aspect}: version 1.5 gives one score; leave it out")
        return self


class UnifiedReward(Grader):
    Settings = UnifiedRewardSettings
    about = About(
        "final score (1.5); mean of alignment, coherence and style, or one of them (2.0)",
        "1 to 5",
        "see the model's page (CodeGoat24/UnifiedReward-*)",
        "protocol and parsing; published weights: no",
    )

    def reading(self) -> tuple[Reader, int]:
        asked = UNIFIED_POINT[self.settings.version]
        if self.settings.aspect == "mean":
            return asked.reader, asked.max_tokens
        return Scores((f"{self.settings.aspect} Score",), 1.0, 5.0), asked.max_tokens

    def text(self, prompt: str) -> str:
        return UNIFIED_POINT[self.settings.version].text.format(prompt=prompt)


PLUGIN = UnifiedReward
