"""Sampling on any split of the ranks, recorded steps, teachers, updates."""

import math
from contextlib import contextmanager

import pytest
import torch

from gardo.distributed.local import LocalEngine
from gardo.distributed.optimizers import OptimizerSettings
from gardo.flow import sd3_sigmas, transitions
from gardo.rollout import batch_of, parts, recorded_points, rows_of, sample, teach
from gardo.types import Credit, Points, SamplePlan
from tests.engine.algorithms.linear_policy import CPU, GROUP, LinearPolicy

PROMPTS = ("a red circle", "two squares", "five green stars on a hill")
SIGMAS = sd3_sigmas(6)


def plan_of(variant="flow", record=(0, 1, 2), level=0.7, **fields):
    return SamplePlan(transitions=transitions(SIGMAS, variant, level), record=record, **fields)


def draw(plan, *, policy=None, first=0, count=12, seed=7, step=3, micro_batch=None, **more):
    return sample(
        policy or LinearPolicy(),
        PROMPTS,
        plan,
        images_per_prompt=GROUP,
        first=first,
        count=count,
        seed=seed,
        step=step,
        device=CPU,
        micro_batch=micro_batch,
        **more,
    )


def spread(values, like):
    return values.view(*values.shape, *[1] * (like.dim() - values.dim()))


# ---- one batch, however it is cut -------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[(0, 6), (6, 6)], [(0, 3), (3, 9)], [(0, 12)]])
@pytest.mark.parametrize("micro_batch", [None, 1, 5])
@pytest.mark.parametrize("same_initial_noise", [False, True])
def test_any_split_over_ranks_draws_the_same_samples(cuts, micro_batch, same_initial_noise):
    plan = plan_of(same_initial_noise=same_initial_noise)
    whole = draw(plan)
    parts = [draw(plan, first=f, count=c, micro_batch=micro_batch) for f, c in cuts]

    def joined(name):
        return torch.cat([getattr(part, name) for part in parts])

    assert torch.equal(joined("sample_B"), torch.arange(12))
    assert torch.equal(joined("group_B"), torch.arange(12) // GROUP)
    assert sum((part.prompts for part in parts), ()) == whole.prompts
    assert whole.prompts == tuple(p for p in PROMPTS for _ in range(GROUP))
    text = torch.cat([rows_of(p.conditioning, p.prompt_B)["text"] for p in parts])
    assert torch.equal(text, LinearPolicy().encode(whole.prompts)["text"])
    assert torch.equal(joined("u_BTX"), whole.u_BTX), "the noise of the steps"
    assert torch.equal(joined("state_BTX")[:, 0], whole.state_BTX[:, 0]), "the first latents"
    for name in ("state_BTX", "velocity_BTX", "final_BX", "images_B3HW"):
        torch.testing.assert_close(joined(name), getattr(whole, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("count", "calls"), [(12, 3), (10, 2), (3, 1)])
def test_short_calls_are_filled_up(count, calls):
    """And what fills them up is nowhere in the rollout."""
    policy, plan = LinearPolicy(), plan_of()
    usual, filled = draw(plan, count=count), draw(plan, policy=policy, count=count, micro_batch=5,
                                                  fill=True)  # fmt: skip
    assert policy.calls == [5] * 6 * calls
    for name in ("state_BTX", "u_BTX", "velocity_BTX", "final_BX", "images_B3HW"):
        torch.testing.assert_close(getattr(filled, name), getattr(usual, name))


def test_noise_differs_between_samples_steps_and_seeds():
    base = draw(plan_of())
    noise = [base.state_BTX[:, 0], *base.u_BTX.unbind(1)]
    noise += [n for o in (draw(plan_of(), step=4), draw(plan_of(), seed=8))
              for n in (o.state_BTX[:, 0], *o.u_BTX.unbind(1))]  # fmt: skip
    rows = torch.cat([n.flatten(1) / n.std() for n in noise])
    assert torch.pdist(rows).min() > 0.1
    assert len(torch.cat(noise).unique()) > 0.99 * rows.numel()


def test_one_first_latent_for_a_group():
    together = draw(plan_of(same_initial_noise=True))
    first = together.state_BTX[:, 0].view(3, GROUP, 3, 2)
    assert torch.equal(first, first[:, :1].expand_as(first))
    assert torch.pdist(first[:, 0].flatten(1)).min() > 0.1
    assert torch.pdist(together.final_BX.flatten(1)).min() > 0.1, "later noise is each sample's own"
    apart = draw(plan_of())
    assert torch.pdist(apart.state_BTX[:, 0].flatten(1)).min() > 0.1
    assert torch.equal(apart.u_BTX, together.u_BTX)


# ---- what a step recorded ---------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "level"), [("flow", 0.7), ("dance", 0.3), ("cps", 0.8)])
def test_recorded_noise_is_the_step(variant, level):
    plan = plan_of(variant, record=tuple(range(6)), level=level)
    rollout = draw(plan)
    table = plan.transitions
    x = rollout.state_BTX.double()
    x_next = torch.cat([x[:, 1:], rollout.final_BX[:, None].double()], 1)
    A, B = (spread(table.column(n)[None].double(), x) for n in ("A", "B"))
    moved = B * (rollout.velocity_BTX + rollout.u_BTX).double()
    torch.testing.assert_close(x_next - A * x, moved, rtol=1e-4, atol=1e-5)
    spread_T = (rollout.u_BTX * spread(table.column("B")[None], x)).square().mean((0, 2, 3)).sqrt()
    torch.testing.assert_close(spread_T, table.column("std"), rtol=0.3, atol=0)
    if variant == "cps":
        assert not rollout.u_BTX[:, -1].any(), "no noise at sigma 0"


def test_recorded_velocity_is_the_models():
    policy = LinearPolicy()
    rollout = draw(plan_of(record=(1, 4)), policy=policy)
    assert rollout.step_T.tolist() == [1, 4]
    assert rollout.state_BTX.shape == (12, 2, 3, 2)
    assert rollout.state_BTX.dtype == rollout.u_BTX.dtype == torch.float32
    points = recorded_points(rollout)
    assert points.sample_R.tolist() == [i for i in range(12) for _ in range(2)]
    assert points.step_R.tolist() == [1, 4] * 12
    torch.testing.assert_close(points.sigma_R, SIGMAS[[1, 4]].float().repeat(12))
    assert torch.equal(points.extra["h"], rollout.transitions.column("h")[[1, 4]].repeat(12))
    with torch.no_grad():
        again = policy.velocity(
            points.x_RX, points.sigma_R, rows_of(rollout.conditioning, points.prompt_R)
        )
    torch.testing.assert_close(points.velocities["rollout"], again, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rollout.images_B3HW, policy.decode(rollout.final_BX))
    row = 2 * 7 + 1  # sample 7, second recorded step
    assert torch.equal(points.x_RX[row], rollout.state_BTX[7, 1])
    assert torch.equal(points.extra["u"][row], rollout.u_BTX[7, 1])


def test_velocities_are_kept_in_the_models_dtype():
    rollout = draw(plan_of(), policy=LinearPolicy(torch.bfloat16))
    assert rollout.velocity_BTX.dtype == torch.bfloat16
    # the model is given the state in its own dtype: one rounding of 2^-9 a step, and one of v
    exact = draw(plan_of()).velocity_BTX
    torch.testing.assert_close(rollout.velocity_BTX.float(), exact, rtol=0, atol=4 * 2.0**-9)


def test_nothing_recorded():
    rollout = draw(plan_of("ode", record=()))
    assert rollout.state_BTX.shape == (12, 0, 3, 2)
    assert rollout.final_BX.shape == (12, 3, 2)


@torch.no_grad()
def integrate(policy, rollout, second_order):
    """Euler, or DPM-Solver++(2M) as it is printed, from the first recorded latents."""
    conditioning = rows_of(rollout.conditioning, rollout.prompt_B)
    x, m_before, s = rollout.state_BTX[:, 0], None, SIGMAS.tolist()
    for t in range(6):
        v = policy.velocity(x, torch.full((12,), s[t]), conditioning)
        m = x - s[t] * v
        if second_order and 2 <= t < 5:
            last, here, after = (math.log((1 - s[i]) / s[i]) for i in (t - 1, t, t + 1))
            h = after - here
            correction = (m - m_before) * h / (here - last)
            x = s[t + 1] / s[t] * x - (1 - s[t + 1]) * math.expm1(-h) * (m + correction / 2)
        else:
            x = x + (s[t + 1] - s[t]) * v
        m_before = m
    return x


def test_deterministic_samplers_against_hand_written_ones():
    policy, finals = LinearPolicy(), {}
    for variant in ("ode", "dpm2"):
        rollout = draw(plan_of(variant, record=(0, 3)), policy=policy)
        finals[variant] = rollout.final_BX
        by_hand = integrate(policy, rollout, variant == "dpm2")
        torch.testing.assert_close(rollout.final_BX, by_hand, rtol=1e-5, atol=1e-5)
        assert not rollout.u_BTX.any()
    assert (finals["ode"] - finals["dpm2"]).abs().max() > 1e-3


# ---- teachers ---------------------------------------------------------------------------------


class TwoRanks:
    """This rank, and another that wants `other` rows."""

    def __init__(self, other):
        self.other = other

    def agree_max(self, value):
        return max(value, self.other)


@pytest.mark.parametrize(
    ("mine", "other", "calls"),
    [
        ([], 0, []),
        ([], 7, [1, 1, 1]),  # the other rank alone: this one keeps up
        ([3, 20], 7, [2, 1, 1]),
        ([0, 1, 2, 5, 9, 30, 35], 0, [3, 3, 1]),
        ([0, 1, 2, 5, 9, 30, 35], 2, [3, 3, 1]),
    ],
)
@pytest.mark.parametrize("fill", [False, True])
def test_every_rank_calls_the_teacher_as_often(mine, other, calls, fill):
    policy = LinearPolicy(torch.bfloat16)
    rollout = draw(plan_of())
    points = recorded_points(rollout)
    rows = torch.zeros(36, dtype=torch.bool)
    rows[mine] = True
    entered = []

    class Reader(TwoRanks):
        @contextmanager
        def reading(self, weights):
            entered.append(weights)
            yield

    taught = teach(
        points,
        {"reference": rows},
        policy=policy,
        conditioning=rollout.conditioning,
        engine=Reader(other),
        micro_batch=3,
        fill=fill,
    )
    assert policy.calls == ([3] * len(calls) if fill else calls)
    assert entered == (["reference"] if calls else []), "no exchange of weights for nothing"
    velocity = taught.velocities["reference"]
    assert velocity.shape == points.x_RX.shape and velocity.dtype == torch.bfloat16
    assert not velocity[~rows].any()
    expected = policy.velocity(
        points.x_RX, points.sigma_R, rows_of(rollout.conditioning, points.prompt_R)
    )
    torch.testing.assert_close(velocity[rows].float(), expected[rows], rtol=1e-2, atol=1e-2)
    assert velocity[rows].flatten(1).any(1).all()
    assert "rollout" in taught.velocities and not velocity.requires_grad


def test_teachers_speak_with_their_own_weights():
    policy, rollout = LinearPolicy(), draw(plan_of())
    engine = LocalEngine(
        dict(policy.named_parameters()),
        optimizer=OptimizerSettings(),
        accumulation=1,
        max_grad_norm=1.0,
        device=CPU,
    )
    slots = engine.make_slots(("old",))
    points = recorded_points(rollout)
    with torch.no_grad():
        policy.net.weight += 0.5
    everything = torch.ones(36, dtype=torch.bool)
    taught = teach(
        points,
        {"old": everything, "train": everything},
        policy=policy,
        conditioning=rollout.conditioning,
        engine=engine,
        micro_batch=10,
    )
    old, now = taught.velocities["old"], taught.velocities["train"]
    torch.testing.assert_close(old, points.velocities["rollout"], rtol=1e-5, atol=1e-6)
    assert (old - now).abs().max() > 0.01
    assert slots.exchanged is None


# ---- updates and micro-batches ----------------------------------------------------------------


def split(first, count, *, updates, micro_batch, step=0, steps=3, seed=5):
    """The samples of each update of a rank, and the sizes of its micro-batches."""
    sample_R = torch.arange(count).repeat_interleave(steps)
    points = Points(
        sample_R=sample_R,
        prompt_R=sample_R,
        step_R=torch.arange(steps).repeat(count),
        sigma_R=torch.ones(len(sample_R)),
        x_RX=torch.arange(len(sample_R))[:, None],
        extra={"u": torch.arange(len(sample_R))},
    )
    sample_B = torch.arange(first, first + count)
    credit = Credit(advantage_B=sample_B.float(), gate_B=sample_B % 3 == 0)
    cut = parts(
        points, sample_B=sample_B, updates=updates, micro_batch=micro_batch, seed=seed, step=step
    )  # fmt: skip
    batches = [batch_of(points, credit, part, rollout=None) for part in cut]
    for batch in batches:
        samples = sample_B[batch.points.sample_R]
        assert torch.equal(batch.advantage_R, samples.float())
        assert torch.equal(batch.gate_R, samples % 3 == 0)
        row = batch.points.extra["u"]
        assert torch.equal(batch.points.x_RX[:, 0], row)
        assert torch.equal(batch.points.sample_R, row // steps)
    sizes = [len(batch.advantage_R) for batch in batches]
    rows = torch.cat([batch.points.extra["u"] for batch in batches]).view(updates, -1)
    assert sorted(rows.flatten().tolist()) == list(range(count * steps)), "each row once"
    shares = []
    for update in rows:
        samples = (first + update // steps).tolist()
        shares.append(set(samples))
        assert len(samples) == steps * len(shares[-1]), "all rows of a sample together"
    return shares, sizes


@pytest.mark.parametrize(("updates", "micro_batch"), [(1, 36), (2, 6), (3, 4), (4, 9)])
def test_each_sample_is_in_one_update(updates, micro_batch):
    shares, sizes = split(0, 12, updates=updates, micro_batch=micro_batch)
    assert sizes == [micro_batch] * (36 // micro_batch)
    assert [len(s) for s in shares] == [12 // updates] * updates
    assert set().union(*shares) == set(range(12))


def test_the_last_micro_batch_holds_the_rest():
    _, sizes = split(0, 12, updates=2, micro_batch=7)
    assert sizes == [7, 7, 4, 7, 7, 4]


@pytest.mark.parametrize(("busiest", "left"), [(0, 4), (3, 4), (7, 8), (9, 12), (12, 12)])
def test_idle_rows_fill_up_what_the_busiest_rank_needs(busiest, left):
    """Three of twelve rows weigh something: whole micro-batches of four, at least one, in order."""
    index = torch.arange(12)
    points = Points(
        sample_R=index, prompt_R=index, step_R=index, sigma_R=torch.ones(12), x_RX=index[:, None]
    )  # fmt: skip
    idle_R = ~torch.isin(index, torch.tensor([1, 5, 10]))
    asked = []

    def agree(mine):
        asked.append(mine)
        return max(mine, busiest)

    cut = parts(
        points, sample_B=index, updates=1, micro_batch=4, seed=1, step=0, idle_R=idle_R,
        agree_max=agree,
    )  # fmt: skip
    rows = torch.cat([part.rows for part in cut]).tolist()
    assert asked == [3] and len(rows) == left and rows == sorted(rows)
    assert {1, 5, 10} <= set(rows)
    assert [part.last for part in cut] == [False] * (len(cut) - 1) + [True]
    assert all(part.share == left / 12 for part in cut)


def test_updates_hold_the_same_samples_on_any_ranks():
    for step in range(4):
        whole, _ = split(0, 24, updates=3, micro_batch=6, step=step)
        for cuts in ([(0, 12), (12, 12)], [(0, 3), (3, 6), (9, 15)]):
            shares = [split(f, c, updates=3, micro_batch=9, step=step)[0] for f, c in cuts]
            assert [set().union(*p) for p in zip(*shares, strict=True)] == whole


def test_updates_are_drawn_anew_each_step():
    drawn = [split(0, 24, updates=2, micro_batch=6, step=s)[0][0] for s in range(6)]
    assert len({frozenset(d) for d in drawn}) == 6
    other = split(0, 24, updates=2, micro_batch=6, seed=6)[0][0]
    assert other != drawn[0]
    # One of each pair of neighbours: no update lacks a group.
    assert all(len({s // 2 for s in d}) == 12 for d in drawn)
