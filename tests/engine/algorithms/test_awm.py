"""AWM against its formula in fp64, alone and inside GARDO."""

import dataclasses
import json

import pytest
import torch

from gardo.algorithms.advantage import AdvantageSettings
from gardo.algorithms.awm import AWM, AWMSettings, stratified_steps
from gardo.algorithms.base import DecaySettings, SamplerSettings, World
from gardo.algorithms.gardo import (
    DiversitySettings,
    Gardo,
    GardoSettings,
    GateSettings,
    ReferenceSettings,
)
from gardo.flow import sd3_sigmas
from gardo.rollout import noise_id, teach
from gardo.streams import Stream
from gardo.types import Metrics
from gardo_kernels import random_normal
from tests.engine.algorithms.judged import credit_of
from tests.engine.algorithms.linear_policy import (
    COUNT,
    SEED,
    STEP,
    LinearPolicy,
    context,
    engine_for,
    minibatches,
    nudge,
    roll,
    scores_of,
    whole,
)

WHOLE = {"times": (0, 4)}


def build(settings, *, steps=5, train_steps=3, updates=1):
    sampler = SamplerSettings(steps=steps, train_steps=train_steps)
    AWM.check(settings, sampler)
    world = World(sampler=sampler, sigmas=sd3_sigmas(steps), seed=SEED, updates=updates)
    return AWM(settings, world)


def prepared(settings, **more):
    """An algorithm with its policy, rollout, credit and points."""
    algorithm, policy = build(settings, **more), LinearPolicy()
    rollout = roll(policy, algorithm)
    credit = algorithm.credit(scores_of(rollout))
    return algorithm, policy, rollout, credit, algorithm.points(rollout, credit)


def taught(points, algorithm, credit, policy, rollout):
    engine = engine_for(policy)
    engine.make_slots(algorithm.slots)
    return teach(
        points, algorithm.teachers(points, credit), policy=policy,
        conditioning=rollout.conditioning, engine=engine, micro_batch=24,
    )  # fmt: skip


# ---- the times --------------------------------------------------------------------------------


def test_each_of_six_bins_of_the_steps_1_to_11_gives_one_time():
    assert AWMSettings().trained(14) == (1, 11)
    draw = torch.linspace(0, 1 - 2**-24, 1001)[:, None].expand(-1, 6)
    steps = stratified_steps(draw, 1, 11)
    bins = [sorted(set(column.tolist())) for column in steps.T]
    assert bins == [[1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    for column in steps.T[1:]:  # the two of a bin are equally likely
        assert abs((column == column.min()).sum() - 500.5) <= 1
    assert stratified_steps(draw[-1:, :1], 3, 3).tolist() == [[3]]


def test_points_are_the_images_noised_at_those_times():
    algorithm, _, rollout, _, points = prepared(AWMSettings(times=(1, 4)), steps=6, train_steps=4)
    assert algorithm.plan(STEP).weights == "train" and algorithm.plan(STEP).record == ()
    assert not algorithm.table.scored.any(), "the sampler is an ODE"
    steps = points.step_R.view(COUNT, 4)
    assert torch.equal(steps, torch.arange(1, 5).expand(COUNT, 4)), "one step a bin here"
    torch.testing.assert_close(points.sigma_R, sd3_sigmas(6)[points.step_R].float())
    t = points.sigma_R[:, None, None]
    x0 = rollout.final_BX[points.sample_R]
    noise = torch.stack(
        [random_normal(SEED, noise_id(STEP, rollout.sample_B), Stream.FRESH + k, (3, 2))
         for k in range(4)], 1,
    ).flatten(0, 1)  # fmt: skip
    torch.testing.assert_close(points.extra["target"], noise - x0)
    torch.testing.assert_close(points.x_RX, (1 - t) * x0 + t * noise)


def test_points_do_not_depend_on_the_ranks():
    algorithm, _, rollout, credit, everything = prepared(AWMSettings(times=(0, 3)), updates=2)
    parts = []
    for mine in (slice(0, 2), slice(2, 8)):
        per_sample = ("sample_B", "group_B", "prompt_B", "final_BX")
        half = {name: getattr(rollout, name)[mine] for name in per_sample}
        parts.append(algorithm.points(dataclasses.replace(rollout, **half), credit))
    for name in ("step_R", "sigma_R", "x_RX"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(everything, name))
    for name in ("target", "detached"):
        assert torch.equal(torch.cat([p.extra[name] for p in parts]), everything.extra[name])
    later = algorithm.points(dataclasses.replace(rollout, step=STEP + 1), credit)
    assert not torch.equal(later.step_R, everything.step_R)


def test_samplers_that_do_not_serve_are_refused():
    with pytest.raises(ValueError, match=r"sampler\.train_steps: 3 of the times 1 to 2; at most 2"):
        build(AWMSettings())
    with pytest.raises(ValueError, match=r"sampler\.steps: 3 steps have no times 1 to 0"):
        build(AWMSettings(), steps=3)
    with pytest.raises(ValueError, match=r"sampler\.steps: 5 steps have no times 1 to 5.*least 6"):
        build(AWMSettings(times=(1, 5)))
    with pytest.raises(ValueError, match="first <= last"):
        AWMSettings(times=(3, 2))


# ---- the loss ---------------------------------------------------------------------------------

CURVES = {
    "uniform": lambda error, t: error,
    "t": lambda error, t: t * error,
    "t2": lambda error, t: t * t * error,
    "huber": lambda error, t: t * ((error + 1e-10).sqrt() - 1e-5),
    "ghuber": lambda error, t: t * ((error + 1e-10) ** 0.3 - 1e-10**0.3) / 0.3,
}


def off_policy(transform):
    """The second of two updates: the weights have moved, the reference is elsewhere."""
    settings = AWMSettings(
        transform=transform, power=0.3, clip_range=0.02, beta=0.5, ema_beta=0.7,
        advantage=AdvantageSettings(std="none", scale=20.0), **WHOLE,
    )  # fmt: skip
    algorithm, policy, rollout, credit, points = prepared(settings, updates=2)
    credit = dataclasses.replace(credit, gate_B=torch.arange(COUNT) % 3 == 0)
    points = taught(points, algorithm, credit, policy, rollout)
    points = points.with_velocity("reference", points.velocities["ema"] + 0.1 * points.x_RX)
    nudge(policy, 0.02)
    batch = whole(points, credit, rollout)
    return batch, context(policy).velocity(batch), algorithm.loss(context(policy), batch)


def mean_2(difference):
    return difference.double().square().mean((1, 2))


def formula(transform, batch, v):
    """Ratio, advantage, KL and EMA term of each row."""
    points, t = batch.points, batch.points.sigma_R.double()
    before = torch.where(points.extra["detached"][:, None, None], v, points.velocities["train"])
    log_p, log_p_old = (
        -CURVES[transform](mean_2(u - points.extra["target"]), t) for u in (v, before)
    )
    adv = batch.advantage_R.double().clamp(-5, 5) / 5
    kl, ema = (mean_2(v - points.velocities[name]) for name in ("reference", "ema"))
    return (log_p - log_p_old).exp(), adv, kl, ema


@pytest.mark.parametrize("transform", CURVES)
def test_loss_is_its_formula(transform):
    batch, v, (loss, _) = off_policy(transform)
    ratio, adv, kl, ema = formula(transform, batch, v)
    policy_term = torch.maximum(-adv * ratio, -adv * ratio.clamp(0.98, 1.02))
    expected = policy_term.mean() + 0.5 * (kl * batch.gate_R).mean() + 0.7 * ema.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("transform", CURVES)
def test_metrics_are_the_formulas(transform):
    batch, v, (_, metrics) = off_policy(transform)
    ratio, adv, kl, ema = formula(transform, batch, v)
    assert (ratio == 1).sum() == 12, "half of the rows are of the first update"
    assert metrics["ratio"] == pytest.approx(ratio.mean().item(), rel=1e-6)
    clipped = ((adv > 0) & (ratio > 1.02)) | ((adv < 0) & (ratio < 0.98))
    assert metrics["clip_fraction"] == pytest.approx(clipped.double().mean().item())
    assert metrics["kl"] == pytest.approx(kl[batch.gate_R].mean().item(), rel=1e-5)
    assert metrics["ema_kl"] == pytest.approx(ema.mean().item(), rel=1e-5)
    assert metrics["gate_share"] == pytest.approx(3 / 8)


def test_the_first_update_is_the_policy_gradient():
    settings = AWMSettings(transform="uniform", beta=0.0, ema_beta=0.0, **WHOLE)
    algorithm, policy, rollout, credit, points = prepared(settings)
    assert algorithm.slots == () and not algorithm.has_kl
    assert algorithm.teachers(points, credit) == {}
    ctx, batch = context(policy), whole(points, credit, rollout)
    loss, metrics = algorithm.loss(ctx, batch)
    assert metrics["ratio"] == 1 and "kl" not in metrics and "ema_kl" not in metrics
    loss.backward()
    ours = policy.net.weight.grad.clone()
    policy.zero_grad()
    adv = batch.advantage_R.clamp(-5, 5) / 5
    error = (ctx.velocity(batch) - points.extra["target"]).square().mean((1, 2))
    (adv * error).mean().backward()
    assert ours.abs().max() > 1e-4
    torch.testing.assert_close(ours, policy.net.weight.grad, rtol=1e-4, atol=1e-7)


def test_later_updates_ask_what_the_weights_said_before():
    algorithm, policy, rollout, credit, points = prepared(AWMSettings(**WHOLE), updates=2)
    wanted = algorithm.teachers(points, credit)
    assert set(wanted) == {"ema", "train", "reference"} and wanted["ema"].all()
    asked = points.with_extra(wanted=wanted["train"])
    cut = {"updates": 2, "micro_batch": 12}
    both = minibatches(asked, credit, rollout, **cut)
    assert [batch.points.extra["wanted"].tolist() for batch in both] == [[False] * 12, [True] * 12]
    taught_points = taught(points, algorithm, credit, policy, rollout)
    nudge(policy, 0.1)  # the first update
    first, second = minibatches(taught_points, credit, rollout, **cut)
    ctx = context(policy)
    assert algorithm.loss(ctx, first)[1]["ratio"] == 1
    assert algorithm.loss(ctx, second)[1]["ratio"] != 1
    current = build(AWMSettings(old_velocity="current", **WHOLE), updates=2)
    assert "train" not in current.teachers(current.points(rollout, credit), credit)
    alone = build(AWMSettings(**WHOLE))
    assert "train" not in alone.teachers(alone.points(rollout, credit), credit)


def test_ema_follows_every_gradient_step():
    settings = AWMSettings(ema_decay=DecaySettings(slope=0.2, limit=0.5), **WHOLE)
    algorithm, policy = build(settings), LinearPolicy()
    assert algorithm.slots == ("reference", "ema")
    slots = engine_for(policy).make_slots(algorithm.slots)
    start = policy.net.weight.detach().clone()
    ema = start
    for rate in (0.2, 0.4, 0.5, 0.5):
        nudge(policy, 0.1)
        algorithm.after_update(slots)
        ema = rate * ema + (1 - rate) * policy.net.weight.detach()
        torch.testing.assert_close(slots.pieces("ema")[0], ema.flatten())
    assert algorithm.after_step(slots, Metrics()) == []
    assert torch.equal(slots.pieces("reference")[0], start.flatten())
    restored = build(settings)
    restored.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    nudge(policy, 0.1)
    restored.after_update(slots)
    ema = 0.5 * ema + 0.5 * policy.net.weight.detach()
    torch.testing.assert_close(slots.pieces("ema")[0], ema.flatten())
    released = AWMSettings().ema_decay
    assert [released.rate(n) for n in (0, 100, 1000)] == pytest.approx([0, 0.1, 0.3])


# ---- GARDO around it --------------------------------------------------------------------------


def wrapped(base, **parts):
    settings = GardoSettings(base=base, **parts)
    algorithm = build(base)
    Gardo.check(settings, algorithm.world.sampler)
    return Gardo(settings, algorithm.world)


def judged(rollout):
    scores = scores_of(rollout)
    angle = torch.tensor([0.0, 1.0, 2.0, 2.2, 0.0, 1.0, 2.0, 2.2])
    return dataclasses.replace(
        scores,
        rewards={"proxy": scores.proxy_B, "judge": scores.proxy_B.flip(0)},
        auxiliaries=("judge",),
        features_BD=torch.stack([angle.cos(), angle.sin()], 1),
    )


@pytest.mark.parametrize("part", ["none", "gate", "diversity", "reference"])
def test_gardo_around_awm_one_mechanism_at_a_time(part):
    parts = {
        "gate": GateSettings(fraction=0.25, limits=(0.0, 1.0)),
        "diversity": DiversitySettings(),
        "reference": ReferenceSettings(reset_updates=1),
    }
    algorithm = wrapped(AWMSettings(beta=0.3, **WHOLE), **{k: parts[k] for k in parts if k == part})
    policy = LinearPolicy()
    engine = engine_for(policy)
    slots = engine.make_slots(algorithm.slots)
    rollout = roll(policy, algorithm)
    scores = judged(rollout)
    plain, credit = algorithm.base.credit(scores), credit_of(algorithm, scores)
    assert torch.equal(plain.advantage_B, credit.advantage_B) == (part != "diversity")
    gated = int(credit.gate_B.sum())
    assert gated == (2 if part == "gate" else COUNT)
    points = algorithm.points(rollout, credit)
    assert int(algorithm.teachers(points, credit)["reference"].sum()) == 3 * gated
    points = taught(points, algorithm, credit, policy, rollout)
    nudge(policy, 0.1)
    _, metrics = algorithm.loss(context(policy), whole(points, credit, rollout))
    assert metrics["gate_share"] == gated / COUNT and metrics["kl"] > 0
    algorithm.after_update(slots)
    events = algorithm.after_step(slots, metrics)
    assert events == (["reference reset (1 updates)"] if part == "reference" else [])
    is_live = torch.equal(slots.pieces("reference")[0], policy.net.weight.flatten())
    assert is_live == (part == "reference")


def test_awm_without_beta_has_nothing_to_gate():
    with pytest.raises(ValueError, match=r"algorithm\.base\.beta: awm has no KL"):
        wrapped(AWMSettings(beta=0.0, **WHOLE), gate=GateSettings())
