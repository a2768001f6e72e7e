"""UnifiedReward's verdict on two pictures: a judge for `preference`, as in Pref-GRPO.

    rewards:
      better:
        kind: preference
        role: proxy
        judge: {kind: unifiedreward_pair, form: think, where: "openai:http://gpu7:8000/v1",
                model: CodeGoat24/UnifiedReward-Think-qwen-7b}

    1.5, think, flex    1 where the first is better, 0 where the second is, 0.5 for a tie
    2.0                 the first one's share, mean of alignment, coherence and style

`form` says which of the family is asked: the verdict of 1.5, the shares of 2.0, Think's reasoning
with a verdict in <answer> (arXiv 2505.03318), or Flex's JSON object. `preference` asks in both
orders, which cancels what the model owes to the order. The questions are the models' own
(judging/templates.py), but for the system message and the marks around the prompt.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gardo.rewards.base import About
from gardo.rewards.judging.base import Comparer, JudgeSettings
from gardo.rewards.judging.readers import Reader
from gardo.rewards.judging.templates import UNIFIED_PAIR


class UnifiedRewardPairSettings(JudgeSettings):
    kind: Literal["unifiedreward_pair"] = "unifiedreward_pair"
    form: Literal["1.5", "2.0", "think", "flex"] = Field(
        "think", description="which model of the family it is: what it is asked"
    )


class UnifiedRewardPair(Comparer):
    Settings = UnifiedRewardPairSettings
    about = About(
        "verdict on two pictures, or the first one's share (2.0): a judge for preference",
        "0 to 1",
        "see the model's page (CodeGoat24/UnifiedReward-*)",
        "protocol and parsing; published weights: no",
    )

    def reading(self) -> tuple[Reader, int]:
        asked = UNIFIED_PAIR[self.settings.form]
        return asked.reader, asked.max_tokens

    def text(self, prompt: str) -> str:
        return UNIFIED_PAIR[self.settings.form].text.format(prompt=prompt)


PLUGIN = UnifiedRewardPair
