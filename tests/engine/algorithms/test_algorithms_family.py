"""Every policy gradient over recorded steps, against its formula in fp64 and what must hold.

Also what is DanceGRPO's, GRPO-Guard's and DDPO's own.
"""

import dataclasses

import pytest
import torch

from gardo.algorithms.advantage import AdvantageSettings
from gardo.algorithms.base import SamplerSettings, World
from gardo.algorithms.dance_grpo import DanceGRPO, DanceGRPOSettings
from gardo.algorithms.ddpo import DDPO, DDPOSettings
from gardo.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from gardo.algorithms.flow_grpo_fast import FlowGRPOFast, FlowGRPOFastSettings
from gardo.algorithms.gardo import Gardo, GardoSettings, GateSettings
from gardo.algorithms.grpo_guard import GRPOGuard, GRPOGuardSettings
from gardo.algorithms.mix_grpo import Frozen, MixGRPO, MixGRPOSettings, Progressive
from gardo.contract import NoRatio, RatioContract
from gardo.flow import shifted_linear_sigmas, transitions
from gardo.rollout import Part, batch_of, rows_of
from gardo.types import Metrics, Rollout
from tests.engine.algorithms.linear_policy import (
    COUNT,
    STEP,
    LinearPolicy,
    build,
    context,
    minibatches,
    nudge,
    roll,
    scores_of,
    whole,
)

DANCE = {"sde": "dance", "noise_level": 0.3, "schedule": "shifted_linear",
         "model_time": "integer", "same_initial_noise": True}  # fmt: skip
FAMILY = {
    "flow": (FlowGRPO, FlowGRPOSettings, {}, {}),
    "fast": (FlowGRPOFast, FlowGRPOFastSettings, {},
             {"steps": 6, "train_steps": 2, "sde": "cps", "noise_level": 0.8}),
    "mix": (MixGRPO, MixGRPOSettings, {"window": Progressive(iterations=1)}, {"steps": 6}),
    "flash": (MixGRPO, MixGRPOSettings, {"window": Frozen(kind="frozen", at=1), "flash": 0.5},
              {"steps": 9}),
    "dance": (DanceGRPO, DanceGRPOSettings, {}, {"steps": 8, **DANCE}),
    "guard": (GRPOGuard, GRPOGuardSettings, {}, {}),
    "guard_dance": (GRPOGuard, GRPOGuardSettings, {}, {"sde": "dance", "noise_level": 0.3}),
    "ddpo": (DDPO, DDPOSettings, {}, {}),
}  # fmt: skip
CLIP = 1e-3


def member(name, **more):
    plugin, settings, own, sampler = FAMILY[name]
    if name != "ddpo":
        own = {"clip_range": CLIP, **own}
    return build(plugin, settings(**{**own, **more}), **sampler)


def rolled(algorithm, policy, *, gate_B=None, reference=False):
    """Rollout, credit and points of the usual rewards; the reference somewhere else."""
    rollout = roll(policy, algorithm)
    credit = algorithm.credit(scores_of(rollout))
    if gate_B is not None:
        credit = dataclasses.replace(credit, gate_B=gate_B)
    points = algorithm.points(rollout, credit)
    if reference:
        elsewhere = points.velocities["rollout"] + 0.1 * points.x_RX
        points = points.with_velocity("reference", elsewhere)
    return rollout, credit, points


def gradient_of(algorithm, policy, rollout, batch):
    policy.zero_grad()
    loss, metrics = algorithm.loss(context(policy), batch)
    loss.backward()
    return policy.net.weight.grad.clone(), loss.item(), metrics


def twin_of(policy):
    twin = LinearPolicy().double()
    twin.load_state_dict({n: w.double() for n, w in policy.state_dict().items()})
    return twin


def formula(name, rollout, credit, points, twin, beta):
    """The loss in fp64 from its definition: per row, the step x -> x' that was taken."""

    def column(n):
        return rollout.transitions.rows(points.step_R, n).double()

    def wide(c):
        return c.view(-1, 1, 1)

    x, v_old = points.x_RX.double(), points.velocities["rollout"].double()
    u = points.extra["u"].double()
    v = twin.velocity(x, column("model_sigma"), rows_of(rollout.conditioning, points.prompt_R))
    A, B, std, dt, h = (column(n) for n in ("A", "B", "std", "dt", "h"))
    x_next = wide(A) * x + wide(B) * (v_old + u)

    def log_p(velocity):
        return -h * (x_next - wide(A) * x - wide(B) * velocity).square().mean((1, 2))

    adv = credit.advantage_B.double()[points.sample_R]
    if name == "ddpo":
        policy_term = -adv * log_p(v)
    elif name.startswith("guard"):
        z = (x_next - wide(A) * x - wide(B) * v_old) / wide(std)
        ratio = (z * wide(B) * (v - v_old)).mean((1, 2)).exp()
        clamped = ratio.clamp(1 - CLIP, 1 + CLIP)
        policy_term = torch.maximum(-adv * ratio, -adv * clamped) / -dt
    else:
        ratio = (log_p(v) - log_p(v_old)).exp()
        policy_term = torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - CLIP, 1 + CLIP))
    loss = policy_term.mean()
    if beta:
        error = (v - points.velocities["reference"].double()).square().mean((1, 2))
        gate_R = credit.gate_B[points.sample_R]
        loss = loss + beta * (column("kl_flow_grpo") * error * gate_R).mean()
    return loss


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("name", FAMILY)
def test_loss_and_gradient_are_the_formulas(name, beta):
    """Off-policy, where some rows are clipped; a third of the samples gated."""
    algorithm, policy = member(name, beta=beta), LinearPolicy()
    gate_B = torch.arange(COUNT) % 3 == 0
    rollout, credit, points = rolled(algorithm, policy, gate_B=gate_B, reference=beta > 0)
    nudge(policy, 0.1)
    batch = whole(points, credit, rollout)
    gradient, loss, metrics = gradient_of(algorithm, policy, rollout, batch)
    twin = twin_of(policy)
    exact = formula(name, rollout, credit, points, twin, beta)
    exact.backward()
    assert twin.net.weight.grad.abs().max() > 1e-4
    # fp32 forward and backward of a row: 1e-6 of the largest term, which cancels tenfold
    largest = twin.net.weight.grad.abs().max().item()
    torch.testing.assert_close(
        gradient.double(), twin.net.weight.grad, rtol=1e-4, atol=2e-5 * largest
    )
    if name == "ddpo":  # its loss is of a ratio that is 1: only the gradient means something
        assert metrics["ratio"] == 1 and isinstance(algorithm.contract, NoRatio)
    else:
        assert loss == pytest.approx(exact.item(), rel=1e-4, abs=1e-6)
        assert 0 < metrics["clip_fraction"] < 1
        assert isinstance(algorithm.contract, RatioContract)
        assert algorithm.contract.clip_range == CLIP


@pytest.mark.parametrize("name", FAMILY)
def test_on_policy_every_ratio_is_one(name):
    algorithm, policy = member(name), LinearPolicy()
    rollout, credit, points = rolled(algorithm, policy)
    batch = whole(points, credit, rollout)
    assert not algorithm.log_ratio(batch, points.velocities["rollout"]).any()
    again = algorithm.log_ratio(batch, context(policy).velocity(batch))
    assert again.abs().max() < 1e-6, "the training pass is told another time or state"
    gradient, _, metrics = gradient_of(algorithm, policy, rollout, batch)
    assert metrics["clip_fraction"] == 0 and gradient.abs().max() > 1e-4


@pytest.mark.parametrize("name", FAMILY)
def test_rows_in_any_order(name):
    algorithm, policy = member(name, beta=0.5), LinearPolicy()
    rollout, credit, points = rolled(algorithm, policy, reference=True)
    nudge(policy, 0.1)
    straight = gradient_of(algorithm, policy, rollout, whole(points, credit, rollout))
    order = (torch.arange(len(points.sample_R)) * 7 + 3) % len(points.sample_R)
    assert len(order.unique()) == len(order)
    mixed = gradient_of(algorithm, policy, rollout, batch_of(points, credit, Part(order), rollout))
    torch.testing.assert_close(mixed[0], straight[0], rtol=1e-4, atol=1e-7)
    assert mixed[1] == pytest.approx(straight[1], rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", FAMILY)
def test_scaled_rewards_scale_the_gradient(name):
    """Without a std, on-policy: twice the rewards, twice the gradient; shifted, the same."""
    algorithm = member(name, advantage=AdvantageSettings(std="none"))
    policy = LinearPolicy()
    rollout = roll(policy, algorithm)
    scores = scores_of(rollout)
    gradients = []
    for proxy_B in (scores.proxy_B, 2 * scores.proxy_B, scores.proxy_B + 3):
        credit = algorithm.credit(dataclasses.replace(scores, proxy_B=proxy_B))
        batch = whole(algorithm.points(rollout, credit), credit, rollout)
        gradients.append(gradient_of(algorithm, policy, rollout, batch)[0])
    once, twice, raised = gradients
    torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(raised, once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FAMILY)
def test_equal_rewards_teach_nothing(name):
    algorithm, policy = member(name), LinearPolicy()
    rollout = roll(policy, algorithm)
    scores = dataclasses.replace(scores_of(rollout), proxy_B=torch.full((COUNT,), 0.3))
    credit = algorithm.credit(scores)
    nudge(policy, 0.1)
    batch = whole(algorithm.points(rollout, credit), credit, rollout)
    gradient, loss, _ = gradient_of(algorithm, policy, rollout, batch)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("name", FAMILY)
def test_gardo_around_it(name):
    """Nothing gated is the base without a KL, everything gated the base's uniform KL."""
    base, free = member(name, beta=0.5), member(name)
    with pytest.raises(ValueError, match=f"{base.settings.name} has no KL to gate"):
        Gardo.check(GardoSettings(base=free.settings, gate=GateSettings()), free.world.sampler)
    settings = GardoSettings(base=base.settings, gate=GateSettings())
    Gardo.check(settings, base.world.sampler)
    wrapped = Gardo(settings, base.world)
    assert wrapped.slots == ("reference",) and wrapped.has_kl and not free.has_kl
    rows = type(base).rows_per_sample(base.settings, base.world.sampler)
    assert type(wrapped).rows_per_sample(settings, base.world.sampler) == rows
    policy = LinearPolicy()
    rollout, credit, points = rolled(wrapped.base, policy, reference=True)
    nudge(policy, 0.1)
    seen = {}
    for gated in (False, True):
        credit = dataclasses.replace(credit, gate_B=torch.full((COUNT,), gated))
        seen[gated] = gradient_of(wrapped, policy, rollout, whole(points, credit, rollout))
        assert wrapped.teachers(points, credit) == {}  # the reference is the sampling policy
    batch = whole(points, credit, rollout)
    assert torch.equal(seen[True][0], gradient_of(base, policy, rollout, batch)[0])
    torch.testing.assert_close(seen[False][0], gradient_of(free, policy, rollout, batch)[0])
    assert seen[False][2]["gate_share"] == 0 and seen[True][2]["gate_share"] == 1
    assert (seen[True][0] - seen[False][0]).abs().max() > 1e-5
    wrapped.after_step(None, Metrics().mean("kl", torch.ones(1)))
    gate_B = torch.arange(COUNT) < 2
    untaught = dataclasses.replace(points, velocities={"rollout": points.velocities["rollout"]})
    wanted = wrapped.teachers(untaught, dataclasses.replace(credit, gate_B=gate_B))
    assert wanted.keys() == {"reference"}
    assert torch.equal(wanted["reference"], gate_B[points.sample_R])


@pytest.mark.parametrize("name", FAMILY)
def test_micro_batches_add_up(name):
    algorithm, policy = member(name, beta=0.5), LinearPolicy()
    rollout, credit, points = rolled(algorithm, policy, reference=True)
    rows = COUNT * algorithm.rows_per_sample(algorithm.settings, algorithm.world.sampler)
    assert len(points.sample_R) == rows
    nudge(policy, 0.1)
    gradients = []
    for micro_batch in (rows, rows // 4):
        policy.zero_grad()
        for batch in minibatches(points, credit, rollout, micro_batch=micro_batch):  # fmt: skip
            (algorithm.loss(context(policy), batch)[0] * micro_batch / rows).backward()
        gradients.append(policy.net.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


# ---- golden numbers ---------------------------------------------------------------------------

X = torch.tensor([[0.5, -1.0, 0.25, 2.0]])
V = torch.tensor([[0.1, -0.2, 0.3, -0.4]])
NOISE = torch.tensor([[1.0, -1.0, 0.5, 0.0]])
MOVED = torch.tensor([[0.01, -0.02, 0.005, 0.0]])


@pytest.mark.parametrize(
    ("name", "sde", "level", "ratio"),
    [
        ("flow", "flow", 0.7, 0.99847560),
        ("flow", "dance", 0.3, 0.99135660),
        ("flow", "cps", 0.8, 0.99807886),
        ("guard", "flow", 0.7, 0.99898895),
    ],
)
def test_golden_ratios(name, sde, level, ratio):
    """One step .9 -> .8 with sigmas[1] = .96, from the rollout's record to the ratio."""
    plugin, settings, *_ = FAMILY[name]
    sampler = SamplerSettings(steps=4, train_steps=3, sde=sde, noise_level=level)
    sigmas = torch.tensor([1.0, 0.96, 0.9, 0.8, 0.3], dtype=torch.float64)
    algorithm = plugin(settings(), World(sampler=sampler, sigmas=sigmas, seed=0))
    table, zero = transitions(sigmas, sde, level), torch.zeros(1, dtype=torch.int64)
    rollout = Rollout(
        sample_B=zero, group_B=zero, prompt_B=zero, prompts=("",), conditioning={}, final_BX=X,
        images_B3HW=torch.zeros(1, 3, 1, 1), step_T=zero + 2, state_BTX=X[:, None],
        u_BTX=table.column("u_scale")[2] * NOISE[:, None], velocity_BTX=V[:, None],
        transitions=table, seed=0, seed_1=zero, step=0,
    )  # fmt: skip
    credit = algorithm.credit(
        dataclasses.replace(
            scores_of(rollout), group_B=zero, proxy_B=torch.ones(1), valid_B=zero == 0
        )
    )
    batch = whole(algorithm.points(rollout, credit), credit, rollout)
    # v + MOVED is rounded in fp32 to 3e-8 of .4, 1e-6 of the shift; the log-ratio is 1e-3 to 1e-2
    log_ratio = algorithm.log_ratio(batch, V + MOVED)
    assert log_ratio.expm1().item() == pytest.approx(ratio - 1, rel=1e-5)


# ---- DanceGRPO --------------------------------------------------------------------------------


def test_dance_trains_some_of_the_stochastic_steps_drawn_for_each_sample():
    algorithm = member("dance")
    plan = algorithm.plan(STEP)
    assert plan.record == tuple(range(7)) and plan.same_initial_noise
    assert plan.transitions.scored.tolist() == [True] * 7 + [False]
    assert algorithm.settings.advantage.std == "group_unbiased"
    rollout, credit, points = rolled(algorithm, LinearPolicy())
    times = points.step_R.view(COUNT, 3)
    assert points.sample_R.tolist() == [i for i in range(COUNT) for _ in range(3)]
    assert (times.diff(dim=1) > 0).all(), "a step twice in a sample"
    assert times.max() <= 6 and len({tuple(row) for row in times.tolist()}) > COUNT // 2
    row = torch.arange(COUNT)[:, None]
    assert torch.equal(points.x_RX, rollout.state_BTX[row, times].flatten(0, 1))
    assert torch.equal(points.extra["u"], rollout.u_BTX[row, times].flatten(0, 1))
    assert torch.equal(points.velocities["rollout"], rollout.velocity_BTX[row, times].flatten(0, 1))
    later = algorithm.points(dataclasses.replace(rollout, step=STEP + 1), credit)
    assert not torch.equal(later.step_R, points.step_R)
    share = torch.stack([
        algorithm.points(dataclasses.replace(rollout, step=n), credit).step_R.bincount(minlength=7)
        for n in range(60)
    ]).sum(0) / (60 * COUNT)  # fmt: skip
    # each step is in 3 / 7 of 480 samples: .4286 +- .0226; 5 standard deviations
    assert (share - 3 / 7).abs().max() < 0.113


def test_dance_points_do_not_depend_on_the_ranks():
    algorithm = member("dance")
    _, credit, everything = rolled(algorithm, LinearPolicy())
    parts = []
    for first, count in ((0, 3), (3, 5)):
        half = roll(LinearPolicy(), algorithm, first=first, count=count)
        parts.append(algorithm.points(half, credit))
    assert torch.equal(torch.cat([part.step_R for part in parts]), everything.step_R)
    u_RX = torch.cat([part.extra["u"] for part in parts])
    assert torch.equal(u_RX, everything.extra["u"])


def test_dances_image_is_the_last_steps_predicted_x0():
    """The last step adds no noise and goes to sigma 0: x - s v of the last state."""
    algorithm, policy = member("dance"), LinearPolicy()
    assert torch.equal(algorithm.world.sigmas, shifted_linear_sigmas(8, 3.0))
    rollout = roll(policy, algorithm)
    table = rollout.transitions
    A, B = (table.column(n)[6].double() for n in ("A", "B"))
    x = A * rollout.state_BTX[:, 6].double()
    x = x + B * (rollout.velocity_BTX[:, 6] + rollout.u_BTX[:, 6]).double()
    s = 3 * (1 / 8) / (1 + 2 / 8)
    told = torch.full((COUNT,), int(1000 * s) / 1000, dtype=torch.float64)
    v = twin_of(policy).velocity(x, told, rows_of(rollout.conditioning, rollout.prompt_B))
    torch.testing.assert_close(rollout.final_BX.double(), x - s * v, rtol=0, atol=1e-5)


# ---- the sampler's settings and refusals ------------------------------------------------------


def test_the_model_is_told_the_same_time_in_sampling_and_training():
    told = []

    class Listening(LinearPolicy):
        def branches(self, x, sigma, conditioning):
            told.append(sigma[0].item())
            return super().branches(x, sigma, conditioning)

    algorithm, policy = member("dance"), Listening()
    _, _, points = rolled(algorithm, policy)
    expected = [int(1000 * s) / 1000 for s in algorithm.world.sigmas[:-1].tolist()]
    assert told == pytest.approx(expected, rel=1e-7)
    assert torch.equal(points.sigma_R, torch.tensor(told)[points.step_R])
    assert torch.equal(points.extra["sigma"], algorithm.world.sigmas.float()[points.step_R])
    assert not torch.equal(points.sigma_R, points.extra["sigma"])


def test_schedules():
    own = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    settings = {"steps": 2, "train_steps": 1}
    assert torch.equal(SamplerSettings(**settings).sigmas(lambda steps: own), own)
    for shift, expected in ((None, 3.0), (5.0, 5.0)):
        sampler = SamplerSettings(**settings, schedule="shifted_linear", shift=shift)
        assert torch.equal(sampler.sigmas(lambda s: own), shifted_linear_sigmas(2, expected))
    with pytest.raises(ValueError, match=r"shift: 5\.0 has no effect on schedule model"):
        SamplerSettings(**settings, shift=5.0)


def test_guard_needs_an_sde():
    cps = SamplerSettings(steps=5, train_steps=3, sde="cps")
    with pytest.raises(ValueError, match=r"sampler\.sde: cps has no ratio.*use flow or dance"):
        GRPOGuard.check(GRPOGuardSettings(), cps)
    GRPOGuard.check(GRPOGuardSettings(), SamplerSettings(steps=5, train_steps=3, sde="dance"))


@pytest.mark.parametrize("name", FAMILY)
def test_the_last_step_is_never_trained(name):
    plugin, settings, own, _ = FAMILY[name]
    with pytest.raises(ValueError, match=r"sampler\.train_steps: 5 of 5 steps.*at most 4"):
        plugin.check(settings(**own), SamplerSettings(steps=5, train_steps=5))
