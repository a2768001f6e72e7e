"""The heads' fit: K of them at once, on all pairs, by L-BFGS in float64 on the CPU.

    minimise over each head k   sum_n c_kn loss_kn + |w_k - a_k|^2 / (2 prior^2)

c_k counts how often a bootstrap resample drew pair n; a_k is drawn from the prior, and w_k starts
there. So heads agree where the pairs say what is good, and keep their own guess where no picture of
the fit was: anchored ensembles (Pearce et al., arXiv 1810.05546). Linear heads' a_k sum to zero, so
their mean has no guess of its own. A head stops where its loss on the pairs that its resample left
out is lowest. Resamples draw whole prompts, pairs where there are fewer than LEAST prompts.

The prior: an output on standardised features is about PRIOR log-odds. Deterministic: the draws are
of the seed, the sums in one order.

Shapes: M rows of features (a picture and its prompt), W their width, K heads, N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gardo.fitting.losses import PairLoss, Said, Verdicts
from gardo.rewards._heads import Heads

PRIOR = 2.0
LEAST = 10  # prompts that are drawn
STEPS = 300
PATIENCE = 25  # steps without a better head
FLAT = 1e-6  # a feature that varies less has nothing to say


class Ensemble:
    """Heads with the one number that only the fit needs: how wide ties are."""

    def __init__(self, heads: Heads, count: int) -> None:
        self.heads = heads
        self.raw_eta_K1 = torch.zeros(count, 1, dtype=torch.float64)

    def said(self, features_MW: Tensor, first_N: Tensor, second_N: Tensor) -> Said:
        """`features_MW` are standardised."""
        out_KOM = self.heads.outputs(features_MW)
        eta_K1 = torch.nn.functional.softplus(self.raw_eta_K1) + 1e-6
        return Said(out_KOM[..., first_N], out_KOM[..., second_N], eta_K1)

    def parameters(self) -> list[Tensor]:
        return [*self.heads.parameters(), self.raw_eta_K1]


def fit(
    features_MW: Tensor,
    first_N: Tensor,
    second_N: Tensor,
    verdicts: Verdicts,
    units: Sequence[str],
    loss: PairLoss,
    *,
    heads: int,
    hidden: int,
    outputs: int,
    seed: int,
) -> Ensemble:
    """The heads, float64, fitted to the pairs of rows (`first_N`, `second_N`).

    `units`: what a pair is drawn with, its prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.cat([first_N, second_N]).unique()
    found = Ensemble(drawn(heads, features_MW[rows].double(), hidden, outputs, generator), heads)
    count_KN = resamples(units, heads, generator)
    known_MW = found.heads.standardised(features_MW.double())
    _minimise(found, known_MW, (first_N, second_N), verdicts, loss, count_KN)
    with torch.no_grad():  # the mean picture is 0: only differences were fitted
        found.heads.bias[:, 0] -= found.heads.outputs(known_MW[rows])[:, 0].mean(1)
    return found


def drawn(
    count: int, features_MW: Tensor, hidden: int, outputs: int, generator: torch.Generator
) -> Heads:
    """Heads of the prior, that standardise by these features."""
    heads = Heads(count, features_MW.shape[1], hidden, outputs).double()
    heads.mean.copy_(features_MW.mean(0))
    deviation_W = features_MW.std(0)
    heads.deviation.copy_(torch.where(deviation_W > FLAT, deviation_W, 1.0))

    def normal(like: Tensor, std: float) -> Tensor:
        return std * torch.randn(like.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        if hidden:
            heads.hidden_weight.copy_(normal(heads.hidden_weight, heads.width**-0.5))
            heads.hidden_bias.copy_(normal(heads.hidden_bias, 0.5))
        weight = normal(heads.weight, prior_of(heads))
        if not hidden:  # their mean guesses nothing, and each is as far from it as before
            weight = (weight - weight.mean(0)) * (count / max(1, count - 1)) ** 0.5
        heads.weight.copy_(weight)
        heads.weight[:, 1:] = 0.0  # log sigma: all pictures alike
    return heads


def prior_of(heads: Heads) -> float:
    """Standard deviation of a last weight."""
    return float(PRIOR / heads.weight.shape[-1] ** 0.5)


def resamples(units: Sequence[str], heads: int, generator: torch.Generator) -> Tensor:
    """[K, N] fp64: how often each head's bootstrap resample has each pair."""
    names = list(dict.fromkeys(units))
    if len(names) < LEAST:
        unit_N = torch.arange(len(units))
    else:
        at = {name: i for i, name in enumerate(names)}
        unit_N = torch.tensor([at[name] for name in units])
    total = int(unit_N.max()) + 1
    drawn_KU = torch.randint(total, (heads, total), generator=generator)
    count_KU = torch.zeros(heads, total, dtype=torch.float64)
    return count_KU.scatter_add(1, drawn_KU, torch.ones_like(count_KU))[:, unit_N]


def _minimise(
    found: Ensemble,
    features_MW: Tensor,
    rows: tuple[Tensor, Tensor],
    verdicts: Verdicts,
    loss: PairLoss,
    count_KN: Tensor,
) -> None:
    """Moves the parameters to those of each head's best step."""
    parameters = found.parameters()
    anchors = [p.detach().clone() for p in parameters]
    stds = [_prior_std(name, found.heads) for name, _ in found.heads.named_parameters()] + [1.0]
    out_KN = (count_KN == 0).double()
    out_KN = torch.where(out_KN.any(1, keepdim=True), out_KN, 1.0)  # a resample that has all
    for parameter in parameters:
        parameter.requires_grad_()

    def closure() -> float:
        optimiser.zero_grad()
        value_KN = loss.loss(found.said(features_MW, *rows), verdicts)
        prior = sum(
            ((p - a) ** 2).sum() / (2 * std**2)
            for p, a, std in zip(parameters, anchors, stds, strict=True)
        )
        total = ((count_KN * value_KN).sum() + prior) / len(verdicts.preferred_N)
        total.backward()  # type: ignore[no-untyped-call]
        return float(total.detach())

    optimiser = torch.optim.LBFGS(  # max_eval: of one line search
        parameters, max_iter=1, max_eval=25, history_size=20, line_search_fn="strong_wolfe"
    )
    best_K = torch.full((len(count_KN),), torch.inf, dtype=torch.float64)
    best = [p.detach().clone() for p in parameters]
    waited = 0
    for _ in range(STEPS):
        optimiser.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            value_KN = loss.loss(found.said(features_MW, *rows), verdicts)
            left_out_K = (out_KN * value_KN).sum(1) / out_KN.sum(1)
            better_K = left_out_K < best_K - 1e-6
            best_K = torch.where(better_K, left_out_K, best_K)
            for kept, p in zip(best, parameters, strict=True):
                kept[better_K] = p[better_K]
        waited = 0 if better_K.any() else waited + 1
        if waited == PATIENCE:
            break
    with torch.no_grad():
        for kept, p in zip(best, parameters, strict=True):
            p.requires_grad_(False).copy_(kept)


def _prior_std(name: str, heads: Heads) -> float:
    if name == "weight":
        return prior_of(heads)
    return heads.width**-0.5 if name == "hidden_weight" else 0.5
