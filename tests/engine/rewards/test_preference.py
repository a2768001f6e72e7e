"""Pref-GRPO's reward: tournaments, win rates and Bradley-Terry fits, on one rank and on several.

Images here are squares of one brightness, n / 255: a judge reads n.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from gardo import config, plugins
from gardo.algorithms.advantage import AdvantageSettings, group_credit
from gardo.config import check
from gardo.recipe_errors import RecipeError
from gardo.rewards.base import Gathering, Panel, Reward, RewardSettings
from gardo.rewards.bradley_terry import predicted_win_rate, strengths
from gardo.rewards.preference import Preference, PreferenceSettings
from gardo.types import Prompt
from tests import ROOT

CPU = torch.device("cpu")


class Settings(RewardSettings):
    role: Any = "judge"


class Level(Reward):
    """Scores an image by its number; 255 cannot be scored."""

    Settings = Settings

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        value_B = (images_B3HW[:, 0, 0, 0] * 255).round()
        return value_B.where(value_B < 255, torch.nan)


class Duel(Reward):
    """Compares two numbers, and keeps what it was asked."""

    Settings = Settings

    def __init__(self, settings: Any, device: torch.device) -> None:
        super().__init__(settings, device)
        self.asked: list[tuple[int, int, str]] = []
        self.largest_call = 0

    def verdict(self, first: int, second: int) -> float | None:
        return 0.5 + 0.5 * (first > second) - 0.5 * (first < second)

    def compare(self, first_N3HW: Tensor, second_N3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        assert first_N3HW.dtype == torch.float32 and len(first_N3HW) == len(prompts)
        levels = [(x[:, 0, 0, 0] * 255).round().int().tolist() for x in (first_N3HW, second_N3HW)]
        pairs = list(zip(*levels, strict=True))
        self.asked += [(a, b, text) for (a, b), text in zip(pairs, prompts, strict=True)]
        self.largest_call = max(self.largest_call, len(prompts))
        verdicts = [self.verdict(a, b) for a, b in pairs]
        return torch.tensor([math.nan if v is None else v for v in verdicts])


class First(Duel):
    """Always prefers what it sees first."""

    def verdict(self, first: int, second: int) -> float:
        return 1.0


class Leaning(Duel):
    """Half of its answers come from the order, half from the images."""

    def verdict(self, first: int, second: int) -> float:
        return 0.5 + 0.25 * (first > second) + 0.25 * (first == second) / 2


class Mute(Duel):
    """No verdict when 9 is shown first."""

    def verdict(self, first: int, second: int) -> float | None:
        return None if first == 9 else super().verdict(first, second)


class Chess(Duel):
    """A probability: sigmoid of the difference / 10."""

    def verdict(self, first: int, second: int) -> float:
        return float(torch.sigmoid(torch.tensor((first - second) / 10)))


class Loud(Duel):
    def verdict(self, first: int, second: int) -> float:
        return 2.0 * (first > second) - 1


class Neither(Reward):
    Settings = Settings


def preference(judge: str, **more: Any) -> Any:
    """A preference reward; `judge` is a class of this file."""
    kind = f"{__name__}:{judge}"
    settings = PreferenceSettings(
        kind="preference", role="proxy", judge=Settings(kind=kind), **more
    )
    return Preference(settings, CPU)


def squares(levels: Sequence[int]) -> Tensor:
    return (torch.tensor(levels) / 255)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


def place(count: int, group: int, step: int = 3, seed: int = 42) -> Gathering:
    sample_B = torch.arange(count)
    return Gathering(sample_B, sample_B // group, seed, step, lambda tensor: tensor)


def values(reward: Preference, levels: Sequence[int], group: int, step: int = 3) -> list[float]:
    """Values, None where there is none."""
    prompts = [f"prompt {n // group}" for n in range(len(levels))]
    value_B = reward.score_together(squares(levels), prompts, place(len(levels), group, step))
    assert value_B.dtype == torch.float32
    return [None if math.isnan(value) else value for value in value_B.tolist()]


# ---- by hand -------------------------------------------------------------------------------------


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


def test_a_judge_outside_0_and_1_is_told() -> None:
    with pytest.raises(ValueError, match=r"Loud.compare gave the preference -1.0; it must lie in"):
        values(preference("Loud"), [1, 2, 3], 3)


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
    """Over 400 steps. A mean of 2 games out of {0, 1} has a standard deviation of at most 0.5, so
    that of 400 steps 0.025; five times that is never reached by chance."""
    levels = list(range(6))
    reward = preference("Duel", opponents=2)
    seen = torch.tensor([values(reward, levels, 6, step) for step in range(400)])
    assert torch.allclose(seen.mean(0), torch.arange(6) / 5, atol=5 * 0.025)
    assert float(seen.std(0).max()) > 0.1  # and a step alone does not


# ---- ranks ---------------------------------------------------------------------------------------


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
        # images of 3 x 2 x 2 bytes, of the largest number that any rank has in a split group
        travelling = {2: 2, 3: 0, 6: 2}[world]
        assert ranks[0][-1] == [travelling * 12] * world
    else:
        assert ranks[0][-1] == [0] * world


# ---- Bradley-Terry -------------------------------------------------------------------------------


def complete(group: int) -> Tensor:
    return ~torch.eye(group, dtype=torch.bool)[None]


def expected_outcome(theta_PG: Tensor) -> Tensor:
    return torch.sigmoid(theta_PG[:, :, None] - theta_PG[:, None, :])


def test_known_strengths_are_recovered() -> None:
    """The expected outcomes of a tournament have their own strengths as the maximum; a prior of
    standard deviation 100 pulls by 1e-4 of a strength, against a curvature of at least 0.1."""
    theta = torch.tensor([[-1.5, 0.5, 0.0, 2.0, -1.0]], dtype=torch.float64)
    found = strengths(expected_outcome(theta), complete(5), prior=100.0)
    assert torch.allclose(found, theta, atol=2.0 * 1e-4 / 0.1)
    assert torch.allclose(found.sum(1), torch.zeros(1, dtype=torch.float64), atol=1e-9)


def test_two_images_by_hand() -> None:
    """theta = +-t with 1 - sigmoid(2 t) = t / prior^2; for prior 1, t = 0.22269943..."""
    table = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    t = float(strengths(table, complete(2), prior=1.0)[0, 0])
    assert 1 - float(torch.sigmoid(torch.tensor(2 * t, dtype=torch.float64))) == pytest.approx(t)
    assert float(strengths(table, complete(2), prior=1.0)[0, 1]) == pytest.approx(-t)


def random_tables(count: int, group: int, seed: int) -> Tensor:
    """Wins, ties and losses at random, [count, G, G]."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.randint(0, 3, (count, group, group), generator=generator).double() / 2
    return torch.triu(upper, 1) + torch.tril(1 - upper.mT, -1)


def test_order_and_scale_are_the_win_rates_where_all_met() -> None:
    table = random_tables(50, 8, 1)
    win_rate = table.sum(2) / 7
    value = predicted_win_rate(table, complete(8).expand(50, -1, -1), prior=3.0)
    gap, wanted = (x[:, :, None] - x[:, None, :] for x in (value, win_rate))
    assert torch.equal(gap.sign(), torch.where(wanted.abs() > 1e-9, wanted, 0).sign())
    assert bool(((value >= 0) & (value <= 1)).all())
    # at the maximum win_i - sum_j P(i beats j) = theta_i / prior^2, |theta| < 7 here
    theta = strengths(table, complete(8).expand(50, -1, -1), prior=3.0)
    assert torch.allclose(7 * (win_rate - value), theta / 9, atol=1e-6)
    assert float((value - win_rate).abs().max()) < 7 / 9 / 7


@pytest.mark.parametrize("prior", [0.1, 3.0, 10.0])
@pytest.mark.parametrize("kind", ["random", "one beats all", "ladder", "chain", "nobody met"])
def test_the_iterations_suffice(kind: str, prior: float) -> None:
    """The gradient vanishes to rounding: sums of 64 numbers up to 1 or strength / prior^2, fp64."""
    group = 64
    index = torch.arange(group)
    table, valid = random_tables(1, group, 2), complete(group)
    ladder = torch.sign(index[:, None] - index[None]).double()[None] / 2 + 0.5
    if kind == "one beats all":
        table = torch.zeros(1, group, group).double()
        table[0, 0, 1:] = 1
        table[0, 1:, 1:] = 0.5
    elif kind in ("ladder", "chain"):
        table = ladder
    if kind == "chain":
        valid = ((index[:, None] - index[None]).abs() == 1)[None]
    elif kind == "nobody met":
        valid = torch.zeros_like(valid)
    theta = strengths(table, valid, prior)
    gap = torch.where(valid, table - expected_outcome(theta), 0).sum(2) - theta / prior**2
    assert float(gap.abs().max()) < 1e-11
    if kind == "nobody met":
        assert torch.equal(theta, torch.zeros_like(theta))
    if kind in ("ladder", "chain"):
        assert bool((theta.diff() > 0).all())


def test_groups_that_never_met_share_a_mean() -> None:
    """Two pairs: 0 beats 1, 2 and 3 tie. Nothing is known between them: 2 stands in the middle."""
    valid = torch.zeros(1, 4, 4, dtype=torch.bool)
    table = torch.full((1, 4, 4), torch.nan)
    for i, j, p in ((0, 1, 1.0), (2, 3, 0.5)):
        valid[0, i, j] = valid[0, j, i] = True
        table[0, i, j], table[0, j, i] = p, 1 - p
    value = predicted_win_rate(table, valid, prior=3.0)[0]
    assert value.isfinite().all()
    assert float(value[2]) == float(value[3]) == 0.5
    assert float(value[0]) + float(value[1]) == pytest.approx(1)
    assert float(value[0]) > 0.5


def test_strong_opponents_count_for_more() -> None:
    """A ring with few games: each has won one of two, but the one that beat the strongest leads."""
    games = [(0, 1), (1, 2), (2, 0), (0, 3), (0, 4), (5, 0), (6, 4), (3, 6)]
    valid = torch.zeros(1, 7, 7, dtype=torch.bool)
    table = torch.zeros(1, 7, 7)
    for winner, loser in games:
        valid[0, winner, loser] = valid[0, loser, winner] = True
        table[0, winner, loser] = 1
    value = predicted_win_rate(table, valid, prior=3.0)[0]
    win_rate = table.sum(2)[0] / valid.sum(2)[0]
    assert win_rate[2] == win_rate[6] == 0.5
    assert float(value[2]) > float(value[6])  # 2 beat 0, who beats most; 6 beat 4, who beats none


# ---- in the panel, under GARDO, in recipes -------------------------------------------------------


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


def recipe(reward: dict[str, Any], **data: int) -> config.Recipe:
    sections = yaml.safe_load((ROOT / "recipes/tiny_flux_pref.yaml").read_text())
    sections["data"]["prompts"] = str(ROOT / "recipes/tiny_prompts.txt")
    sections["data"] |= data
    sections["rewards"]["count"] = {"kind": "preference", "role": "proxy", **reward}
    return check(sections, "r")


def test_a_judge_has_its_own_settings() -> None:
    made = recipe({"judge": {"kind": "tiny_shape", "floor": -2.0}, "opponents": 4})
    settings: Any = config.reward_settings(made)["count"]
    assert settings.judge.floor == -2.0 and settings.judge.role == "judge"
    reward = config.reward_plugin(settings)(settings, CPU)
    assert type(reward.reward) is plugins.resolve("gardo.rewards", "tiny_shape")


SHAPE = {"kind": "tiny_shape"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, int], str, str]] = {
    "no judge": ({}, {}, "judge.kind: missing", "tiny_shape"),
    "unknown judge": ({"judge": {"kind": "tiny_shpae"}}, {}, "judge.kind: 'tiny_shpae' is none of",
                      "tiny_shape"),
    "unknown field": ({"judge": {"kind": "tiny_shape", "flor": -2.0}}, {}, "judge.flor: unknown",
                      "Did you mean rewards.count.judge.floor?"),
    "role of a judge": ({"judge": {**SHAPE, "role": "proxy"}}, {}, "judge.role: 'proxy'",
                        "'judge'"),
    "preference in preference": ({"judge": {"kind": "preference", "judge": SHAPE}}, {},
                                 "judge.kind: preference judges groups",
                                 "name the judge of images itself"),
    "features": ({"judge": {"kind": "dinov3", "path": "builtin:dinov3"}}, {},
                 "judge.kind: dinov3 gives features", "name a reward that scores images"),
    "neither": ({"judge": {"kind": f"{__name__}:Neither"}}, {}, "judge.kind: ",
                "has neither `compare` nor `score`; write one of them"),
    "a pair judge alone": ({"kind": f"{__name__}:Duel"}, {}, "kind: ",
                           "use kind: preference with judge: {kind: "),
    "margin of a pair judge": ({"judge": {"kind": f"{__name__}:Duel"}, "tie_margin": 0.1}, {},
                               "tie_margin: 0.1", "leave it out"),
    "too many opponents": ({"judge": SHAPE, "opponents": 12}, {},
                           "opponents: 12: a group of 12 has 11 others", "use at most 11"),
    "odd ring": ({"judge": SHAPE, "opponents": 3}, {"images_per_prompt": 9},
                 "opponents: 3: not every one of 9", "use 4"),
    "as features": ({"judge": SHAPE, "role": "features"}, {}, "role: 'features'", "'proxy'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_explained(case: str) -> None:
    reward, data, field, mend = REFUSED[case]
    with pytest.raises(RecipeError) as raised:
        recipe(reward, **data)
    message = str(raised.value)
    assert message.startswith(f"r: rewards.count.{field}") and mend in message, message


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind: preference compares .* is 1; use at least 2"):
        Preference.check(preference("Level").settings, 1)


def test_algorithms_that_need_a_gradient_refuse_it() -> None:
    sections = yaml.safe_load((ROOT / "recipes/tiny_flux_refl.yaml").read_text())
    sections["rewards"]["pref"] = {"kind": "preference", "role": "proxy", "judge": SHAPE}
    with pytest.raises(RecipeError, match=r"rewards\.pref: preference has no gradient"):
        check(sections, "r")


def test_prompts_are_checked_by_the_judge(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a house by the sea\n")
    sections = yaml.safe_load((ROOT / "recipes/tiny_flux_pref.yaml").read_text())
    sections["data"]["prompts"] = str(tmp_path / "prompts.txt")
    sections["rewards"] = {
        "pref": {"kind": "preference", "role": "proxy", "judge": SHAPE},
        "again": {"kind": f"{__name__}:Level", "role": "auxiliary"},
        "dinov3": sections["rewards"]["dinov3"],
    }
    with pytest.raises(RecipeError, match=r"prompt 1: .*\(rewards\.pref\.judge\)"):
        check(sections, "r")
