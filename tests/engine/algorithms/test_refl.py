"""ReFL: which step it trains, its formula, its gradient."""

import pytest
import torch

from gardo.algorithms.refl import ReFL, ReFLSettings
from gardo.types import Batch, Points
from tests.engine.algorithms.linear_policy import (
    SEED,
    LinearPolicy,
    Stated,
    build,
    context,
    recorded_velocity,
    roll,
    scores_of,
    whole,
)


@pytest.mark.parametrize(
    ("steps", "late"), [(40, range(30, 40)), (8, range(6, 8)), (4, [3]), (2, [1])]
)
def test_refl_trains_one_late_step_the_same_on_all_ranks(steps, late):
    here, there = (build(ReFL, ReFLSettings(), steps=steps) for _ in range(2))
    drawn = []
    for step in range(80):
        (record,) = here.plan(step).record
        assert there.plan(step).record == (record,)
        drawn.append(record)
    assert set(drawn) == set(late)
    if len(late) > 1:
        other = build(ReFL, ReFLSettings(), steps=steps, seed=SEED + 1)
        assert [other.plan(step).record[0] for step in range(80)] != drawn
    assert ReFL.rows_per_sample(ReFLSettings(), here.world.sampler) == 1


def test_refl_halves_see_the_same_step_and_states():
    algorithm = build(ReFL, ReFLSettings(), steps=8)
    both = roll(LinearPolicy(), algorithm)
    halves = [roll(LinearPolicy(), algorithm, first=f, count=c) for f, c in ((0, 3), (3, 5))]
    assert [h.step_T.tolist() for h in halves] == [both.step_T.tolist()] * 2
    states = torch.cat([algorithm.points(h, None).x_RX for h in halves])
    torch.testing.assert_close(states, algorithm.points(both, None).x_RX, rtol=1e-5, atol=1e-5)


def test_refl_formula_and_margin():
    mean, std = 0.1671736, 1.0333395
    # Standardised rewards 0, 1 and 3: distances to the margin 2, 1 and none.
    ctx = Stated(torch.zeros(3, 2), torch.tensor([mean, mean + std, mean + 3 * std]))
    index = torch.zeros(3, dtype=torch.int64)
    points = Points(
        sample_R=index, prompt_R=index, step_R=index, sigma_R=torch.ones(3), x_RX=torch.ones(3, 2),
        extra={"sigma": torch.ones(3)},
    )  # fmt: skip
    batch = Batch(
        points=points, advantage_R=torch.zeros(3), gate_R=index.bool(), kl_weight_R=torch.zeros(3),
        rollout=None,
    )  # fmt: skip
    loss, metrics = build(ReFL, ReFLSettings()).loss(ctx, batch)
    assert loss.item() == pytest.approx(1e-3 * (2 + 1 + 0) / 3, rel=1e-5)
    assert metrics["reward_x0"] == pytest.approx(mean + 4 / 3 * std, rel=1e-6)
    loss.backward()
    slope = -1e-3 / 3 / std
    assert ctx.rewards.grad.tolist() == pytest.approx([slope, slope, 0.0], rel=1e-5)
    settings = ReFLSettings(weight=2.0, margin=3.5, reward_mean=0.0, reward_std=0.5)
    loss, _ = build(ReFL, settings).loss(ctx, batch)
    by_hand = torch.relu(3.5 - ctx.rewards / 0.5).mean() * 2
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_refl_gradient_goes_through_decoder_and_reward():
    algorithm = build(ReFL, ReFLSettings(), steps=8)
    policy = LinearPolicy()
    rollout = roll(policy, algorithm)
    credit = algorithm.credit(scores_of(rollout))
    assert not credit.advantage_B.any() and not credit.gate_B.any()
    batch = whole(algorithm.points(rollout, credit), credit, rollout)
    loss, _ = algorithm.loss(context(policy), batch)
    loss.backward()

    velocity, twin = recorded_velocity(policy, rollout)
    sigma = rollout.transitions.column("sigma")[rollout.step_T].double()
    x0 = rollout.state_BTX[:, 0].double() - sigma * velocity[:, 0]
    reward = context(twin).score(twin.decode(x0), batch)
    exact = 1e-3 * torch.relu(2 - (reward - 0.1671736) / 1.0333395).mean()
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    gradient = twin.net.weight.grad
    assert gradient.abs().max() > 1e-6
    torch.testing.assert_close(policy.net.weight.grad.double(), gradient, rtol=1e-3, atol=1e-9)

    with torch.no_grad():
        policy.decoder.weight.zero_()
    policy.zero_grad()
    algorithm.loss(context(policy), batch)[0].backward()
    assert not policy.net.weight.grad.any(), "a gradient that does not pass the decoder"
