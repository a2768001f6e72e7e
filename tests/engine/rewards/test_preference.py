"""Pref-GRPO's reward: win rates in tournaments of a group, by hand; who meets whom."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from gardo.algorithms.advantage import AdvantageSettings, group_credit
from gardo.rewards.panel import Panel
from gardo.types import Prompt
from tests.engine.rewards.pair_judges import (
    place,
    preference,
    squares,
    values,
)


@pytest.mark.parametrize("both_orders", [True, False])
@pytest.mark.parametrize("judge", ["Level", "Duel"])
@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([5, 3], [1, 0]),
        ([4, 4], [0.5, 0.5]),
        ([3, 1, 2], [1, 0, 0.5]),
        ([7, 7, 2], [0.75, 0.75, 0]),  # a win and a tie; two losses
        ([1, 5, 5, 9], [0, 0.5, 0.5, 1]),  # the middle: a win, a tie, a loss
        ([6, 6, 6, 0], [2 / 3, 2 / 3, 2 / 3, 0]),
        ([2, 2, 2, 2], [0.5] * 4),
        ([3, 1, 2, 8, 8, 4], [1, 0, 0.5, 0.75, 0.75, 0]),  # two groups of three
    ],
)
def test_wins_over_the_others(
    judge: str, both_orders: bool, levels: list[int], expected: list[float]
) -> None:
    group = {6: 3}.get(len(levels), len(levels))
    reward = preference(judge, both_orders=both_orders)
    assert values(reward, levels, group) == pytest.approx(expected)


def test_scores_within_the_margin_tie() -> None:
    """10 and 12 tie, 12 and 14 tie, 10 and 14 do not."""
    assert values(preference("Level", tie_margin=2), [10, 12, 14], 3) == [0.25, 0.5, 0.75]


@pytest.mark.parametrize("method", ["win_rate", "bradley_terry"])
def test_a_failed_score_masks_its_image_alone(method: str) -> None:
    """255 has no score: the others are judged by the pairs that are left."""
    first, failed, last = values(preference("Level", method=method), [8, 255, 3], 3)
    assert failed is None
    assert first is not None and last is not None and first > 0.5 > last
    if method == "win_rate":
        assert (first, last) == (1, 0)


def test_one_failed_answer_masks_the_pair() -> None:
    """Mute fails with 9 first: all pairs with 9 are gone, though the other order was answered."""
    assert values(preference("Mute"), [9, 4, 6, 5], 4) == [None, 0, 1, 0.5]
    assert values(preference("Mute"), [9, 4], 2) == [None, None]


def test_in_one_order_a_failed_answer_masks_what_was_asked() -> None:
    """Every pair is asked once; 9 meets who is shown before it."""
    reward = preference("Mute", both_orders=False)
    value = values(reward, [9, 4, 6, 5], 4)
    met = [pair for pair in reward.reward.asked if pair[1] == 9]
    assert value[0] == (1 if met else None) and len(reward.reward.asked) == 6
    assert value[1] == 0


def test_both_orders_cancel_a_bias_of_place() -> None:
    levels = [3, 1, 2, 200, 7, 7]
    assert values(preference("First"), levels, 6) == [0.5] * 6
    # half of every answer is the order's: (c_ij + 1 - c_ji) / 2 = 0.5 +- 0.125 here
    assert values(preference("Leaning"), [5, 3], 2) == [0.625, 0.375]
    assert values(preference("Leaning", both_orders=False), [5, 3], 2) in ([0.75, 0.25], [0.5, 0.5])


def test_a_probability_counts_as_one() -> None:
    expected = torch.sigmoid(torch.tensor([2.0, -2.0])).tolist()
    assert values(preference("Chess"), [40, 20], 2) == pytest.approx(expected)


def test_what_a_judge_says_outside_of_its_limits_is_no_answer() -> None:
    assert values(preference("Loud"), [1, 2, 3], 3) == [None] * 3
    strict = preference("Level")
    strict.reward.limits = (0.0, 30.0)
    assert values(strict, [40, 20, 10], 3)[1:] == [1.0, 0.0]


def test_a_judge_elsewhere_is_met_closed_and_asked_what_is_wrong() -> None:
    reward, seen = preference("Level"), []
    reward.reward.meet = lambda prompt, size: seen.append((prompt, size))
    reward.reward.close = lambda: seen.append("closed")
    type(reward.reward).trouble = property(lambda self: "down")
    try:
        reward.meet(Prompt("a"), (8, 8))
        reward.close()
        assert seen == [("a", (8, 8)), "closed"] and reward.trouble == "down"
    finally:
        del type(reward.reward).trouble


@pytest.mark.parametrize("method", ["win_rate", "bradley_terry"])
@pytest.mark.parametrize("judge", ["Duel", "Level", "Chess"])
def test_the_order_of_the_images_does_not_matter(judge: str, method: str) -> None:
    reward = preference(judge, method=method)
    levels = [12, 40, 7, 7, 90, 33]
    expected = dict(zip(levels, values(reward, levels, 6), strict=True))
    for order in itertools.islice(itertools.permutations(levels), 0, 720, 45):
        got = values(reward, order, 6)
        # fp64 sums in another order, rounded to fp32
        assert got == pytest.approx([expected[level] for level in order], abs=2e-7)


# ---- who meets whom ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "opponents"), [(6, 2), (6, 3), (7, 4), (8, 1), (8, 7), (9, None), (2, None)]
)
def test_each_image_meets_k_others_in_both_orders(group: int, opponents: int | None) -> None:
    reward = preference("Duel", opponents=opponents, batch=5)
    levels = list(range(2 * group))
    values(reward, levels, group)
    asked = reward.reward.asked
    met = opponents or group - 1
    assert len(asked) == len(set(asked)) == 2 * group * met
    assert {(b, a, text) for a, b, text in asked} == set(asked)
    assert all(a != b and a // group == b // group for a, b, _ in asked)
    assert all(text == f"prompt {a // group}" for a, _, text in asked)
    for level in levels:
        assert sum(a == level for a, _, _ in asked) == met
    assert reward.reward.largest_call == min(5, len(asked))


@pytest.mark.parametrize(("group", "opponents"), [(6, None), (7, 4), (8, 3), (8, 1)])
def test_in_one_order_each_pair_is_asked_once(group: int, opponents: int | None) -> None:
    reward = preference("Duel", opponents=opponents, both_orders=False)
    values(reward, list(range(group)), group)
    pairs = [frozenset(pair[:2]) for pair in reward.reward.asked]
    met = opponents or group - 1
    assert len(pairs) == len(set(pairs)) == group * met // 2
    assert all(sum(level in pair for pair in pairs) == met for level in range(group))


def test_opponents_are_a_function_of_seed_and_step() -> None:
    def asked(step: int, seed: int = 42) -> list[Any]:
        reward = preference("Duel", opponents=2)
        where = place(16, 8, step, seed)
        reward.score_together(squares(range(16)), ["same"] * 16, where)
        return reward.reward.asked

    assert asked(5) == asked(5)
    assert set(asked(5)) != set(asked(6)) and set(asked(5)) != set(asked(5, seed=7))
    first, second = ({(a % 8, b % 8) for a, b, _ in asked(5) if a // 8 == g} for g in (0, 1))
    assert first != second  # each group draws for itself


def test_sampled_opponents_give_the_win_rate_on_average() -> None:
    """Over 100 steps. A mean of 2 games out of {0, 1} has a standard deviation of at most 0.5, so
    that of 100 steps 0.05; the draw is seeded, so four times that is reached never or always."""
    levels = list(range(6))
    reward = preference("Duel", opponents=2)
    seen = torch.tensor([values(reward, levels, 6, step) for step in range(100)])
    assert torch.allclose(seen.mean(0), torch.arange(6) / 5, atol=4 * 0.05)
    assert float(seen.std(0).max()) > 0.1  # and a step alone does not


# ---- in the panel, and alone ---------------------------------------------------------------------


def test_the_panel_treats_it_as_any_proxy() -> None:
    levels = [3, 1, 2, 255, 8, 8]
    panel = Panel({"pref": preference("Level", weight=2.0)})
    index_B = torch.arange(6)
    scores = panel(squares(levels), [""] * 6, sample_B=index_B, group_B=index_B // 3)
    assert scores.rewards["pref"][[0, 1, 2, 4, 5]].tolist() == [1, 0, 0.5, 0.5, 0.5]
    assert scores.masks["pref"].tolist() == [True, True, True, False, True, True]
    assert scores.valid_B.tolist() == [True, True, True, False, True, True]
    assert scores.proxy_B.tolist() == [2, 0, 1, 0, 1, 1]
    credit = group_credit(scores, AdvantageSettings(std="group"), gate=True)
    spread = (2 / 3) ** 0.5  # population std of 2, 0, 1
    assert credit.advantage_B.tolist() == pytest.approx(
        [1 / (spread + 1e-4), -1 / (spread + 1e-4), 0, 0, 0, 0]
    )


def test_alone_it_scores_what_its_judge_scores() -> None:
    reward = preference("Level")
    assert reward.scores_alone
    alone, failed = reward.score(squares([3, 255]), ["", ""]).tolist()
    assert alone == 3 and math.isnan(failed)
    assert not preference("Duel").scores_alone


@pytest.mark.parametrize("both", [True, False])
def test_a_picture_that_is_not_finite_meets_nobody(both):
    """It has no value, and nobody gets one for having been shown beside it."""
    reward = preference("Chess", both_orders=both)
    images = squares([9, 255, 4, 6])
    whole = preference("Chess", both_orders=both).score_together(
        images[[0, 2, 3]], ["p"] * 3, place(3, 3)
    )
    images[1] = torch.nan
    value = reward.score_together(images, ["p"] * 4, place(4, 4))
    assert value[1].isnan() and torch.equal(value[[0, 2, 3]], whole)


def test_a_rank_that_asks_nothing_asks_nothing():
    judge = preference("Chess").judge
    none = torch.zeros(0, dtype=torch.int64)
    seen = judge.see(squares([1, 2]), ["p"] * 2)
    assert judge.compare(seen, none, none, []).shape == (0,)
