"""Where windows of trained steps stand, and what the sampler does before, in and after them."""

import math
from itertools import pairwise

import pytest
import torch

from gardo.algorithms.base import SamplerSettings
from gardo.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from gardo.algorithms.flow_grpo_fast import FlowGRPOFast, FlowGRPOFastSettings
from gardo.algorithms.mix_grpo import (
    Decay,
    ExpDecay,
    Frozen,
    MixGRPO,
    MixGRPOSettings,
    Progressive,
    Random,
)
from gardo.flow import transitions
from gardo.rollout import rows_of
from tests.engine.algorithms.linear_policy import COUNT, SEED, LinearPolicy, build, roll

WINDOWS = {
    "progressive": Progressive(iterations=2),
    "strided": Progressive(iterations=1, stride=3),
    "random": Random(kind="random"),
    "decay": Decay(kind="decay"),
    "exp_decay": ExpDecay(kind="exp_decay", iterations=3, after=1, rate=0.5),
    "frozen": Frozen(kind="frozen", at=2),
}


def fast(*, steps=10, train_steps=3, seed=SEED):
    return build(
        FlowGRPOFast, FlowGRPOFastSettings(), steps=steps, train_steps=train_steps, seed=seed,
        sde="cps", noise_level=0.8,
    )  # fmt: skip


def mix(window=None, *, steps=7, train_steps=2, seed=SEED, flash=None, **sampler):
    settings = MixGRPOSettings(window=window or Progressive(iterations=1), flash=flash)
    return build(MixGRPO, settings, steps=steps, train_steps=train_steps, seed=seed, **sampler)


def starts(algorithm, iterations):
    return [algorithm.recorded(n).start for n in range(iterations)]


# ---- Flow-GRPO-Fast ---------------------------------------------------------------------------


def test_fast_draws_its_window_in_the_first_half_the_same_on_every_rank():
    here, there = starts(fast(), 600), starts(fast(), 600)
    assert here == there
    counts = [here.count(start) for start in range(10 // 2 - 3 + 1)]
    assert sum(counts) == 600, "a start outside 0 .. T // 2 - w"
    # each is binomial (600, 1/3): 200 +- 11.5; 5 standard deviations
    assert all(abs(count - 200) < 58 for count in counts)
    assert starts(fast(seed=SEED + 1), 600) != here
    repeated = sum(a == b for a, b in pairwise(here))
    assert abs(repeated - 200) < 58, "iterations are not independent"
    assert set(starts(fast(steps=7), 20)) == {0}  # T // 2 = w leaves one place


def test_only_the_window_is_stochastic_and_recorded():
    algorithm = fast(steps=8, train_steps=2)
    sigmas = algorithm.world.sigmas
    noisy, euler = transitions(sigmas, "cps", 0.8), transitions(sigmas, "ode")
    for step in range(12):
        plan, window = algorithm.plan(step), algorithm.recorded(step)
        assert plan.record == tuple(window) and len(plan.record) == 2
        assert plan.transitions.scored.tolist() == [t in window for t in range(8)]
        for t in range(8):
            expected = noisy if t in window else euler
            assert torch.equal(plan.transitions.table_TK[t], expected.table_TK[t])


def test_before_the_window_the_sampler_is_eulers():
    """The first recorded state, from the first latents with plain Euler steps in fp64."""
    algorithm, policy = fast(steps=12), LinearPolicy()
    step = starts(algorithm, 50).index(3)
    rollout = roll(policy, algorithm, step=step)
    assert (
        rollout.step_T.tolist() == [3, 4, 5] and (rollout.u_BTX.abs().amax((0, 2, 3)) > 0.1).all()
    )
    first = roll(policy, build(FlowGRPO, FlowGRPOSettings(), steps=12), step=step)
    x, twin = first.state_BTX[:, 0].double(), LinearPolicy().double()
    conditioning = rows_of(rollout.conditioning, rollout.prompt_B)
    sigmas = algorithm.world.sigmas
    for t in range(3):
        sigma_B = sigmas[t].expand(COUNT)
        x = x + (sigmas[t + 1] - sigmas[t]) * twin.velocity(x, sigma_B, conditioning)
    torch.testing.assert_close(rollout.state_BTX[:, 0].double(), x, rtol=0, atol=1e-5)


# ---- MixGRPO ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "steps", "width", "expected"),
    [
        (Progressive(iterations=2), 7, 2, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 1]),
        (Progressive(iterations=1, stride=2), 7, 2, [0, 2, 4, 0, 2, 4, 0]),
        (Progressive(iterations=1, stride=3), 7, 2, [0, 3, 0, 3]),
        (Progressive(), 25, 4, [n // 25 for n in range(21 * 25)] + [0] * 25 + [1]),
        # m = 5: stays int(4 (1 - s/5) + s/5) for s = 0 .. 4: 4, 3.4, 2.8, 2.2, 1.6
        (Decay(kind="decay", most=4), 7, 2, [0] * 4 + [1] * 3 + [2] * 2 + [3] * 2 + [4] + [0] * 4),
        # ceil(5 e^(-.5 relu(s - 1))): 5, 5, ceil 3.03, ceil 1.84, ceil 1.12
        (
            ExpDecay(kind="exp_decay", iterations=5, after=1, rate=0.5), 7, 2,
            [0] * 5 + [1] * 5 + [2] * 4 + [3] * 2 + [4] * 2 + [0, 0],
        ),
        (Frozen(kind="frozen", at=3), 7, 2, [3] * 9),
    ],
)  # fmt: skip
def test_windows_go_where_they_should(window, steps, width, expected):
    algorithm = mix(window, steps=steps, train_steps=width)
    assert starts(algorithm, len(expected)) == expected


def test_the_papers_numbers_of_iterations():
    """T = 25, w = 4: iterations at each of the starts 0 .. 20, by hand from the formulas."""
    decay = [10, 9, 9, 8, 8, 8, 7, 7, 6, 6, 6, 5, 5, 4, 4, 4, 3, 3, 2, 2, 2]
    assert [Decay(kind="decay").stay(start, 23) for start in range(21)] == decay
    exponential = [25] * 14 + [23, 21, 19, 17, 16, 14, 13]
    assert [ExpDecay(kind="exp_decay").stay(start, 23) for start in range(21)] == exponential


def test_a_drawn_window():
    """Uniform in 0 .. m - w, m = T - 2."""
    drawn = starts(mix(Random(kind="random"), steps=9, train_steps=3), 500)
    assert drawn == starts(mix(Random(kind="random"), steps=9, train_steps=3), 500)
    other = mix(Random(kind="random"), steps=9, train_steps=3, seed=SEED + 1)
    assert starts(other, 500) != drawn
    # each of five is binomial (500, 1/5): 100 +- 8.9; 5 standard deviations
    assert set(drawn) == set(range(5)) and all(abs(drawn.count(s) - 100) < 45 for s in range(5))


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize(("steps", "width"), [(7, 2), (9, 5), (25, 4)])
def test_every_window_is_whole_and_before_the_last_step(window, steps, width):
    algorithm = mix(window, steps=steps, train_steps=width)
    for step in [*range(60), 10**6]:
        plan = algorithm.plan(step)
        assert plan.record == tuple(range(plan.record[0], plan.record[0] + width))
        assert plan.record[0] >= 0 and plan.record[-1] <= steps - 2
        assert plan.transitions.scored.tolist() == [t in plan.record for t in range(steps)]
    assert mix(window, steps=steps, train_steps=width).plan(10**6).record == plan.record
    assert set(algorithm.state_dict()) == {"reference_is_sampler"}, "the window has no state"


# ---- Flash ------------------------------------------------------------------------------------


def test_flash_shortens_what_follows_the_window():
    """T = 25, w = 4: 21 steps after the first window become int(8.4), 1 becomes 1, not none."""
    algorithm = mix(steps=25, train_steps=4, flash=0.4)
    for step, after in ((0, 8), (1, 8), (2, 7), (18, 1), (20, 1)):
        plan = algorithm.plan(step)
        table = plan.transitions
        assert plan.record == tuple(range(step, step + 4))
        assert table.steps == step + 4 + after
        plain = mix(steps=25, train_steps=4).plan(step).transitions
        assert torch.equal(table.table_TK[: step + 4], plain.table_TK[: step + 4])
        assert table.column("sigma_next")[-1] == 0 and (table.column("dt") < 0).all()
        assert (table.column("C") != 0).sum() == max(0, after - 2)  # all but the first and last
    star = mix(Frozen(kind="frozen"), steps=25, train_steps=4, flash=0.2)
    assert {star.plan(step).transitions.steps for step in (0, 30, 500)} == {4 + 4}


def dpm_solver(x, start, sigmas, velocity):
    """DPM-Solver++(2M), midpoint, as its paper has it, from `start` on; the ends first order."""
    lam = [math.inf if s == 0 else math.log((1 - s) / s) if s < 1 else -math.inf for s in sigmas]
    previous = None
    for t in range(start, len(sigmas) - 1):
        s, s_next = sigmas[t], sigmas[t + 1]
        m = x - s * velocity(x, s)
        direction = m
        if previous is not None and t < len(sigmas) - 2:
            h, h_before = lam[t + 1] - lam[t], lam[t] - lam[t - 1]
            direction = m + 0.5 * (h / h_before) * (m - previous)
        x = (s_next / s) * x - (1 - s_next) * math.expm1(lam[t] - lam[t + 1]) * direction
        previous = m
    return x


def test_flash_ends_with_dpm_solver():
    """From the window's last state on, in fp64, over the shifted linear schedule."""
    algorithm = mix(
        Frozen(kind="frozen", at=1), steps=12, flash=0.5, schedule="shifted_linear", shift=2.0
    )
    policy = LinearPolicy()
    rollout = roll(policy, algorithm)
    assert rollout.step_T.tolist() == [1, 2] and rollout.transitions.steps == 3 + 4
    u = [*(1 - k / 12 for k in range(3)), *(0.75 * (1 - k / 4) for k in range(5))]
    sigmas = [2 * value / (1 + value) for value in u]
    conditioning = rows_of(rollout.conditioning, rollout.prompt_B)
    twin = LinearPolicy().double()

    def velocity(x, s):
        return twin.velocity(x, torch.full((COUNT,), s, dtype=torch.float64), conditioning)

    A, B = (rollout.transitions.column(n)[2].double() for n in ("A", "B"))
    x = A * rollout.state_BTX[:, 1].double()
    x = x + B * (rollout.velocity_BTX[:, 1] + rollout.u_BTX[:, 1]).double()
    final = dpm_solver(x, 3, sigmas, velocity)
    torch.testing.assert_close(rollout.final_BX.double(), final, rtol=0, atol=1e-5)
    euler = roll(policy, mix(Frozen(kind="frozen", at=1), steps=12, schedule="shifted_linear"))
    assert (euler.final_BX - rollout.final_BX).abs().max() > 1e-3


# ---- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plugin", "settings", "steps", "width", "message"),
    [
        (FlowGRPOFast, FlowGRPOFastSettings(), 6, 4,
         "sampler.train_steps: a window of 4 does not fit into the first half of 6 .* at most 3"),
        (MixGRPO, MixGRPOSettings(), 6, 6, "sampler.train_steps: 6 of 6 steps"),
        (MixGRPO, MixGRPOSettings(window=Random(kind="random")), 6, 5,
         "sampler.train_steps: a random window of 5 has no place before the last of 6 steps; "
         "at most 4"),
        (MixGRPO, MixGRPOSettings(window=Frozen(kind="frozen", at=3)), 6, 3,
         "sampler.train_steps: a frozen window of 3 has no place before the last of 6 steps; "
         "at most 2"),
        (MixGRPO, MixGRPOSettings(window=Frozen(kind="frozen", at=9)), 6, 3,
         "sampler.train_steps: a frozen window of 3 .* more sampler.steps"),
    ],
)  # fmt: skip
def test_windows_that_do_not_fit_are_refused(plugin, settings, steps, width, message):
    plugin.check(settings, SamplerSettings(steps=99, train_steps=width))
    with pytest.raises(ValueError, match=message):
        plugin.check(settings, SamplerSettings(steps=steps, train_steps=width))


def test_a_step_without_noise_is_never_scored():
    class Misplaced(FlowGRPOFast):
        def recorded(self, step):
            return range(3)

        def transitions(self, step):
            return self.world.transitions(["flow", "ode", "flow", "ode", "ode"])

    algorithm = Misplaced(FlowGRPOFastSettings(), build(FlowGRPO, FlowGRPOSettings()).world)
    with pytest.raises(ValueError, match=r"steps \[0, 1, 2\] are recorded.*no log-probability"):
        algorithm.plan(0)
