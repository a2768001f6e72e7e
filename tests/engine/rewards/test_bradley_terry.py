"""Bradley-Terry fits: known strengths, few games, groups that never met."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gardo.rewards.bradley_terry import predicted_win_rate, strengths


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
