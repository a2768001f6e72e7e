"""When the weights are gathered once a phase, and when at every forward, each for its reason.

What gathering once does between ranks is in tests/integration.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from gardo.distributed.base import DistributedSettings, RolloutSettings
from gardo.distributed.gather import SHARE, choose_gather

BYTES = 4 * (3 * 3 + 3)  # of the model's weights


def choose(
    gather: str = "iteration", *, hpz: int = 1, free: int = 10 * BYTES, others: int = 0
) -> tuple[Any, str]:
    """The choice on a rank, where the others' answers to every question are at most `others`."""
    model = nn.Linear(3, 3)
    return choose_gather(
        model,
        [model],
        SimpleNamespace(),  # a DeepSpeed whose hooks are not where this release looks
        settings=DistributedSettings(hpz=hpz),
        rollout=RolloutSettings(gather=gather),  # type: ignore[arg-type]
        free=free,
        agree_max=lambda mine: max(mine, others),
    )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"gather": "step"}, " (rollout.gather: step)"),
        ({"hpz": 2}, " (distributed.hpz has its own copies)"),
        ({"free": BYTES - 1}, ": no room on some rank (here 0.00 GiB of weights, 0.00 GiB free)"),
        ({"gather": "auto", "free": int(BYTES / SHARE) - 1}, ": no room on some rank"),
        ({"others": 1}, ": no room on some rank"),
    ],
)
def test_every_forward_gathers_and_it_is_said_why(asked: dict[str, Any], said: str) -> None:
    once, note = choose(**asked)
    assert once is None
    assert note.startswith(f"weights gathered at every forward{said}")


@pytest.mark.parametrize(("gather", "free"), [("iteration", BYTES), ("auto", 2 * BYTES)])
def test_another_deepspeed_is_noticed(gather: str, free: int) -> None:
    """There is room, so it is tried: nothing is taken apart before the hooks are found."""
    once, note = choose(gather, free=free)
    assert once is None
    assert "gathering once does not work with deepspeed" in note
    assert "AttributeError" in note and "forward_hooks" in note
