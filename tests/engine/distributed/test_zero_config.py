"""What DeepSpeed is told; what it then does is for tests/integration."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from gardo.distributed.base import DistributedSettings
from gardo.distributed.zero_config import zero_config


def config(**settings: Any) -> dict[str, Any]:
    blocks = [nn.Linear(2, 2), nn.Linear(2, 2)]
    return zero_config(
        DistributedSettings(**settings),
        blocks=blocks,
        module=nn.Sequential(*blocks),
        accumulation=1,
        max_grad_norm=1.0,
    )["zero_optimization"]


@pytest.mark.parametrize(
    ("stage", "asked", "overlaps"),
    [
        (1, None, False),
        (1, True, False),  # nothing to overlap with, and DeepSpeed 0.19 sums wrongly
        (2, None, False),  # until cluster_acceptance.sh has compared gradients on GPUs
        (2, True, True),
        (3, None, True),
        (3, False, False),
    ],
)
def test_where_gradients_travel_during_the_backward_pass(
    stage: int, asked: bool | None, overlaps: bool
) -> None:
    assert config(stage=stage, overlap=asked)["overlap_comm"] is overlaps
