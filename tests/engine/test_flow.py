"""Schedules and transition tables against published numbers, diffusers and hand-written steps."""

import math

import pytest
import torch

from gardo.flow import (
    COLUMNS,
    VARIANTS,
    compress_tail,
    flux_sigmas,
    sd3_sigmas,
    shifted_linear_sigmas,
    transitions,
)
from gardo_kernels import STEP_COLUMNS, sde_step

X = torch.tensor([[0.5, -1.0, 0.25, 2.0]], dtype=torch.float64)
V = torch.tensor([[0.1, -0.2, 0.3, -0.4]], dtype=torch.float64)
EPS = torch.tensor([[1.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
V_NEW = V + torch.tensor([[0.01, -0.02, 0.005, 0.0]], dtype=torch.float64)
SIGMAS = torch.tensor([1.0, 0.96, 0.9, 0.8, 0.3], dtype=torch.float64)  # step 2 is .9 -> .8

SD3_10 = [1, 0.96012931, 0.91334895, 0.85769231, 0.79036827, 0.70727848, 0.60215054, 0.46487603,
          0.27804878, 0.00892857, 0]  # fmt: skip
FLUX_6 = [1, 0.90373557, 0.78970484, 0.65248946, 0.48421845, 0.27300333, 0]


def close(actual, expected, rtol=1e-6, atol=0.0):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


def at(table, name, step=2):
    return table.column(name)[step].item()


def mean_of(table, step, v=V):
    return at(table, "A", step) * X + at(table, "B", step) * v


def log_prob(table, step, x_next, v):
    error = (x_next - mean_of(table, step, v)).square().mean().item()
    return -at(table, "h", step) * error + at(table, "log_std_term", step)


def test_a_table_begins_with_the_kernels_columns():
    assert COLUMNS[: len(STEP_COLUMNS)] == STEP_COLUMNS


def test_published_schedules():
    for sigmas, expected in ((sd3_sigmas(10), SD3_10), (flux_sigmas(6, 1024), FLUX_6)):
        assert sigmas.dtype == torch.float64
        close(sigmas, expected, rtol=0, atol=5e-9)
        assert sigmas[0] == 1 and sigmas[-1] == 0
    linear = shifted_linear_sigmas(4)
    close(linear, [1, 0.9, 0.75, 0.5, 0], rtol=1e-14)
    close(shifted_linear_sigmas(4, shift=1.0), [1, 0.75, 0.5, 0.25, 0], rtol=1e-14)


def test_flux_shift_is_linear_in_the_tokens():
    for tokens, mu in ((256, 0.5), (4096, 1.15), (1024, 0.63)):
        middle = math.exp(mu) / (math.exp(mu) + 1)  # u = 1/2 is the second of two steps
        close(flux_sigmas(2, tokens)[1], middle, rtol=1e-12)


@pytest.mark.parametrize("steps", [1, 6, 28])
@pytest.mark.parametrize("tokens", [64, 1024, 4096])
def test_flux_schedule_is_diffusers(steps, tokens):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        {
            "num_train_timesteps": 1000,
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        }
    )
    u = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
    scheduler.set_timesteps(sigmas=u, mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    close(scheduler.sigmas, flux_sigmas(steps, tokens), rtol=3e-7)


@pytest.mark.parametrize(("steps", "shift"), [(1, 3.0), (10, 3.0), (28, 3.0), (10, 1.0), (7, 5.0)])
def test_sd3_schedule_is_diffusers(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        {"num_train_timesteps": 1000, "shift": shift}
    )
    scheduler.set_timesteps(steps)
    close(scheduler.sigmas, sd3_sigmas(steps, shift), rtol=1e-6)


def test_golden_flow_sde():
    table = transitions(SIGMAS, "flow", 0.7)
    close(mean_of(table, 2), [[0.36505, -0.7301, 0.1514, 1.5598]])
    close(mean_of(table, 0), [[0.3735, -0.747, 0.17675, 1.526]])
    close(table.column("std")[[0, 2]], [0.7, 0.66407831])
    x_next = mean_of(table, 2) + at(table, "std") * EPS
    old, new = log_prob(table, 2, x_next, V), log_prob(table, 2, x_next, V_NEW)
    assert old == pytest.approx(-0.79083333, rel=1e-6)
    assert new == pytest.approx(-0.79235890, rel=1e-6)
    assert math.exp(new - old) == pytest.approx(0.99847560, rel=1e-6)
    difference = (V_NEW - V).square().mean().item()
    assert at(table, "kl_flow_grpo") * difference == pytest.approx(2.30658e-7, rel=1e-5)
    assert at(table, "kl_gaussian") * difference == pytest.approx(2.30658e-6, rel=1e-5)
    u = at(table, "u_scale") * EPS
    guard = math.exp(at(table, "guard") * (u * (V_NEW - V)).mean().item())
    assert guard == pytest.approx(0.99898895, rel=1e-6)
    # g from the table: KL scale B^2 / (2 g^2)
    g = [abs(at(table, "B", t)) / math.sqrt(2 * at(table, "kl_flow_grpo", t)) for t in (0, 2)]
    close(torch.tensor(g), [3.5, 2.1])


def test_golden_dance_and_cps():
    for variant, level, mean, std, old, ratio in (
        ("dance", 0.3, [0.48745, -0.9749, 0.2186, 2.0302], 0.09486833, 1.15507682, 0.99135660),
        (
            "cps",
            0.8,
            [0.20807893, -0.41615787, 0.06521981, 0.95653865],
            0.76084521,
            -0.32562306,
            0.99807886,
        ),
    ):
        table = transitions(SIGMAS, variant, level)
        close(mean_of(table, 2), [mean])
        assert at(table, "std") == pytest.approx(std, rel=1e-6)
        x_next = mean_of(table, 2) + at(table, "std") * EPS
        log_old, log_new = log_prob(table, 2, x_next, V), log_prob(table, 2, x_next, V_NEW)
        assert log_old == pytest.approx(old, rel=1e-6)
        assert math.exp(log_new - log_old) == pytest.approx(ratio, rel=1e-6)


def test_published_coefficients():
    sd3 = transitions(sd3_sigmas(10), "flow", 0.7)
    flux = transitions(flux_sigmas(6, 1024), "flow", 0.9)
    weights = [2 * t.column("h") * t.column("B") ** 2 for t in (sd3, flux)]
    half_digit = 5e-3  # three digits are published
    close(weights[0], [0.00324, 0.00615, 0.0167, 0.0353, 0.0697, 0.138, 0.287, 0.680, 2.21, 3.14],
          rtol=half_digit)  # fmt: skip
    close(weights[1], [0.0114, 0.0296, 0.0891, 0.218, 0.548, 1.77], rtol=half_digit)
    close(
        sd3.column("std"),
        [0.7, 0.74296, 0.53615, 0.44590, 0.39179, 0.35280, 0.31907, 0.28201, 0.22536, 0.00628],
        rtol=0,
        atol=5.5e-6,
    )
    close(
        flux.column("std"), [0.9, 0.93120, 0.64604, 0.50588, 0.40077, 0.28817], rtol=0, atol=5.5e-6
    )


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_columns_agree_with_one_another(variant):
    sigmas = sd3_sigmas(8)
    table = transitions(sigmas, variant, 0.6)
    assert table.steps == 8 and table.table_TK.shape == (8, len(COLUMNS))
    assert table.table_TK.dtype == torch.float32 and table.table_TK.isfinite().all()
    c = {name: table.column(name).double() for name in COLUMNS}
    close(c["sigma"], sigmas[:-1])
    close(c["sigma_next"], sigmas[1:])
    close(c["dt"], sigmas[1:] - sigmas[:-1])
    close(c["kl_velocity"], torch.ones(8))
    noisy = c["std"] > 0
    assert torch.equal(table.scored, noisy)
    assert noisy.tolist() == {
        "flow": [True] * 8,
        "dance": [True] * 8,
        "cps": [True] * 7 + [False],
        "ode": [False] * 8,
        "dpm2": [False] * 8,
    }[variant]  # fmt: skip
    B, std = c["B"][noisy], c["std"][noisy]
    close(c["u_scale"][noisy], std / B)
    close(c["kl_gaussian"][noisy], B**2 / (2 * std**2))
    if variant == "cps":
        assert (c["h"][noisy] == 1).all() and (c["log_std_term"] == 0).all()
        assert (c["guard"] == 0).all()
        close(c["kl_flow_grpo"], c["kl_gaussian"])
    else:
        close(c["h"][noisy], 1 / (2 * std**2))
        close(c["log_std_term"][noisy], -std.log() - math.log(2 * math.pi) / 2, atol=1e-6)
        close(c["guard"][noisy], B**2 / std)
        # without the sqrt(-dt) in its std, the release's KL is |dt| times the true one
        close(c["kl_flow_grpo"][noisy], (-c["dt"] * c["kl_gaussian"])[noisy], rtol=3e-6)
    for name in ("h", "log_std_term", "kl_flow_grpo", "kl_gaussian", "u_scale", "guard"):
        assert (c[name][~noisy] == 0).all(), name
    assert (c["C"] != 0).any() == (variant == "dpm2")


@pytest.mark.parametrize("variant", ["flow", "dance", "cps", "ode"])
def test_without_noise_every_sampler_is_euler(variant):
    sigmas = flux_sigmas(5, 256)
    table, euler = transitions(sigmas, variant, 0.0), transitions(sigmas, "ode")
    torch.testing.assert_close(table.table_TK, euler.table_TK, rtol=1e-6, atol=1e-7)
    assert not table.scored.any()


@pytest.mark.parametrize("variant", ["flow", "dance", "cps"])
def test_marginals_are_kept(variant):
    """From x = (1 - s) x0 + s eps and v = eps - x0 a step must reach (1 - s') x0 + s' eps' in law.

    CPS does so exactly, the SDEs up to dt^2 in the variance.
    """
    errors = []
    for steps in (100, 200):
        sigmas = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        t = transitions(sigmas, variant, 0.4)
        A, B, std = (t.column(k).double() for k in ("A", "B", "std"))
        s, s_next = sigmas[:-1], sigmas[1:]
        close(A * (1 - s) - B, 1 - s_next)  # the factor of x0: exact
        variance = (A * s + B) ** 2 + std**2
        errors.append((variance - s_next**2).abs().max().item())
    if variant == "cps":
        assert max(errors) < 1e-6
    else:
        assert errors[0] / errors[1] == pytest.approx(4.0, rel=0.15)


def test_a_window_is_stochastic_and_the_rest_euler():
    sigmas = shifted_linear_sigmas(6)
    window = torch.tensor([False, True, True, False, False, False])
    names = ["ode", "flow", "flow", "ode", "ode", "ode"]
    table = transitions(sigmas, names, 0.7)
    assert torch.equal(table.scored, window)
    full, euler = transitions(sigmas, "flow", 0.7), transitions(sigmas, "ode")
    assert torch.equal(table.table_TK[window], full.table_TK[window])
    assert torch.equal(table.table_TK[~window], euler.table_TK[~window])
    assert torch.equal(transitions(sigmas, ["flow"] * 6, 0.7).table_TK, full.table_TK)


def test_a_dpm2_tail_begins_at_first_order():
    """After an SDE window the solver has no earlier prediction of its own."""
    sigmas = shifted_linear_sigmas(7)
    table = transitions(sigmas, ["ode", "flow", "dpm2", "dpm2", "dpm2", "dpm2", "dpm2"], 0.7)
    whole, euler = transitions(sigmas, "dpm2"), transitions(sigmas, "ode")
    assert (table.column("C") != 0).tolist() == [False] * 3 + [True] * 3 + [False]
    assert torch.equal(table.table_TK[3:6], whole.table_TK[3:6])
    for step in (0, 2, 6):
        assert torch.equal(table.table_TK[step], euler.table_TK[step])
    late = transitions(sigmas[2:], "dpm2")  # only after sigma 1 is the second step Euler's
    assert torch.equal(late.table_TK[1:4], whole.table_TK[3:6])


def test_what_the_model_is_told():
    """DanceGRPO's T = 16, shift 3: s = 3 k / (16 + 2 k) for k = 16 .. 1, cut to thousandths."""
    sigmas = shifted_linear_sigmas(16)
    exact, whole = (transitions(sigmas, "ode", model_time=m) for m in ("exact", "integer"))
    assert torch.equal(exact.column("model_sigma"), exact.column("sigma"))
    told = [1000 * 3 * k // (16 + 2 * k) / 1000 for k in range(16, 0, -1)]
    assert told[:5] == [1.0, 0.978, 0.954, 0.928, 0.9]
    close(whole.column("model_sigma"), told, rtol=1e-7)
    for name in set(COLUMNS) - {"model_sigma"}:
        assert torch.equal(whole.column(name), exact.column(name))


@pytest.mark.parametrize(("start", "steps"), [(0, 5), (3, 4), (4, 8), (11, 1), (4, 3)])
def test_a_compressed_tail_keeps_the_schedules_shift(start, steps):
    """The tail is linear before the shift, from the window's end to 0, whatever the shift."""
    T = 12

    def expected(shift):
        u = torch.cat([
            torch.linspace(1, 0, T + 1, dtype=torch.float64)[:start],
            torch.linspace(1 - start / T, 0, steps + 1, dtype=torch.float64),
        ])  # fmt: skip
        return shift * u / (1 + (shift - 1) * u)

    close(compress_tail(shifted_linear_sigmas(T), start, steps), expected(3.0), atol=1e-12)
    flux = compress_tail(flux_sigmas(T, 1024), start, steps)
    close(flux, expected(math.exp(0.63)), atol=1e-12)


def test_a_compressed_tail_by_hand():
    """Every second step of a linear schedule, and a schedule that shifts nothing linear."""
    linear = shifted_linear_sigmas(10, 1.0)
    close(compress_tail(linear, 4, 3), [1, 0.9, 0.8, 0.7, 0.6, 0.4, 0.2, 0], atol=1e-12)
    close(compress_tail(sd3_sigmas(10), 4, 6), SD3_10, rtol=0, atol=5e-9)
    close(compress_tail(sd3_sigmas(10), 4, 3), [*SD3_10[:5], *SD3_10[6:10:2], 0], rtol=0, atol=5e-9)
    sd3 = compress_tail(sd3_sigmas(25), 7, 7)
    assert len(sd3) == 15 and (sd3.diff() < 0).all() and sd3[-1] == 0
    close(compress_tail(torch.tensor([1.0, 0.0]), 0, 1), [1, 0])


def test_rows_and_columns():
    table = transitions(sd3_sigmas(5), "flow", 0.7)
    index = torch.tensor([4, 0, 0, 3])
    assert torch.equal(table.rows(index, "B"), table.column("B")[index])
    assert table.to("meta").table_TK.device.type == "meta"
    with pytest.raises(ValueError, match=r"no column 'beta'; the columns are sigma, A, B"):
        table.column("beta")
    with pytest.raises(ValueError, match="no column"):
        table.rows(index, "beta")


def run(table, x, velocity, sigmas):
    """Sample with the table as the engine does: m_prev is kept from step to step."""
    m_prev = torch.zeros_like(x)
    for t in range(table.steps):
        v = velocity(x, sigmas[t].item())
        step_R = torch.full((len(x),), t)
        out = sde_step(x, v, table.table_TK, step_R, m_prev=m_prev, keep_m=True)
        x, m_prev = out.x, out.m
    return x


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_dpm2_is_diffusers_solver(name):
    """DPMSolverMultistepScheduler (flow, midpoint, order 2) on our sigmas, a curved velocity."""
    diffusers = pytest.importorskip("diffusers")
    sigmas = {"flux": flux_sigmas(9, 1024), "sd3": sd3_sigmas(9)}[name]
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(9)
    scheduler.sigmas = sigmas.clone()
    scheduler.timesteps = sigmas[:-1] * 1000

    def velocity(x, s):
        return torch.tanh(2 * x) - s * x.square()

    start = torch.linspace(-1, 1, 7, dtype=torch.float64)[None]
    x = start
    for t, timestep in enumerate(scheduler.timesteps):
        out = velocity(x, sigmas[t].item())
        if t == 1:
            # diffusers starts second order here, with a slope of h / h_prev = h / inf = 0
            assert scheduler.lower_order_nums == 1
        x = scheduler.step(out, timestep, x, return_dict=False)[0]
    ours = run(transitions(sigmas, "dpm2"), start, velocity, sigmas)
    torch.testing.assert_close(ours, x, rtol=2e-6, atol=2e-6)  # our table is fp32
    euler = run(transitions(sigmas, "ode"), start, velocity, sigmas)
    assert (euler - x).abs().max() > 1e-3


def test_dpm2_by_the_formula():
    sigmas = flux_sigmas(6, 1024)
    table = transitions(sigmas, "dpm2")
    generator = torch.Generator().manual_seed(0)
    x, v, m_prev = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    s = sigmas.tolist()
    for t in range(6):
        m = x - s[t] * v
        if t in (0, 1, 5):
            slope, shrink = torch.zeros_like(m), s[t + 1] / s[t]
            expected = shrink * x + (1 - shrink) * m
        else:
            lam = [math.log((1 - q) / q) for q in s[t - 1 : t + 2]]
            h, h_prev = lam[2] - lam[1], lam[1] - lam[0]
            slope = (m - m_prev) * h / h_prev
            factor = -(1 - s[t + 1]) * (math.exp(-h) - 1)
            expected = s[t + 1] / s[t] * x + factor * (m + slope / 2)
        A, B, C = (table.column(k)[t].double() for k in "ABC")
        torch.testing.assert_close(A * x + B * v + C * m_prev, expected, rtol=1e-6, atol=1e-6)


def test_dpm2_is_second_order():
    """Data N(1, .5^2) has the flow x_s = (1-s) + sqrt(.25 (1-s)^2 + s^2) z with z kept."""

    def spread(s):
        return math.sqrt(0.25 * (1 - s) ** 2 + s**2)

    def velocity(x, s):
        slope = (s - 0.25 * (1 - s)) / spread(s) ** 2
        return -1 + slope * (x - (1 - s))

    z = torch.tensor([[-1.5, 0.3, 2.0]], dtype=torch.float64)
    exact = 0.7 + spread(0.3) * z
    errors = {}
    for variant in ("ode", "dpm2"):
        for steps in (40, 80):
            sigmas = torch.linspace(1.0, 0.3, steps + 1, dtype=torch.float64)
            out = run(transitions(sigmas, variant), z.clone(), velocity, sigmas)
            errors[variant, steps] = (out - exact).abs().max().item()
    assert errors["ode", 40] / errors["ode", 80] == pytest.approx(2, rel=0.15)
    assert errors["dpm2", 40] / errors["dpm2", 80] == pytest.approx(4, rel=0.2)
    assert errors["dpm2", 80] < errors["ode", 80] / 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transitions(SIGMAS, "ddim"), "'ddim' is unknown; choose one of flow, dance, cps"),
        (lambda: transitions(SIGMAS, "flow", -0.1), "noise_level is -0.1"),
        (lambda: transitions(SIGMAS, "flow", math.nan), "noise_level is nan"),
        (lambda: transitions(SIGMAS, "flow", math.inf), "noise_level is inf"),
        (lambda: transitions(SIGMAS, "cps", 1.1), "'cps' takes 0 to 1"),
        (lambda: transitions(SIGMAS.flip(0), "flow", 0.7), "must decrease"),
        (lambda: transitions(SIGMAS[[0, 1, 1, 2]], "ode"), "must decrease"),
        (lambda: transitions(SIGMAS - 0.5, "ode"), r"within \[0, 1\]"),
        (lambda: transitions(SIGMAS + 0.5, "ode"), r"within \[0, 1\]"),
        (lambda: transitions(SIGMAS * math.nan, "ode"), "finite"),
        (lambda: transitions(SIGMAS[:1], "ode"), r"shape \(1,\)"),
        (lambda: transitions(SIGMAS[None], "ode"), r"shape \(1, 5\)"),
        (
            lambda: transitions(SIGMAS, ["flow", "ode", "ddim", "ode"], 0.7),
            "'ddim' is unknown; choose one of flow, dance, cps",
        ),
        (lambda: transitions(SIGMAS, ["flow"] * 5, 0.7), "5 variants for 4 steps"),
        (lambda: transitions(SIGMAS, "ode", model_time="float"), "'float' is unknown; .* exact"),
        (lambda: compress_tail(SIGMAS, 2, 0), "0 steps cannot replace the 2 from step 2 on"),
        (lambda: compress_tail(SIGMAS, 2, 3), "3 steps cannot replace the 2 from step 2 on"),
        (lambda: sd3_sigmas(0), "steps is 0"),
        (lambda: flux_sigmas(0, 1024), "steps is 0"),
        (lambda: flux_sigmas(4, 0), "image_tokens is 0"),
        (lambda: flux_sigmas(4, 64, base_tokens=64, max_tokens=64), "both 64"),
        (lambda: sd3_sigmas(4, shift=0.0), "shift is 0"),
        (lambda: shifted_linear_sigmas(4, shift=math.nan), "shift is nan"),
    ],
)
def test_bad_inputs(call, message):
    with pytest.raises(ValueError, match=message):
        call()
