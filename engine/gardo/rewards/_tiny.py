"""What the rewards of the tiny world share: their prompts are its captions."""

from __future__ import annotations

from gardo.rewards.base import Reward
from gardo.tiny import world
from gardo.types import Prompt


class TinyReward(Reward):
    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        world.parse(prompt)
