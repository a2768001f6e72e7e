"""The KL that is taken from the reward, and several proxies together."""

import dataclasses

import pytest
import torch

from gardo.algorithms.advantage import AdvantageSettings, group_credit
from gardo.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from gardo.algorithms.gardo import Gardo, GardoSettings, GateSettings
from gardo.types import Metrics, Scores
from tests.engine.algorithms.linear_policy import (
    COUNT,
    STEP,
    LinearPolicy,
    build,
    context,
    nudge,
    roll,
    scores_of,
    whole,
)


def drifted(algorithm, size=0.3):
    """A rollout of changed weights, with what the first ones say at its states."""
    policy, start = LinearPolicy(), LinearPolicy()
    nudge(policy, size)
    rollout = roll(policy, algorithm)
    conditioning = {n: tensor[rollout.prompt_B] for n, tensor in rollout.conditioning.items()}
    sigma_T = rollout.transitions.column("sigma")[rollout.step_T]
    said = [
        start.velocity(rollout.state_BTX[:, i], sigma.expand(COUNT), conditioning).detach()
        for i, sigma in enumerate(sigma_T)
    ]
    return policy, dataclasses.replace(rollout, velocities={"reference": torch.stack(said, 1)})


@pytest.mark.parametrize("kl", ["flow_grpo", "gaussian", "velocity"])
def test_it_is_the_sum_of_the_steps_kls(kl):
    algorithm = build(FlowGRPO, FlowGRPOSettings(kl_in_reward=0.1, kl=kl))
    _, rollout = drifted(algorithm)
    table = {n: rollout.transitions.column(n)[:3].double() for n in ("B", "std", "dt")}
    difference = (rollout.velocity_BTX - rollout.velocities["reference"]).double()
    if kl == "velocity":
        steps_BT = difference.square().mean((2, 3))
    else:  # of the two Gaussians; Flow-GRPO's leaves out sqrt(-dt) in the std
        means = table["B"][:, None, None] * difference
        variance = table["std"] ** 2 / (-table["dt"] if kl == "flow_grpo" else 1)
        steps_BT = means.square().mean((2, 3)) / (2 * variance)
    expected = steps_BT.sum(1)
    assert expected.min() > 0
    torch.testing.assert_close(
        algorithm.trajectory_kl(rollout).double(), expected, rtol=1e-5, atol=0
    )


def test_it_lowers_the_reward_before_advantages():
    settings = FlowGRPOSettings(
        kl_in_reward=0.5, kl="velocity", advantage=AdvantageSettings(std="none")
    )
    algorithm = build(FlowGRPO, settings)
    _, rollout = drifted(algorithm)
    kl_B = torch.tensor([0.4, 0.0, 0.2, 0.2, 1.0, 0.0, 0.0, 0.0])
    scores = dataclasses.replace(scores_of(rollout), kl_B=kl_B)
    # [.1 .4 .4 .9] - [.2 0 .1 .1] has mean .35; [.5 .2 .8 .3] - [.5 0 0 0] has mean .325
    expected = [-0.45, 0.05, -0.05, 0.45, -0.325, -0.125, 0.475, -0.025]
    credit = algorithm.credit(scores)
    assert credit.advantage_B.tolist() == pytest.approx(expected, abs=1e-6)
    assert credit.info["kl_in_reward"] == pytest.approx(1.8 / 8)
    assert not credit.gate_B.any(), "there is no KL in the loss"
    assert torch.equal(scores.proxy_B, scores_of(rollout).proxy_B)


def test_the_reference_is_asked_where_it_is_not_the_sampler():
    algorithm = build(FlowGRPO, FlowGRPOSettings(kl_in_reward=0.1))
    assert algorithm.slots == ("reference",) and not algorithm.has_kl
    assert algorithm.plan(STEP).teachers == ()
    rollout = roll(LinearPolicy(), algorithm)
    assert torch.equal(algorithm.trajectory_kl(rollout), torch.zeros(COUNT))
    algorithm.after_step(None, Metrics())
    assert algorithm.plan(STEP).teachers == ("reference",)
    algorithm.reference_reset()
    assert algorithm.plan(STEP).teachers == ()
    without = build(FlowGRPO, FlowGRPOSettings(beta=0.1))
    without.after_step(None, Metrics())
    assert without.plan(STEP).teachers == () and without.trajectory_kl(rollout) is None


def test_a_kl_in_the_loss_uses_the_same_velocities():
    algorithm = build(FlowGRPO, FlowGRPOSettings(kl_in_reward=0.1, beta=2.0, kl="velocity"))
    algorithm.after_step(None, Metrics())
    policy, rollout = drifted(algorithm)
    scores = dataclasses.replace(scores_of(rollout), kl_B=algorithm.trajectory_kl(rollout))
    credit = algorithm.credit(scores)
    points = algorithm.points(rollout, credit)
    assert algorithm.teachers(points, credit) == {}
    _, metrics = algorithm.loss(context(policy), whole(points, credit, rollout))
    # On policy, the mean over rows of the steps' squared errors: a third of their sum.
    assert metrics["kl"] == pytest.approx(float(scores.kl_B.mean()) / 3, rel=1e-4)


def test_gardo_passes_it_on_and_gates_by_the_reward_itself():
    base = FlowGRPOSettings(kl_in_reward=0.5, beta=0.1)
    algorithm = build(FlowGRPO, base)
    settings = GardoSettings(base=base, gate=GateSettings(fraction=0.2))
    wrapper = Gardo(settings, algorithm.world)
    _, rollout = drifted(algorithm)
    kl_B = wrapper.trajectory_kl(rollout)
    assert torch.equal(kl_B, algorithm.trajectory_kl(rollout)) and kl_B.any()
    scores = scores_of(rollout)
    judge = {"judge": scores.proxy_B.flip(0)}
    free = dataclasses.replace(scores, rewards=judge, auxiliaries=("judge",))
    paid = dataclasses.replace(free, kl_B=1000 * kl_B)
    assert torch.equal(wrapper.credit(free).gate_B, wrapper.credit(paid).gate_B)
    assert not torch.equal(wrapper.credit(free).advantage_B, wrapper.credit(paid).advantage_B)


def test_it_needs_one_reward():
    with pytest.raises(ValueError, match="use combine: score, or beta"):
        FlowGRPOSettings(kl_in_reward=0.1, advantage=AdvantageSettings(combine="advantage"))


# ---- several proxies --------------------------------------------------------------------------

# Two groups of two and three; `large` is on another scale than `small`.
SMALL = torch.tensor([0.0, 1.0, 0.0, 0.0, 3.0], dtype=torch.float64)
LARGE = torch.tensor([30.0, 10.0, 0.0, 60.0, 30.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 1, 1, 1])


def two_proxies(valid=(True,) * 5):
    valid_B = torch.tensor(valid)
    rewards = {"small": SMALL.float(), "large": LARGE.float(), "held_out": -LARGE.float()}
    return Scores(
        sample_B=torch.arange(5), group_B=GROUPS, valid_B=valid_B,
        proxy_B=(2 * SMALL + 0.5 * LARGE).float(), rewards=rewards,
        proxies={"small": 2.0, "large": 0.5},
    )  # fmt: skip


def credit_of(scores, **fields):
    return group_credit(scores, AdvantageSettings(**fields), gate=True).advantage_B.double()


def test_the_sum_of_advantages_by_hand():
    # Deviations: small -.5 .5 | -1 -1 2, large 10 -10 | -30 30 0.
    # Group std: small .5, sqrt(2); large 10, sqrt(600).
    e, root = 1e-4, torch.tensor([2.0, 600.0], dtype=torch.float64).sqrt()
    small = torch.tensor([-0.5 / (0.5 + e), 0.5 / (0.5 + e), -1 / (root[0] + e),
                          -1 / (root[0] + e), 2 / (root[0] + e)])  # fmt: skip
    large = torch.tensor([10 / (10 + e), -10 / (10 + e), -30 / (root[1] + e), 30 / (root[1] + e),
                          0.0])  # fmt: skip
    result = credit_of(two_proxies(), combine="advantage", std="group")
    torch.testing.assert_close(result, (2 * small + 0.5 * large).double(), rtol=1e-6, atol=1e-6)
    # Weighted sum first: 15 7 | 0 30 21 with deviations 4 -4 | -17 13 4 and std 4, sqrt(158).
    first = torch.tensor([4 / (4 + e), -4 / (4 + e), *(d / (158**0.5 + e) for d in (-17, 13, 4))])
    result = credit_of(two_proxies(), combine="score", std="group")
    torch.testing.assert_close(result, first.double(), rtol=1e-6, atol=1e-6)


def test_global_std_is_each_proxys_own():
    # Squared deviations over the batch, around the batch's own mean: small 6.8 / 5 (mean .8).
    small, large = ((v - v.mean()).square().mean().sqrt() + 1e-4 for v in (SMALL, LARGE))
    assert small == pytest.approx(1.36**0.5 + 1e-4)
    deviations = torch.tensor([[-0.5, 0.5, -1, -1, 2], [10, -10, -30, 30, 0]], dtype=torch.float64)
    expected = 2 * deviations[0] / small + 0.5 * deviations[1] / large
    result = credit_of(two_proxies(), combine="advantage", std="global")
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_without_std_the_order_does_not_matter():
    both = [credit_of(two_proxies(), combine=c, std="none") for c in ("score", "advantage")]
    torch.testing.assert_close(both[0], both[1], rtol=1e-6, atol=1e-5)


def test_invalid_samples_count_for_no_proxy():
    scores = two_proxies(valid=(True, True, True, False, True))
    broken = {**scores.rewards, "large": scores.rewards["large"].clone()}
    broken["large"][3] = torch.nan
    result = credit_of(dataclasses.replace(scores, rewards=broken), combine="advantage", std="none")
    # Group 1 is now samples 2 and 4: small -1.5 1.5, large -15 15.
    assert result.tolist() == pytest.approx([4, -4, -10.5, 0, 10.5])
