"""An algorithm: DDPO in which bad pictures weigh less than good ones."""

from dataclasses import replace

import torch
from pydantic import Field

from gardo.algorithms.ddpo import DDPO, DDPOSettings


class AsymmetricSettings(DDPOSettings):
    of_bad: float = Field(0.5, ge=0, le=1, description="what a negative advantage is multiplied by")


class Asymmetric(DDPO):
    Settings = AsymmetricSettings

    def credit(self, scores):
        """Sees the scores of all ranks, on the host: the same on each."""
        credit = super().credit(scores)
        advantage_B = credit.advantage_B
        less_B = torch.where(advantage_B < 0, self.settings.of_bad * advantage_B, advantage_B)
        return replace(credit, advantage_B=less_B)
