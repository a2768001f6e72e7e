"""Flow-GRPO against its formula and autograd in fp64."""

import dataclasses

import pytest
import torch

from gardo.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from gardo.contract import RatioContract, RatioContractBroken
from gardo.rollout import teach
from gardo.types import Metrics
from gardo_kernels import policy_loss
from tests.engine.algorithms.linear_policy import (
    COUNT,
    LinearPolicy,
    build,
    context,
    engine_for,
    log_prob,
    nudge,
    recorded_velocity,
    roll,
    scores_of,
    whole,
)

GATE_B = torch.arange(COUNT) % 3 == 0
KINDS = pytest.mark.parametrize("kl", ["flow_grpo", "gaussian", "velocity"])
SAMPLERS = pytest.mark.parametrize("sde", ["flow", "cps"])


def off_policy(kl, sde):
    """The trained weights have moved, the reference is elsewhere, some samples are gated."""
    settings = FlowGRPOSettings(clip_range=0.001, beta=0.5, kl=kl)
    algorithm, policy = build(FlowGRPO, settings, sde=sde), LinearPolicy()
    rollout = roll(policy, algorithm)
    credit = algorithm.credit(scores_of(rollout))
    assert credit.gate_B.all() and rollout.step_T.tolist() == [0, 1, 2]
    credit = dataclasses.replace(credit, gate_B=GATE_B)
    points = algorithm.points(rollout, credit)
    points = points.with_velocity("reference", points.velocities["rollout"] + 0.1 * points.x_RX)
    nudge(policy, 0.1)
    return algorithm, policy, rollout, whole(points, credit, rollout)


def column(rollout, name):
    return rollout.transitions.column(name)[:3].repeat(COUNT)


@KINDS
@SAMPLERS
def test_the_kernel_gets_the_recorded_steps(kl, sde):
    algorithm, policy, rollout, batch = off_policy(kl, sde)
    v = context(policy).velocity(batch)
    kernel = policy_loss(
        v, rollout.velocity_BTX.flatten(0, 1), rollout.u_BTX.flatten(0, 1),
        advantage=batch.advantage_R, h=column(rollout, "h"), B=column(rollout, "B"),
        gate=GATE_B.repeat_interleave(3), v_ref=batch.points.velocities["reference"],
        kl_scale=column(rollout, f"kl_{kl}"), clip_low=0.001, clip_high=0.001, beta=0.5,
    )  # fmt: skip
    assert torch.equal(algorithm.loss(context(policy), batch)[0], kernel.loss)
    assert torch.equal(algorithm.log_ratio(batch, v), kernel.log_ratio_R)


@KINDS
@SAMPLERS
def test_loss_and_metrics_are_the_formulas(kl, sde):
    algorithm, policy, rollout, batch = off_policy(kl, sde)
    loss, metrics = algorithm.loss(context(policy), batch)
    velocity, _ = recorded_velocity(policy, rollout)
    ratio = (log_prob(rollout, velocity) - log_prob(rollout, rollout.velocity_BTX.double())).exp()
    adv = batch.advantage_R.view(COUNT, 3).double()
    policy_term = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.999, 1.001))
    reference = batch.points.velocities["reference"].view_as(velocity)
    error = (velocity - reference).square().mean((2, 3))
    kl_term = column(rollout, f"kl_{kl}").view(COUNT, 3) * error * GATE_B[:, None]
    expected = policy_term.mean() + 0.5 * kl_term.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    clipped = ((adv > 0) & (ratio > 1.001)) | ((adv < 0) & (ratio < 0.999))
    assert metrics["ratio"] == pytest.approx(ratio.mean().item(), rel=1e-6)
    assert metrics["clip_fraction"] == pytest.approx(clipped.double().mean().item())
    high = clipped & (adv > 0)
    assert metrics["clip_fraction_high"] == pytest.approx(high.double().mean().item())
    assert high.any() and (clipped & ~high).any()
    assert metrics["policy_loss"] == pytest.approx(policy_term.mean().item(), rel=1e-4)
    assert metrics["kl"] == pytest.approx((kl_term.sum() / 9).item(), rel=1e-4)
    assert metrics["gate_share"] == pytest.approx(3 / 8)


def test_on_policy_the_ratio_is_one_and_the_gradient_the_policy_gradient():
    algorithm, policy = build(FlowGRPO, FlowGRPOSettings(), train_steps=1), LinearPolicy()
    rollout = roll(policy, algorithm)
    valid_B = torch.arange(COUNT) != 5
    credit = algorithm.credit(scores_of(rollout, valid_B))
    assert not credit.gate_B.any()
    batch = whole(algorithm.points(rollout, credit), credit, rollout)
    ctx = context(policy)
    assert torch.equal(algorithm.log_ratio(batch, ctx.velocity(batch)), torch.zeros(COUNT))
    loss, metrics = algorithm.loss(ctx, batch)
    loss.backward()
    assert metrics["ratio"] == 1.0 and metrics["clip_fraction"] == 0

    velocity, twin = recorded_velocity(policy, rollout)
    (-(credit.advantage_B.double()[:, None] * log_prob(rollout, velocity)).mean()).backward()
    for ours, exact in zip(policy.net.parameters(), twin.net.parameters(), strict=True):
        assert exact.grad.abs().max() > 1e-4
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_recomputed_velocities_take_the_place_of_the_rollouts():
    algorithm, policy = build(FlowGRPO, FlowGRPOSettings(beta=1.0)), LinearPolicy()
    rollout = roll(policy, algorithm)
    credit = algorithm.credit(scores_of(rollout))
    points = algorithm.points(rollout, credit)
    nudge(policy, 0.1)
    ctx = context(policy)
    batch = whole(points, credit, rollout)
    assert algorithm.log_ratio(batch, ctx.velocity(batch)).any()
    engine = engine_for(policy)
    points = teach(
        points, {"train": torch.ones(24, dtype=torch.bool)}, policy=policy,
        conditioning=rollout.conditioning, engine=engine, micro_batch=24,
    )  # fmt: skip
    _, metrics = algorithm.loss(ctx, whole(points, credit, rollout))
    assert metrics["ratio"] == 1.0 and metrics["clip_fraction"] == 0
    assert metrics["kl"] == 0, "the reference is the sampling policy"


def test_flow_grpo_without_beta_has_no_reference():
    algorithm = build(FlowGRPO, FlowGRPOSettings())
    assert algorithm.slots == () and not algorithm.has_kl
    rollout = roll(LinearPolicy(), algorithm)
    credit = algorithm.credit(scores_of(rollout))
    points = algorithm.points(rollout, credit)
    algorithm.after_step(None, Metrics())
    assert algorithm.teachers(points, credit) == {}
    _, metrics = algorithm.loss(context(LinearPolicy()), whole(points, credit, rollout))
    assert "kl" not in metrics


def test_nan_in_the_model_breaks_the_ratio_contract():
    algorithm, policy = build(FlowGRPO, FlowGRPOSettings()), LinearPolicy()
    assert isinstance(algorithm.contract, RatioContract)
    rollout = roll(policy, algorithm)
    credit = algorithm.credit(scores_of(rollout))
    points = algorithm.points(rollout, credit)
    with torch.no_grad():
        policy.net.bias[0] = torch.nan

    def probe(points):
        batch = whole(points, credit, rollout)
        velocity = context(policy).velocity(batch)
        error = algorithm.log_ratio(batch, velocity).expm1().abs()
        return Metrics().maximum("error", error)["error"]

    with pytest.raises(RatioContractBroken):
        algorithm.contract.hold(points, probe, lambda points: points)
