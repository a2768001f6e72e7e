"""What ranks say to each other in words."""

from __future__ import annotations

import torch

from gardo.distributed.base import gather_text


class Alone:
    """A group of one rank."""

    device = torch.device("cpu")

    def agree_max(self, value: float) -> int:
        return int(value)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_a_message_that_ends_in_half_of_a_character_fails_no_rank():
    assert gather_text(Alone(), "zu lang: \u00e4\ud83d") == ["zu lang: \u00e4\\ud83d"]
    assert gather_text(Alone(), "") == [""]
