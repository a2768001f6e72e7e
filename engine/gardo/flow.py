"""Noise schedules and one-step samplers of flow models, as plain tables.

Sigma runs from 1 (noise) to 0 (image): x_s = (1 - s) x0 + s eps, and the model predicts v = eps -
x0. A sampler step goes from s to s' < s, with dt = s' - s < 0. Every sampler here is affine in what
the model says:

    x' = A x + B v + C m_prev + std z        z ~ N(0, 1)

m_prev = x_prev - s_prev v_prev is the image predicted one step earlier; `dpm2` alone uses it.

    variant  A                      B                                 std^2            h
    flow     1 + g^2 dt / (2 s)     (1 + g^2 (1 - s) / (2 s)) dt      -g^2 dt          1 / (2 std^2)
    dance    the same with g = a
    cps      (1 - s') + s' cos phi  -s (1 - s') + (1 - s) s' cos phi  (s' sin phi)^2   1
    ode      1                      dt                                0                0
    dpm2     1 - q dt / (2 s)       (1 + q / 2) dt                    0                0

    flow: g^2 = a^2 s / (1 - s~), s~ = s except s~ = sigmas[1] when s = 1    cps: phi = a pi / 2
    dpm2: C = q dt / (2 s), q the ratio of two successive steps in log((1 - s) / s)

a is the noise level. Sources: flow is Flow-GRPO's SDE (arXiv 2505.05470), dance DanceGRPO's (arXiv
2505.07818), cps coefficients-preserving sampling as in Flow-GRPO-Fast, dpm2 the midpoint form of
DPM-Solver++(2M) (arXiv 2211.01095).

The log-probability of a step is -h mean((x' - A x - B v)^2) + log_std_term: a mean over the
elements of a sample, not a sum. A row with std = 0 has no log-probability and must not be scored.

`transitions` computes the rows in float64 and stores them in fp32: one small [T, K] table that
moves to the device once and is then read by integer row indices, without host synchronisation. A
new sampler is one more function and its line in VARIANTS; recipes may then name it.

Shapes: T steps, K columns, R rows of a micro-batch (each at its own step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from gardo.types import to_device

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS = (
    # the kernels' STEP_COLUMNS: sigma s, where the step starts; A, B, C; std; u_scale = std / B:
    # u = u_scale z is the noise in velocity units
    "sigma",
    "A",
    "B",
    "C",
    "std",
    "u_scale",
    "model_sigma",  # the time that the model is told: s, or a rounded one (MODEL_TIMES)
    "sigma_next",  # s', where it ends
    "dt",  # s' - s < 0
    "h",  # log-probability scale
    "log_std_term",  # -log std - log(2 pi) / 2; 0 where the variant drops constants
    "kl_flow_grpo",  # KL = column * mean((v - v_ref)^2): B^2 / (2 g^2), Flow-GRPO's scale
    "kl_gaussian",  # B^2 / (2 std^2), the KL of the two Gaussians
    "kl_velocity",  # 1, the squared velocity error itself
    "guard",  # B^2 / std: GRPO-Guard's log ratio is guard * mean(u (v - v_old)); SDEs only
)
_INDEX = {name: k for k, name in enumerate(COLUMNS)}


def flux_sigmas(
    steps: int,
    image_tokens: int,
    *,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
) -> Tensor:
    """Flux's schedule: s = e^mu / (e^mu + 1/u - 1) for u = linspace(1, 1/T, T), then 0.

    mu is linear in the number of packed image tokens ((height / 16) (width / 16) pixels), through
    (base_tokens, base_shift) and (max_tokens, max_shift), and not clamped outside: what
    FluxPipeline does with FlowMatchEulerDiscreteScheduler (`use_dynamic_shifting`, exponential).

    Returns [T + 1] float64. ValueError for steps or image_tokens below 1.
    """
    _check_steps(steps)
    if image_tokens < 1:
        raise ValueError(f"flux_sigmas: image_tokens is {image_tokens}; it must be at least 1")
    if max_tokens == base_tokens:
        raise ValueError(f"flux_sigmas: base_tokens and max_tokens are both {base_tokens}")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    mu = base_shift + slope * (image_tokens - base_tokens)
    u_T = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    return _with_zero(math.exp(mu) / (math.exp(mu) + (1.0 / u_T - 1.0)))


def sd3_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """SD3's schedule: s = shift u / (1 + (shift - 1) u) for u = linspace(1, u_min, T), then 0.

    u_min is itself the shifted 1/1000: diffusers shifts the training sigmas when it builds
    FlowMatchEulerDiscreteScheduler and shifts once more in `set_timesteps`. SD3.5 was released with
    that.

    Returns [T + 1] float64. ValueError for steps below 1 or shift not positive.
    """
    _check_steps(steps)
    _check_shift(shift)
    u_min = _shifted(torch.tensor(1e-3, dtype=torch.float64), shift).item()
    return _with_zero(_shifted(torch.linspace(1.0, u_min, steps, dtype=torch.float64), shift))


def shifted_linear_sigmas(steps: int, shift: float = 3.0) -> Tensor:
    """DanceGRPO's and MixGRPO's schedule: linspace(1, 0, T + 1), shifted once.

    s = shift u / (1 + (shift - 1) u).

    Returns [T + 1] float64, from exactly 1 to exactly 0. ValueError for steps below 1 or shift not
    positive.
    """
    _check_steps(steps)
    _check_shift(shift)
    return _shifted(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64), shift)


def compress_tail(sigmas: Tensor, start: int, steps: int) -> Tensor:
    """A schedule whose steps from `start` on are replaced by `steps` steps, its other steps kept.

    sigmas [T + 1] float64, decreasing to 0. The new steps lie evenly in the schedule's own index:
    1 / s is interpolated linearly in 1 / (T - index). That is exact for any schedule that shifts a
    linear one, such as Flux's and `shifted_linear_sigmas`, whatever its shift.

    Returns [start + steps + 1] float64. ValueError unless 1 <= steps <= T - start.
    """
    T = len(sigmas) - 1
    if not 1 <= steps <= T - start:
        raise ValueError(
            f"compress_tail: {steps} steps cannot replace the {T - start} from step {start} on"
        )
    schedule = sigmas.double().tolist()
    tail = []
    for n in range(steps):
        place = start + n * (T - start) / steps  # at most T - 1, as steps <= T - start
        before, after = int(place), min(int(place) + 1, T - 1)
        share = (place - before) * (T - 1 - before) / (T - place)  # of 1 / (T - index)
        inverse = (1.0 - share) / schedule[before] + share / schedule[after]
        tail.append(1.0 / inverse)
    return torch.tensor([*schedule[:start], *tail, schedule[-1]], dtype=torch.float64)


class Affine(NamedTuple):
    """One sampler step x' = A x + B v + C m_prev + std z with what its log-probability needs."""

    A: float
    B: float
    C: float = 0.0
    std: float = 0.0
    h: float = 0.0
    kl_flow_grpo: float = 0.0


def _sde_row(s: float, s_next: float, g2: float) -> Affine:
    """One Euler-Maruyama step of dx = (v + g^2 (x + (1 - s) v) / (2 s)) ds + g dw."""
    dt = s_next - s
    if g2 == 0.0:
        return Affine(A=1.0, B=dt)
    B = (1.0 + g2 * (1.0 - s) / (2.0 * s)) * dt
    variance = -g2 * dt
    return Affine(
        A=1.0 + g2 * dt / (2.0 * s),
        B=B,
        std=math.sqrt(variance),
        h=1.0 / (2.0 * variance),
        kl_flow_grpo=B * B / (2.0 * g2),
    )


def _flow_row(sigmas: Sequence[float], t: int, noise_level: float) -> Affine:
    s = sigmas[t]
    s_finite = sigmas[1] if s == 1.0 else s  # 1 - s = 0 would make the first step infinitely noisy
    return _sde_row(s, sigmas[t + 1], noise_level**2 * s / (1.0 - s_finite))


def _dance_row(sigmas: Sequence[float], t: int, noise_level: float) -> Affine:
    return _sde_row(sigmas[t], sigmas[t + 1], noise_level**2)


def _cps_row(sigmas: Sequence[float], t: int, noise_level: float) -> Affine:
    s, s_next = sigmas[t], sigmas[t + 1]
    kept = s_next * math.cos(noise_level * math.pi / 2.0)
    B = -s * (1.0 - s_next) + (1.0 - s) * kept
    std = s_next * math.sin(noise_level * math.pi / 2.0)
    if std == 0.0:
        return Affine(A=(1.0 - s_next) + kept, B=B)
    # The release divides by the step's own std, so that its `flow_grpo` KL is the Gaussian one.
    return Affine(
        A=(1.0 - s_next) + kept, B=B, std=std, h=1.0, kl_flow_grpo=B * B / (2.0 * std * std)
    )


def _ode_row(sigmas: Sequence[float], t: int, noise_level: float) -> Affine:
    return Affine(A=1.0, B=sigmas[t + 1] - sigmas[t])


def _dpm2_row(sigmas: Sequence[float], t: int, noise_level: float) -> Affine:
    """x' = (s'/s) x - (1 - s')(e^-h - 1)(m + q (m - m_prev) / 2), m = x - s v, q = h / h_prev.

    h is the step in lambda = log((1 - s) / s). As e^-h = s' (1 - s) / (s (1 - s')), the middle
    factor is just -dt / s, finite also where lambda is not. The first step, one that follows
    sigma 1 (lambda(1) = -inf) and the last are first order, which is Euler.
    """
    s, s_next = sigmas[t], sigmas[t + 1]
    dt = s_next - s
    if t == 0 or sigmas[t - 1] == 1.0 or t == len(sigmas) - 2:
        return Affine(A=1.0, B=dt)
    before, here, after = (math.log((1.0 - sigmas[i]) / sigmas[i]) for i in (t - 1, t, t + 1))
    half_q = 0.5 * (after - here) / (here - before)
    return Affine(A=1.0 - half_q * dt / s, B=(1.0 + half_q) * dt, C=half_q * dt / s)


class Variant(NamedTuple):
    """A sampler."""

    row: Callable[[Sequence[float], int, float], Affine]  # (sigmas, step, noise level)
    stochastic: bool = False
    gaussian: bool = False  # False: its log-probability drops the constants and 1 / (2 std^2)
    most_noise: float = math.inf  # the highest noise level


VARIANTS = {
    "flow": Variant(_flow_row, stochastic=True, gaussian=True),
    "dance": Variant(_dance_row, stochastic=True, gaussian=True),
    "cps": Variant(_cps_row, stochastic=True, most_noise=1.0),
    "ode": Variant(_ode_row),
    "dpm2": Variant(_dpm2_row),
}
SDES = tuple(name for name, variant in VARIANTS.items() if variant.stochastic)
if TYPE_CHECKING:
    Sde = str
else:
    Sde = Literal[SDES]  # what a recipe may name
MODEL_TIMES: dict[str, Callable[[float], float]] = {
    "exact": lambda s: s,
    # whole thousandths, cut off: DanceGRPO, MixGRPO. What is whole up to rounding counts as whole.
    "integer": lambda s: int(round(1000.0 * s, 6)) / 1000.0,
}


@dataclass(frozen=True, eq=False)
class Transitions:
    """The coefficients of every step of a sampler: `table_TK`, fp32, columns named by COLUMNS."""

    table_TK: Tensor
    _sent: dict[torch.device, Transitions] = field(default_factory=dict, init=False, repr=False)

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return self.table_TK.shape[0]

    @property
    def scored(self) -> Tensor:
        """[T] bool: steps that add noise, and so have a log-probability."""
        return self.column("std") > 0

    def column(self, name: str) -> Tensor:
        """One coefficient at every step: [T] fp32. ValueError for a name not in COLUMNS."""
        return self.table_TK[:, _column_index(name)]

    def rows(self, index_R: Tensor, name: str) -> Tensor:
        """One coefficient at the step of each row: index_R [R] int64 in 0..T-1 -> [R] fp32.

        Where the table is; an index that is not there is sent, which waits for nothing.
        """
        return self.table_TK[to_device(index_R, self.table_TK.device), _column_index(name)]

    def log_prob(
        self,
        x_next_RX: Tensor,
        x_RX: Tensor,
        velocity_RX: Tensor,
        step_R: Tensor,
        *,
        m_prev_RX: Tensor | None = None,
    ) -> Tensor:
        """log p(x' | x) of given steps under a velocity, differentiable in it: [R].

        x', x, velocity, m_prev: [R, ...] of equal shape, any floating dtypes; step_R [R] int64 in
        0..T-1. -h mean((x' - A x - B v - C m_prev)^2) + log_std_term, in nats an element (CPS: up
        to a constant and a factor), fp32, or fp64 where x' is. NaN for a step without noise. It
        subtracts numbers of order 1: ratios of two policies are for `gardo_kernels.policy_loss`,
        which takes the difference of the velocities instead.
        """
        dtype = torch.float64 if x_next_RX.dtype == torch.float64 else torch.float32
        A, B, C = (
            self.rows(step_R, name).to(dtype).view(-1, *[1] * (x_RX.ndim - 1)) for name in "ABC"
        )
        mean_RX = A * x_RX.to(dtype) + B * velocity_RX.to(dtype)
        if m_prev_RX is not None:
            mean_RX = mean_RX + C * m_prev_RX.to(dtype)
        error_R = (x_next_RX.to(dtype) - mean_RX).square().flatten(1).mean(1)
        log_prob_R = self.rows(step_R, "log_std_term") - self.rows(step_R, "h") * error_R
        return torch.where(self.rows(step_R, "std") > 0, log_prob_R, torch.nan)

    def to(self, device: torch.device | str) -> Transitions:
        """The same table on another device; it is sent there once, which waits for nothing."""
        device = torch.device(device)
        if device not in self._sent:
            self._sent[device] = Transitions(to_device(self.table_TK, device))
        return self._sent[device]


def transitions(
    sigmas: Tensor,
    variant: str | Sequence[str],
    noise_level: float = 0.0,
    *,
    model_time: str = "exact",
) -> Transitions:
    """The table of a sampler over a schedule (formulas at the top of this file).

    sigmas [T + 1], strictly decreasing within [0, 1]; `variant` is a name of VARIANTS, or one name
    for each step (a window of SDE steps among ODE steps). A run of equal names is a sampler of its
    own: `dpm2` begins it at first order. `noise_level` is a of Flow-SDE, eta of Dance-SDE or the
    CPS level in [0, 1] (unused by `ode` and `dpm2`). `model_time`, a name of MODEL_TIMES, is what
    the model is told of sigma; the coefficients are those of the exact one.

    At s' = 0 the SDEs still add a finite noise, which sampling uses; training leaves the last step
    out. CPS adds none.

    Computed in float64, stored in fp32 on the device of `sigmas`. ValueError names the argument and
    the mend.
    """
    schedule = _checked_schedule(sigmas)
    steps = len(schedule) - 1
    variants = [variant] * steps if isinstance(variant, str) else list(variant)
    _check_names(variants, steps, model_time)
    if not (math.isfinite(noise_level) and noise_level >= 0.0):
        raise ValueError(
            f"transitions: noise_level is {noise_level}; it must be finite and not negative"
        )
    for name in variants:
        if noise_level > VARIANTS[name].most_noise:
            raise ValueError(
                f"transitions: noise_level is {noise_level}; variant {name!r} takes 0 to "
                f"{VARIANTS[name].most_noise:g}"
            )
    table, first = [], 0
    for name, run in groupby(variants):
        count, variant_of_run = len(list(run)), VARIANTS[name]
        part = schedule[first : first + count + 1]
        for t in range(count):
            told = MODEL_TIMES[model_time](part[t])
            row = variant_of_run.row(part, t, noise_level)
            table.append(_table_row(part[t], part[t + 1], told, row, variant_of_run.gaussian))
        first += count
    return Transitions(torch.tensor(table, dtype=torch.float64).to(sigmas.device, torch.float32))


def _table_row(s: float, s_next: float, told: float, row: Affine, gaussian: bool) -> list[float]:
    noise = row.std > 0.0
    values = {
        "sigma": s,
        "model_sigma": told,
        "sigma_next": s_next,
        "dt": s_next - s,
        "A": row.A,
        "B": row.B,
        "C": row.C,
        "std": row.std,
        "h": row.h,
        "log_std_term": 0.0,
        "kl_flow_grpo": row.kl_flow_grpo,
        "kl_gaussian": row.B**2 / (2.0 * row.std**2) if noise else 0.0,
        "kl_velocity": 1.0,
        "u_scale": row.std / row.B if noise else 0.0,
        "guard": 0.0,
    }
    if noise and gaussian:
        values["log_std_term"] = -math.log(row.std) - 0.5 * math.log(2.0 * math.pi)
        values["guard"] = row.B**2 / row.std
    return [values[name] for name in COLUMNS]


def _column_index(name: str) -> int:
    if name not in _INDEX:
        raise ValueError(f"transitions: no column {name!r}; the columns are {', '.join(COLUMNS)}")
    return _INDEX[name]


def _check_names(variants: list[str], steps: int, model_time: str) -> None:
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise ValueError(
            f"transitions: variant {unknown[0]!r} is unknown; choose one of {', '.join(VARIANTS)}"
        )
    if len(variants) != steps:
        raise ValueError(
            f"transitions: {len(variants)} variants for {steps} steps; name one, or one for each"
        )
    if model_time not in MODEL_TIMES:
        raise ValueError(
            f"transitions: model_time {model_time!r} is unknown; choose one of "
            f"{', '.join(MODEL_TIMES)}"
        )


def _checked_schedule(sigmas: Tensor) -> list[float]:
    if sigmas.ndim != 1 or sigmas.numel() < 2:
        raise ValueError(
            f"transitions: sigmas has shape {tuple(sigmas.shape)}; "
            "pass [T + 1] values, T at least 1"
        )
    schedule: list[float] = sigmas.double().tolist()
    if not all(math.isfinite(s) for s in schedule):
        raise ValueError(f"transitions: sigmas must be finite, got {schedule}")
    if any(after >= before for before, after in pairwise(schedule)):
        raise ValueError(
            f"transitions: sigmas must decrease strictly (1 is noise, 0 the image), got {schedule}"
        )
    if schedule[0] > 1.0 or schedule[-1] < 0.0:
        raise ValueError(
            f"transitions: sigmas must lie within [0, 1], got {schedule[0]} to {schedule[-1]}"
        )
    return schedule


def _shifted(u: Tensor, shift: float) -> Tensor:
    return shift * u / (1.0 + (shift - 1.0) * u)


def _with_zero(sigmas_T: Tensor) -> Tensor:
    return torch.cat([sigmas_T, sigmas_T.new_zeros(1)])


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"sigmas: steps is {steps}; it must be at least 1")


def _check_shift(shift: float) -> None:
    if not (math.isfinite(shift) and shift > 0.0):
        raise ValueError(f"sigmas: shift is {shift}; it must be finite and positive")
