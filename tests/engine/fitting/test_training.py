"""The heads and their fit: against heads alone, a known reward, the prior where nothing is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.fitting.losses import LOSSES, Said, Verdicts
from gardo.fitting.training import PRIOR, drawn, fit, prior_of, resamples
from gardo.rewards._heads import Heads, filled, log_sigma

WIDTH, COUNT = 6, 300


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(seed: int = 0, noise: bool = True) -> tuple[Tensor, Tensor, Tensor, Verdicts]:
    """Features, of which only the first three vary, and verdicts by a linear reward of two."""
    features_MW = torch.randn(2 * COUNT, WIDTH, generator=generator(seed), dtype=torch.float64)
    features_MW[:, 3:] = 0.0
    reward_M = 2 * features_MW[:, 0] - features_MW[:, 1]
    first_N, second_N = torch.arange(COUNT), torch.arange(COUNT, 2 * COUNT)
    ahead_N = reward_M[first_N] - reward_M[second_N]
    draw_N = torch.rand(COUNT, generator=generator(seed + 1), dtype=torch.float64)
    won_N = draw_N < torch.sigmoid(ahead_N) if noise else ahead_N > 0
    verdicts = Verdicts(won_N.double(), ahead_N.abs() < 0.4, ahead_N.abs() / 4)
    return features_MW, first_N, second_N, verdicts


def fitted(loss: str = "bradley_terry", *, hidden: int = 0, heads: int = 4, seed: int = 0) -> Any:
    features_MW, first_N, second_N, verdicts = problem()
    units = [f"p{i % 40}" for i in range(COUNT)]
    outputs = 2 if loss == "uncertainty" else 1
    return fit(
        features_MW, first_N, second_N, verdicts, units, LOSSES[loss],
        heads=heads, hidden=hidden, outputs=outputs, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("hidden", [0, 5])
def test_each_head_is_a_net_of_its_own(hidden: int):
    heads = drawn(3, torch.randn(50, WIDTH, generator=generator()).double(), hidden, 2, generator())
    features_BW = torch.randn(7, WIDTH, generator=generator(1)).double()
    out_KOB = heads.outputs(heads.standardised(features_BW))
    for k in range(3):
        x_BW = (features_BW - heads.mean) / heads.deviation
        if hidden:
            x_BW = F.gelu(F.linear(x_BW, heads.hidden_weight[k], heads.hidden_bias[k]))
        alone = F.linear(x_BW, heads.weight[k], heads.bias[k])
        assert torch.allclose(out_KOB[k], alone.T)
    assert torch.equal(heads(features_BW), out_KOB[:, 0])


def test_log_sigma_is_itself_near_zero_and_bounded():
    out = torch.tensor([-1e6, -0.01, 0.0, 0.01, 1e6], dtype=torch.float64)
    assert torch.allclose(log_sigma(out), torch.tensor([-4, -0.01, 0, 0.01, 4]).double(), atol=1e-6)


def test_the_prior_is_of_its_width_and_linear_heads_cancel():
    features_MW = torch.randn(400, 64, generator=generator()).double()
    heads = drawn(200, features_MW, 0, 1, generator())
    assert heads(features_MW).std().item() == pytest.approx(PRIOR, rel=0.05)
    assert float(heads(features_MW).mean(0).abs().max().detach()) < 1e-12
    deep = drawn(200, features_MW, 32, 1, generator())
    assert 0.2 * PRIOR < deep(features_MW).std(0).mean().item() < 2 * PRIOR


@pytest.mark.parametrize(("prompts", "whole"), [(40, True), (3, False)])
def test_resamples_draw_whole_prompts_where_there_are_enough(prompts: int, whole: bool):
    units = [f"p{i % prompts}" for i in range(120)]
    count_KN = resamples(units, 5, generator())
    by_prompt = count_KN.view(5, -1, prompts)
    assert bool((by_prompt == by_prompt[:, :1]).all()) == whole
    assert count_KN.shape == (5, 120) and bool((count_KN.sum(1) > 60).all())
    left_out = (count_KN == 0).double().mean().item()
    assert left_out == pytest.approx(0.368, abs=0.1)
    assert len(set(map(tuple, count_KN.tolist()))) == 5


def test_the_direction_is_found_by_every_loss():
    features_MW, *_ = problem()
    reward_M = 2 * features_MW[:, 0] - features_MW[:, 1]
    for loss in LOSSES:
        said_KM = fitted(loss).heads(features_MW).detach()
        for said_M in (*said_KM, said_KM.mean(0)):
            correlation = torch.corrcoef(torch.stack([said_M, reward_M]))[0, 1].item()
            assert correlation > 0.95, loss
        assert abs(said_KM.mean().item()) < 1e-9  # the mean picture is 0


def test_a_hidden_layer_learns_it_too():
    features_MW, *_ = problem()
    said_M = fitted(hidden=8).heads(features_MW).detach().mean(0)
    reward_M = 2 * features_MW[:, 0] - features_MW[:, 1]
    assert torch.corrcoef(torch.stack([said_M, reward_M]))[0, 1].item() > 0.9


def test_scores_are_log_odds():
    """Verdicts were drawn with the sigmoid of the reward: its own scale is the best one."""
    weight_W = (fitted().heads.weight.detach().mean(0)[0] / fitted().heads.deviation)[:2]
    assert torch.allclose(weight_W, torch.tensor([2.0, -1.0]).double(), atol=0.5)


def test_where_nothing_varied_heads_keep_their_own_guess():
    """Their mean has none: its weight is 0, as is what the pairs say."""
    heads = fitted(heads=4).heads
    alone = drawn(4, problem()[0][torch.arange(2 * COUNT)], 0, 1, generator())
    unseen = heads.weight[:, 0, 3:]
    assert torch.allclose(unseen, alone.weight[:, 0, 3:], atol=1e-9)
    assert float(unseen.mean(0).abs().max()) < 1e-9
    assert float(unseen.std(0).mean()) > 0.3 * prior_of(heads)
    seen = heads.weight[:, 0, :2].std(0)
    assert float(seen.max()) < float(unseen.std(0).mean())


def test_the_same_seed_is_the_same_bits_and_another_is_not():
    one, two, other = (fitted(seed=seed).heads.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["weight"], other["weight"])


def test_the_width_of_ties_is_learnt():
    features_MW, first_N, second_N, verdicts = problem()
    found = fitted("ties")
    said = found.said(found.heads.standardised(features_MW), first_N, second_N)
    ahead_KN = said.first[:, 0] - said.second[:, 0]
    share_K = verdicts.tied_N.double().mean()
    likely_K = (1 - sum(torch.sigmoid(s * ahead_KN - said.eta) for s in (1, -1))).mean(1)
    assert torch.allclose(likely_K, share_K.expand(4), atol=0.08)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_probability_is_that_of_the_loss(loss: str):
    """exp(-loss) of a win; half of what is left over is a tie."""
    out = torch.randn(2, 3, 2, 9, generator=generator(5), dtype=torch.float64)
    said = Said(out[0], out[1], torch.full((3, 1), 0.3, dtype=torch.float64))
    no = torch.zeros(9, dtype=torch.bool)
    won, lost = (
        (-LOSSES[loss].loss(said, Verdicts(torch.full((9,), p).double(), no, torch.zeros(9)))).exp()
        for p in (1.0, 0.0)
    )
    assert torch.allclose(LOSSES[loss].first(said), won + (1 - won - lost) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": None}, "lacks weight"),
        ({"other": torch.zeros(1)}, "also has other"),
        (
            {"bias": torch.zeros(3, 1)},
            r"bias has the shape \[3, 1\], its description",
        ),
        ({"mean": torch.full((WIDTH,), torch.nan)}, "mean is not finite"),
    ],
)
def test_tensors_of_other_heads_are_refused(change: dict[str, Any], message: str):
    state = {**Heads(2, WIDTH, 0).state_dict(), **change}
    with pytest.raises(ValueError, match=message):
        filled(Heads(2, WIDTH, 0), {n: value for n, value in state.items() if value is not None})
