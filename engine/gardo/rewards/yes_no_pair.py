"""The probability that a model says yes, the first of two pictures is better: OneReward's kind.

    rewards:
      better: {kind: preference, role: proxy, judge: {kind: yes_no_pair, path: Qwen/...}}

    c_ij = P(yes) / (P(yes) + P(no))        i shown first; `preference` asks in both orders

(arXiv 2508.21066, where `aspect` is the dimension that is asked for, and arXiv 2509.08826; no
checkpoint of theirs is public, so this asks any model.) As yes_no.py otherwise.
"""

from __future__ import annotations

from typing import Literal

from gardo.rewards.base import About
from gardo.rewards.judging.base import Comparer
from gardo.rewards.judging.readers import Choices
from gardo.rewards.judging.templates import FIRST
from gardo.rewards.yes_no import YesNoSettings, yes_or_no


class YesNoPairSettings(YesNoSettings):
    kind: Literal["yes_no_pair"] = "yes_no_pair"


class YesNoPair(Comparer):
    Settings = YesNoPairSettings
    about = About(
        "P(yes) / (P(yes) + P(no)), is the first picture better: a judge for preference "
        "(OneReward, RewardDance)",
        "0 to 1",
        "the model's",
        "on tiny random models; OneReward's are not public",
    )

    def reading(self) -> tuple[Choices, int]:
        return yes_or_no(self.settings), 1

    def text(self, prompt: str) -> str:
        return self.settings.text(prompt, FIRST)  # type: ignore[no-any-return]


PLUGIN = YesNoPair
