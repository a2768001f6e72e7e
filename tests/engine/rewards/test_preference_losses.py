"""Losses of pairs: values by hand, gradients, and what must hold of a log-probability."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gardo.rewards import preference_losses as losses

ETA, MARGIN = 0.4, 0.7
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(like: Tensor, value: float) -> Tensor:
    return torch.full_like(like, value)


LOSSES: dict[str, Loss] = {
    "bradley_terry": losses.bradley_terry,
    "ties": lambda a, b, p: losses.ties(a, b, p, torch.zeros(len(a), dtype=torch.bool), ETA),
    "tied": lambda a, b, p: losses.ties(a, b, p, torch.ones(len(a), dtype=torch.bool), ETA),
    "margin": lambda a, b, p: losses.margin(a, b, p, full(a, MARGIN)),
    "uncertainty": lambda a, b, p: losses.uncertainty(a, b, p, full(a, 0.6), full(b, 0.8)),
}
each = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def pairs(count: int = 7, seed: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first_N, second_N = torch.randn(2, count, generator=generator, dtype=torch.float64) * 2
    return first_N, second_N, torch.rand(count, generator=generator, dtype=torch.float64)


def one(*values: float) -> list[Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def test_bradley_terry_by_hand():
    assert losses.bradley_terry(*one(2.0, 0.5, 1.0)).item() == pytest.approx(
        -math.log(sigmoid(1.5))
    )
    soft = -0.7 * math.log(sigmoid(1.5)) - 0.3 * math.log(sigmoid(-1.5))
    assert losses.bradley_terry(*one(2.0, 0.5, 0.7)).item() == pytest.approx(soft)
    assert losses.bradley_terry(*one(1.0, 1.0, 0.2)).item() == pytest.approx(math.log(2))


def test_ties_by_hand_in_rao_and_kuppers_own_terms():
    """pi_i / (pi_i + theta pi_j), and what is left."""
    first, second, theta = math.exp(1.2), math.exp(0.3), math.exp(ETA)
    won = first / (first + theta * second)
    lost = second / (second + theta * first)
    values = one(1.2, 0.3)
    for tied, p, expected in ((False, 1.0, won), (False, 0.0, lost), (True, 0.5, 1 - won - lost)):
        said = losses.ties(*values, *one(p), torch.tensor([tied]), ETA).item()
        assert said == pytest.approx(-math.log(expected))


def test_the_margin_by_hand():
    assert losses.margin(*one(2.0, 0.5, 1.0, MARGIN)).item() == pytest.approx(
        -math.log(sigmoid(1.5 - MARGIN))
    )
    assert losses.margin(*one(2.0, 0.5, 0.0, MARGIN)).item() == pytest.approx(
        -math.log(sigmoid(-1.5 - MARGIN))
    )


def test_uncertainty_by_hand():
    z = (2.0 - 0.5) / math.sqrt(0.6**2 + 0.8**2)
    assert losses.uncertainty(*one(2.0, 0.5, 1.0, 0.6, 0.8)).item() == pytest.approx(
        -math.log(phi(z))
    )
    assert losses.uncertainty(*one(2.0, 0.5, 0.0, 0.6, 0.8)).item() == pytest.approx(
        -math.log(phi(-z))
    )


def test_uncertainty_is_how_often_a_drawn_reward_is_above_the_other():
    generator = torch.Generator().manual_seed(5)
    first, second = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    share = ((1.0 + 0.5 * first) > (0.4 + 1.2 * second)).double().mean().item()
    said = losses.uncertainty(*one(1.0, 0.4, 1.0, 0.5, 1.2)).item()
    assert math.exp(-said) == pytest.approx(share, abs=4 * 0.5 / 400_000**0.5)


@each
def test_gradients(loss: Loss):
    first_N, second_N, p_N = pairs()
    assert torch.autograd.gradcheck(
        lambda a, b: loss(a, b, p_N), (first_N.requires_grad_(), second_N.requires_grad_())
    )


def test_gradients_of_what_else_is_learnt():
    first_N, second_N, p_N = pairs()
    tied_N = torch.tensor([True, False] * 3 + [True])
    eta = torch.tensor(ETA, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda eta: losses.ties(first_N, second_N, p_N, tied_N, eta), (eta,)
    )
    sigma_N = (0.3 + pairs(seed=8)[2]).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: losses.uncertainty(first_N, second_N, p_N, s, s.flip(0)), (sigma_N,)
    )


@each
def test_an_exchange_of_the_two_changes_nothing(loss: Loss):
    first_N, second_N, p_N = pairs()
    assert torch.allclose(loss(first_N, second_N, p_N), loss(second_N, first_N, 1 - p_N))


@each
def test_only_the_difference_counts(loss: Loss):
    first_N, second_N, p_N = pairs()
    assert torch.allclose(loss(first_N, second_N, p_N), loss(first_N + 5, second_N + 5, p_N))


@each
def test_convex_in_the_difference(loss: Loss):
    ahead_N = torch.linspace(-12, 12, 241, dtype=torch.float64)
    for p in (0.0, 0.3, 0.5, 1.0):
        value_N = loss(ahead_N, torch.zeros_like(ahead_N), full(ahead_N, p))
        assert float((value_N[2:] - 2 * value_N[1:-1] + value_N[:-2]).min()) > -1e-12


@each
def test_one_pair_one_loss_in_the_dtype_of_the_rewards(loss: Loss):
    values = [value.float() for value in pairs(5)]
    said = loss(*values)
    assert said.shape == (5,) and said.dtype == torch.float32
    assert torch.allclose(said.double(), loss(*[v.double() for v in values]), rtol=1e-5)


@each
def test_far_apart_is_finite(loss: Loss):
    first_N = torch.tensor([-300.0, -40.0, 40.0, 300.0], dtype=torch.float64).requires_grad_()
    for p in (0.0, 1.0):
        value_N = loss(first_N, torch.zeros(4, dtype=torch.float64), torch.full((4,), p))
        (gradient_N,) = torch.autograd.grad(value_N.sum(), first_N)
        assert value_N.isfinite().all() and gradient_N.isfinite().all()


def test_the_three_verdicts_sum_to_one():
    first_N, second_N, _ = pairs(50)
    no, yes = torch.zeros(50, dtype=torch.bool), torch.ones(50, dtype=torch.bool)
    for eta in (1e-3, 0.4, 3.0):
        of = [
            losses.ties(first_N, second_N, torch.full((50,), p, dtype=torch.float64), tied, eta)
            for p, tied in ((1.0, no), (0.0, no), (0.5, yes))
        ]
        assert torch.allclose(sum((-value).exp() for value in of), torch.ones_like(first_N))  # type: ignore[arg-type]


def test_the_limits_are_bradley_terry():
    """No width of ties, and no margin."""
    first_N, second_N, p_N = pairs(50)
    plain = losses.bradley_terry(first_N, second_N, p_N)
    no = torch.zeros(50, dtype=torch.bool)
    assert torch.allclose(losses.ties(first_N, second_N, p_N, no, 1e-12), plain)
    assert torch.allclose(losses.margin(first_N, second_N, p_N, torch.zeros_like(p_N)), plain)


def test_a_tie_pulls_together_and_sigma_forgives():
    tied = torch.tensor([True])
    near, far = (losses.ties(*one(d, 0.0, 0.5), tied, ETA).item() for d in (0.1, 2.0))
    assert near < far
    sure, unsure = (losses.uncertainty(*one(-1.0, 1.0, 1.0, s, s)).item() for s in (0.5, 5.0))
    assert unsure < sure  # of a wrong pair, the one that was less sure pays less
