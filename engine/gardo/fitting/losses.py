"""The losses that heads are fitted by, each with the probability that it gives a pair.

P(first) counts half a tie. Of `margin`, which is no probability, it is Bradley-Terry's.

Shapes: K heads, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gardo.rewards import preference_losses as of_pairs
from gardo.rewards._heads import log_sigma


@dataclass(frozen=True)
class Verdicts:
    """What was said of the pairs."""

    preferred_N: Tensor  # fp64, P(first)
    tied_N: Tensor  # bool
    margin_N: Tensor  # fp64

    def of(self, pairs: Tensor) -> Verdicts:
        return Verdicts(self.preferred_N[pairs], self.tied_N[pairs], self.margin_N[pairs])


@dataclass(frozen=True)
class Said:
    """What the heads say: their outputs of both pictures, [K, O, N]; eta of ties, [K, 1]."""

    first: Tensor
    second: Tensor
    eta: Tensor

    def mean(self) -> Said:
        """Of one head that says the mean of all: what the reward gives."""
        return Said(*(x.mean(0, keepdim=True) for x in (self.first, self.second, self.eta)))


@dataclass(frozen=True)
class PairLoss:
    loss: Callable[[Said, Verdicts], Tensor]  # [K, N]
    first: Callable[[Said], Tensor]  # P(first), [K, N]


def _ahead(said: Said) -> Tensor:
    return said.first[:, 0] - said.second[:, 0]


def _ties(said: Said, verdicts: Verdicts) -> Tensor:
    first, second = said.first[:, 0], said.second[:, 0]
    return of_pairs.ties(first, second, verdicts.preferred_N, verdicts.tied_N, said.eta)


def _first_or_half_a_tie(said: Said) -> Tensor:
    won, lost = (torch.sigmoid(sign * _ahead(said) - said.eta) for sign in (1, -1))
    return (1 + won - lost) / 2


def _sigmas(said: Said) -> tuple[Tensor, Tensor]:
    return log_sigma(said.first[:, 1]).exp(), log_sigma(said.second[:, 1]).exp()


LOSSES: dict[str, PairLoss] = {
    "bradley_terry": PairLoss(
        lambda s, v: of_pairs.bradley_terry(s.first[:, 0], s.second[:, 0], v.preferred_N),
        lambda s: torch.sigmoid(_ahead(s)),
    ),
    "ties": PairLoss(_ties, _first_or_half_a_tie),
    "margin": PairLoss(
        lambda s, v: of_pairs.margin(s.first[:, 0], s.second[:, 0], v.preferred_N, v.margin_N),
        lambda s: torch.sigmoid(_ahead(s)),
    ),
    "uncertainty": PairLoss(
        lambda s, v: of_pairs.uncertainty(
            s.first[:, 0], s.second[:, 0], v.preferred_N, *_sigmas(s)
        ),
        lambda s: torch.special.ndtr(_ahead(s) / torch.hypot(*_sigmas(s))),
    ),
}
