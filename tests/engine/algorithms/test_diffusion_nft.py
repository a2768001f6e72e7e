"""DiffusionNFT: its times, golden numbers, the way it moves, the old weights."""

import dataclasses
import json

import pytest
import torch

from gardo.algorithms.base import DecaySettings
from gardo.algorithms.diffusion_nft import DiffusionNFT, DiffusionNFTSettings
from gardo.contract import NoRatio
from gardo.flow import sd3_sigmas
from gardo.rollout import noise_id
from gardo.streams import Stream
from gardo.types import Batch, Metrics, Points, Scores
from gardo_kernels import random_normal
from tests.engine.algorithms.linear_policy import (
    COUNT,
    SEED,
    STEP,
    LinearPolicy,
    Stated,
    build,
    engine_for,
    nudge,
    roll,
    scores_of,
)


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
