"""Pref-GRPO's reward on several ranks gives the bits of one and sends no image for nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gardo.rewards.base import Gathering
from tests.engine.rewards.pair_judges import (
    place,
    preference,
    squares,
)


def on_ranks(world: int, work: Callable[[int, Callable[[Tensor], Tensor]], Any]) -> list[Any]:
    """`work(rank, gather)` on threads; gather waits for all ranks, as a collective does."""
    barrier = threading.Barrier(world, timeout=20)
    given: list[Any] = [None] * world
    results: list[Any] = [None] * world
    sent: list[int] = [0] * world

    def run(rank: int) -> None:
        def gather(tensor: Tensor) -> Tensor:
            given[rank] = tensor
            sent[rank] += tensor.numel() * tensor.element_size() if tensor.dim() > 2 else 0
            barrier.wait()
            assert len({t.shape for t in given}) == 1, "an all-gather takes equal shapes"
            joined = torch.cat(given)
            barrier.wait()
            return joined

        results[rank] = (*work(rank, gather), sent)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.mark.parametrize("judge", ["Level", "Mute", "Chess"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"opponents": 2}, {"opponents": 3, "both_orders": False}, {"method": "bradley_terry"}],
    ids=str,
)
@pytest.mark.parametrize("world", [2, 3, 6])
def test_ranks_change_no_bit(world: int, settings: dict[str, Any], judge: str) -> None:
    """3 groups of 4 on 2 ranks (the middle one split), 3 (none), 6 (all)."""
    levels = [9, 255, 4, 6, 3, 3, 8, 1, 70, 50, 9, 60]
    prompts = [f"prompt {n // 4}" for n in range(12)]
    alone = preference(judge, **settings)
    expected = alone.score_together(squares(levels), prompts, place(12, 4))
    share = 12 // world

    def work(rank: int, gather: Callable[[Tensor], Tensor]) -> Any:
        own = slice(rank * share, (rank + 1) * share)
        reward = preference(judge, **settings)
        where = Gathering(torch.arange(12)[own], torch.arange(12)[own] // 4, 42, 3, gather)
        out = reward.score_together(squares(levels)[own], prompts[own], where)
        return out, getattr(reward.reward, "asked", [])

    ranks = on_ranks(world, work)
    together = torch.cat([r[0] for r in ranks])
    assert torch.equal(together.isnan(), expected.isnan())
    assert torch.equal(together.nan_to_num(-1), expected.nan_to_num(-1))
    asked = [pair for r in ranks for pair in r[1]]
    if judge != "Level":
        assert sorted(asked) == sorted(alone.reward.asked)
        if settings.get("both_orders", True):
            assert len({len(r[1]) for r in ranks}) == 1
        # images of 3 x 2 x 2 bytes and a row that says whether they are finite, of the largest
        # number that any rank has in a split group
        travelling = {2: 2, 3: 0, 6: 2}[world]
        assert ranks[0][-1] == [travelling * 18] * world
    else:
        assert ranks[0][-1] == [0] * world
