"""When the weights are gathered once a phase, and when at every forward, each for its reason.

What gathering once does between ranks is in tests/integration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from gardo.distributed.base import DistributedSettings, RolloutSettings
from gardo.distributed.gather import SHARE, Forecast, GatherEach, choose_gather

BYTES = 4 * (3 * 3 + 3)  # of the model's weights
NO_PLAN = Forecast(0, "no plan of it")


def not_asked() -> Forecast:
    raise AssertionError("the plan was asked")


def choose(
    gather: str = "iteration",
    *,
    free: int = 10 * BYTES,
    forecast: Forecast | Callable[[], Forecast] = NO_PLAN,
    rank: int = 0,
    world: int = 2,
    others: Sequence[int] = (),
    **settings: Any,
) -> tuple[Any, str]:
    """The choice of a rank; `others` is what another answers to each question, until it agrees."""
    model, answers = nn.Linear(3, 3), iter(others)
    coordinator = SimpleNamespace(_clear_trace_structures=lambda: None)
    engine: Any = SimpleNamespace(
        rank=rank, world=world, agree_max=lambda mine: max(mine, next(answers, mine))
    )
    return choose_gather(
        model,
        [model],
        SimpleNamespace(param_coordinator=coordinator),  # whose hooks are not where they should be
        engine=engine,
        settings=DistributedSettings(**settings),
        rollout=RolloutSettings(gather=gather),  # type: ignore[arg-type]
        free=free,
        forecast=forecast if callable(forecast) else lambda: forecast,
    )


PLAN = Forecast(20 * BYTES * 10**6, "phase sample")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"gather": "step"}, "rollout.gather: step"),
        ({"hpz": 2}, "distributed.hpz has its own copies"),
        ({"free": BYTES - 1}, "no room: 0.00 GB of weights, 0.00 GB free"),
        ({"others": [1 - BYTES]}, "no room: 0.00 GB of weights, 0.00 GB free"),
        ({"world": 1, "offload": "parameters", "free": BYTES - 1}, "no room: 0.00 GB of weights"),
        (
            {"gather": "auto", "free": int(BYTES / SHARE) - 1},
            "no room: 0.00 GB of weights, 0.00 GB for them, three quarters of what is free "
            "(no plan of it)",
        ),
        (
            {"gather": "auto", "forecast": PLAN, "free": PLAN.bytes - 1},
            "no room: phase sample adds 0.96 GB, 0.00 GB of it weights; 0.96 GB free",
        ),
        (
            {"gather": "auto", "forecast": not_asked, "rank": 1, "others": [0, PLAN.bytes]},
            "no room: by rank 0's plan adds 0.96 GB, 0.00 GB of it weights; 0.00 GB free",
        ),
    ],
)
def test_every_forward_gathers_and_it_is_said_why(asked: dict[str, Any], said: str) -> None:
    gather, note = choose(**asked)
    assert isinstance(gather, GatherEach)
    assert note.startswith(f"ZeRO-3 gathers weights at every forward: {said}")


@pytest.mark.parametrize(
    "asked",
    [
        {"gather": "iteration", "free": BYTES},
        {"gather": "auto", "free": 2 * BYTES},
        {"gather": "auto", "forecast": PLAN, "free": PLAN.bytes},
        {"gather": "auto", "free": 0, "world": 1, "forecast": not_asked},  # it gathers views
    ],
)
def test_another_deepspeed_is_noticed(asked: dict[str, Any]) -> None:
    """There is room, so it is tried: nothing is taken apart before the hooks are found."""
    gather, note = choose(**asked)
    assert isinstance(gather, GatherEach)
    assert "gathering once does not work with deepspeed" in note
    assert "AttributeError" in note and "forward_hooks" in note
