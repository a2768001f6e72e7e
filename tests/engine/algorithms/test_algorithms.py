"""Losses of the base algorithms against formulas, golden numbers and autograd in fp64."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from gardo.algorithms.advantage import AdvantageSettings
from gardo.algorithms.awm import AWM, AWMSettings
from gardo.algorithms.base import DecaySettings, SamplerSettings
from gardo.algorithms.diffusion_nft import DiffusionNFT, DiffusionNFTSettings
from gardo.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from gardo.algorithms.refl import ReFL, ReFLSettings
from gardo.contract import NoRatio, RatioContract, RatioContractBroken
from gardo.flow import sd3_sigmas
from gardo.rollout import noise_id, teach
from gardo.streams import Stream
from gardo.types import Batch, Metrics, Points, Scores
from gardo_kernels import policy_loss, random_normal
from tests.engine.algorithms.linear_policy import (
    COUNT,
    SEED,
    STEP,
    LinearPolicy,
    build,
    context,
    engine_for,
    log_prob,
    minibatches,
    nudge,
    recorded_velocity,
    roll,
    scores_of,
    whole,
)


class Stated(nn.Module):
    """A context whose velocities and rewards are parameters."""

    def __init__(self, velocity, reward=None):
        super().__init__()
        self.velocities = nn.Parameter(velocity)
        self.rewards = None if reward is None else nn.Parameter(reward)

    def velocity(self, batch):
        return self.velocities

    def decode(self, latents):
        return latents

    def score(self, images, batch):
        return self.rewards


# ---- Flow-GRPO --------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["flow_grpo", "gaussian", "velocity"])
@pytest.mark.parametrize("sde", ["flow", "cps"])
def test_flow_grpo_is_its_formula_on_the_recorded_steps(kl, sde):
    settings = FlowGRPOSettings(clip_range=0.001, beta=0.5, kl=kl)
    algorithm, policy = build(FlowGRPO, settings, sde=sde), LinearPolicy()
    rollout = roll(policy, algorithm)
    assert rollout.step_T.tolist() == [0, 1, 2]
    credit = algorithm.credit(scores_of(rollout))
    assert credit.gate_B.all()
    credit = dataclasses.replace(credit, gate_B=torch.arange(COUNT) % 3 == 0)
    points = algorithm.points(rollout, credit)
    reference = points.velocities["rollout"] + 0.1 * points.x_RX
    batch = whole(points.with_velocity("reference", reference), credit, rollout)
    nudge(policy, 0.1)
    ctx = context(policy)
    loss, metrics = algorithm.loss(ctx, batch)

    def column(name):
        return rollout.transitions.column(name)[:3].repeat(COUNT)

    v = ctx.velocity(batch)
    kernel = policy_loss(
        v, rollout.velocity_BTX.flatten(0, 1), rollout.u_BTX.flatten(0, 1),
        advantage=credit.advantage_B.repeat_interleave(3), h=column("h"), B=column("B"),
        gate=credit.gate_B.repeat_interleave(3), v_ref=reference, kl_scale=column(f"kl_{kl}"),
        clip_low=0.001, clip_high=0.001, beta=0.5,
    )  # fmt: skip
    assert torch.equal(loss, kernel.loss)
    assert torch.equal(algorithm.log_ratio(batch, v), kernel.log_ratio_R)

    velocity, _ = recorded_velocity(policy, rollout)
    ratio = (log_prob(rollout, velocity) - log_prob(rollout, rollout.velocity_BTX.double())).exp()
    adv = credit.advantage_B.double()[:, None]
    policy_term = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.999, 1.001))
    error = (velocity - reference.view_as(velocity)).square().mean((2, 3))
    kl_term = column(f"kl_{kl}").view(COUNT, 3) * error * credit.gate_B[:, None]
    expected = policy_term.mean() + 0.5 * kl_term.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["ratio"] == pytest.approx(ratio.mean().item(), rel=1e-6)
    clipped = ((adv > 0) & (ratio > 1.001)) | ((adv < 0) & (ratio < 0.999))
    assert metrics["clip_fraction"] == pytest.approx(clipped.double().mean().item())
    assert 0 < metrics["clip_fraction_high"] < metrics["clip_fraction"]
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


# ---- DiffusionNFT -----------------------------------------------------------------------------


def test_nft_trains_at_distinct_times_of_the_sampler_with_fresh_noise():
    algorithm = build(DiffusionNFT, DiffusionNFTSettings(), steps=6, train_steps=4)
    assert algorithm.plan(STEP).weights == "old" and algorithm.plan(STEP).record == ()
    rollout = roll(LinearPolicy(), algorithm)
    points = algorithm.points(rollout, algorithm.credit(scores_of(rollout)))
    assert points.sample_R.tolist() == [i for i in range(COUNT) for _ in range(4)]
    assert torch.equal(points.prompt_R, rollout.prompt_B[points.sample_R])
    times = points.step_R.view(COUNT, 4)
    assert all(len(set(row)) == 4 for row in times.tolist())
    assert set(times.flatten().tolist()) == set(range(6))
    assert len({tuple(row) for row in times.tolist()}) > COUNT // 2, "samples share their times"
    torch.testing.assert_close(points.sigma_R, sd3_sigmas(6)[points.step_R].float())

    x0 = rollout.final_BX[points.sample_R].double()
    assert torch.equal(points.extra["x0"].double(), x0)
    t = points.sigma_R.double()[:, None, None]
    noise = ((points.x_RX - (1 - t) * x0) / t)[points.sigma_R > 0.1].flatten(1)
    assert torch.pdist(noise).min() > 0.1, "two rows share their noise"
    assert abs(noise.mean()) < 0.3 and 0.8 < noise.std() < 1.2
    identity = noise_id(STEP, rollout.sample_B)
    for stream in (Stream.INITIAL, *range(6)):  # the sampler's own noise
        used = random_normal(SEED, identity, stream, (3, 2)).flatten(1).double()
        assert torch.cdist(noise, used).min() > 0.1


def test_nft_points_do_not_depend_on_the_ranks():
    algorithm = build(DiffusionNFT, DiffusionNFTSettings(), train_steps=5)
    rollout = roll(LinearPolicy(), algorithm)
    everything = algorithm.points(rollout, None)
    parts = []
    for mine in (slice(0, 3), slice(3, 8)):
        per_sample = ("sample_B", "group_B", "prompt_B", "final_BX")
        half = {name: getattr(rollout, name)[mine] for name in per_sample}
        parts.append(algorithm.points(dataclasses.replace(rollout, **half), None))
    for name in ("step_R", "sigma_R", "x_RX", "prompt_R"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(everything, name))
    later = algorithm.points(dataclasses.replace(rollout, step=STEP + 1), None)
    assert not torch.equal(later.step_R, everything.step_R)


def golden_batch(advantage):
    x0 = torch.tensor([[0.3, -0.7, 1.1, 0.2]])
    noise = torch.tensor([[-0.5, 0.4, 0.9, -1.2]])
    old = noise - x0 + torch.tensor([[0.1, -0.1, 0.2, 0.0]])
    zero = torch.zeros(1, dtype=torch.int64)
    points = Points(
        sample_R=zero, prompt_R=zero, step_R=zero, sigma_R=torch.tensor([0.6]),
        x_RX=0.4 * x0 + 0.6 * noise, extra={"x0": x0},
        velocities={"old": old, "reference": 0.9 * old},
    )  # fmt: skip
    velocity = old + torch.tensor([[-0.05, 0.02, -0.1, 0.03]])
    gate = torch.ones(1, dtype=torch.bool)
    advantage_R = torch.tensor([advantage])
    batch = Batch(
        points=points, advantage_R=advantage_R, gate_R=gate, kl_weight_R=gate.float(), rollout=None
    )
    return batch, velocity


@pytest.mark.parametrize(
    ("strength", "advantage", "clip", "policy_term"),
    [
        (1.0, 2.0, 5.0, 0.35162308),
        (0.1, -1.0, 5.0, 4.51047091),
        (1.0, 9.0, 5.0, 5 * 0.04569231),
        # r = 2 / (2 x 2.5) + 1/2; the loss is in units of the clip, so that A keeps its weight
        (1.0, 2.0, 2.5, 2.5 * (0.9 * 0.04569231 + 0.1 * 0.1278)),
    ],
)
def test_nft_golden_numbers(strength, advantage, clip, policy_term):
    settings = DiffusionNFTSettings(guidance_strength=strength, beta=0.3, advantage_clip=clip)
    batch, velocity = golden_batch(advantage)
    ctx = Stated(velocity)
    loss, metrics = build(DiffusionNFT, settings).loss(ctx, batch)
    assert metrics["policy_loss"] == pytest.approx(policy_term, rel=1e-5)
    assert metrics["kl"] == pytest.approx(0.012725, rel=1e-4)
    assert loss.item() == pytest.approx(policy_term + 0.3 * 0.012725, rel=1e-5)
    loss.backward()
    assert ctx.velocities.grad.abs().min() > 0


def test_nft_gate_and_beta():
    batch, velocity = golden_batch(2.0)
    ungated = dataclasses.replace(batch, gate_R=~batch.gate_R, kl_weight_R=torch.zeros(1))
    loss, metrics = build(DiffusionNFT, DiffusionNFTSettings(beta=0.3)).loss(
        Stated(velocity), ungated
    )
    assert loss.item() == pytest.approx(0.35162308, rel=1e-5)
    assert metrics["gate_share"] == 0
    free = build(DiffusionNFT, DiffusionNFTSettings(beta=0.0))
    assert free.slots == ("old",) and not free.has_kl
    assert set(free.teachers(batch.points, free.credit(SCORE_OF_ONE))) == {"old"}
    loss, metrics = free.loss(Stated(velocity), batch)
    assert loss.item() == pytest.approx(0.35162308, rel=1e-5) and "kl" not in metrics


def test_nft_trains_at_a_random_nine_of_ten_times():
    algorithm = build(DiffusionNFT, DiffusionNFTSettings(), steps=10, train_steps=9)
    points = algorithm.points(roll(LinearPolicy(), algorithm), None)
    left_out = [set(range(10)) - set(row) for row in points.step_R.view(COUNT, 9).tolist()]
    assert all(len(rest) == 1 for rest in left_out) and len(set().union(*left_out)) > 2
    algorithm = build(DiffusionNFT, DiffusionNFTSettings(), steps=10, train_steps=10)
    points = algorithm.points(roll(LinearPolicy(), algorithm), None)
    assert all(set(row) == set(range(10)) for row in points.step_R.view(COUNT, 10).tolist())


SCORE_OF_ONE = Scores(
    sample_B=torch.zeros(1, dtype=torch.int64),
    group_B=torch.zeros(1, dtype=torch.int64),
    proxy_B=torch.ones(1),
    valid_B=torch.ones(1, dtype=torch.bool),
)


@pytest.mark.parametrize(("advantage", "direction"), [(5.0, 1), (0.0, 0), (-5.0, -1)])
def test_nft_moves_towards_good_images_and_away_from_bad(advantage, direction):
    batch, _ = golden_batch(advantage)
    ctx = Stated(batch.points.velocities["old"].clone())
    loss, _ = build(DiffusionNFT, DiffusionNFTSettings(beta=0.0)).loss(ctx, batch)
    loss.backward()
    points = batch.points
    true_velocity = (points.x_RX - points.extra["x0"]) / 0.6
    descent = -ctx.velocities.grad
    towards = (descent * (true_velocity - points.velocities["old"])).sum().item()
    assert towards == pytest.approx(0, abs=1e-6) if direction == 0 else towards * direction > 0.01


def test_old_follows_at_the_decay_rate():
    decay = DecaySettings()
    assert [decay.rate(n) for n in (0, 1, 100, 600)] == pytest.approx([0, 0.001, 0.1, 0.5])
    late = DecaySettings(slope=0.0075, start=75, limit=0.999)
    rates = [late.rate(n) for n in (0, 75, 76, 175, 1000)]
    assert rates == pytest.approx([0, 0, 0.0075, 0.75, 0.999])

    settings = DiffusionNFTSettings(decay=DecaySettings(slope=0.1, start=1, limit=0.35))
    algorithm, policy = build(DiffusionNFT, settings), LinearPolicy()
    slots = engine_for(policy).make_slots(algorithm.slots)
    old = policy.net.weight.detach().clone()
    for updates, rate in ((2, 0.1), (4, 0.3), (6, 0.35)):
        for _ in range(2):
            nudge(policy, 0.1)
            algorithm.after_update(slots)
        live = policy.net.weight.detach().clone()
        assert algorithm.after_step(slots, Metrics()) == []
        old = rate * old + (1 - rate) * live
        torch.testing.assert_close(slots.pieces("old")[0], old.flatten())
        restored = build(DiffusionNFT, settings)
        restored.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
        assert restored.updates == updates
    assert not torch.equal(slots.pieces("reference")[0], old.flatten())
    assert isinstance(algorithm.contract, NoRatio)


# ---- ReFL -------------------------------------------------------------------------------------


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


# ---- all of them ------------------------------------------------------------------------------


def test_samplers_that_do_not_serve_are_refused():
    def sampler(train_steps):
        return SamplerSettings(steps=5, train_steps=train_steps)

    FlowGRPO.check(FlowGRPOSettings(), sampler(4))
    with pytest.raises(ValueError, match=r"sampler\.train_steps: 5 of 5 steps.*at most 4"):
        FlowGRPO.check(FlowGRPOSettings(), sampler(5))
    DiffusionNFT.check(DiffusionNFTSettings(), sampler(5))
    with pytest.raises(ValueError, match=r"sampler\.train_steps: 6 times of 5 steps; at most 5"):
        DiffusionNFT.check(DiffusionNFTSettings(), sampler(6))
    ReFL.check(ReFLSettings(), sampler(99))  # trains one step, whatever this says


@pytest.mark.parametrize(
    ("plugin", "settings"),
    [
        (FlowGRPO, FlowGRPOSettings(beta=0.1)),
        (DiffusionNFT, DiffusionNFTSettings(beta=0.1)),
        (AWM, AWMSettings(times=(0, 4), beta=0.1)),
        (ReFL, ReFLSettings(weight=1.0)),
    ],
    ids=["flow_grpo", "diffusion_nft", "awm", "refl"],
)
def test_micro_batches_add_up_to_the_update(plugin, settings):
    """Mean gradient and metrics over micro-batches are those of all rows at once."""
    algorithm, policy = build(plugin, settings), LinearPolicy()
    rollout = roll(policy, algorithm)
    credit = algorithm.credit(scores_of(rollout))
    points = algorithm.points(rollout, credit)
    for name in algorithm.teachers(points, credit):
        points = points.with_velocity(name, 0.5 * points.x_RX)
    ctx = context(policy)
    rows = COUNT * algorithm.rows_per_sample(settings, algorithm.world.sampler)
    assert len(points.sample_R) == rows
    gradients, means = [], []
    for micro_batch in (rows, rows // 4):
        policy.zero_grad()
        totals = Metrics()
        for batch in minibatches(points, credit, rollout, sample_B=rollout.sample_B, updates=1,
                                 micro_batch=micro_batch, seed=SEED, step=STEP):  # fmt: skip
            loss, metrics = algorithm.loss(ctx, batch)
            (loss * micro_batch / rows).backward()
            totals.add(metrics)
        gradients.append(policy.net.weight.grad.clone())
        means.append(totals.as_dict())
    assert gradients[0].abs().max() > 1e-6
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-8)
    assert means[1] == pytest.approx(means[0], rel=1e-4, abs=1e-7)


def test_advantage_settings_reach_the_credit():
    rollout = roll(LinearPolicy(), build(ReFL, ReFLSettings()))
    for plugin, settings in ((FlowGRPO, FlowGRPOSettings), (DiffusionNFT, DiffusionNFTSettings)):
        algorithm = build(plugin, settings(advantage=AdvantageSettings(std="none", scale=10.0)))
        advantage = algorithm.credit(scores_of(rollout)).advantage_B
        expected = [-3.5, -0.5, -0.5, 4.5, 0.5, -2.5, 3.5, -1.5]
        assert advantage.tolist() == pytest.approx(expected, abs=1e-5)
