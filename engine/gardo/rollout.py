"""Sampling, and what lies between it and the gradient: teachers, updates, micro-batches.

All randomness is a function of coordinates: (seed, step, sample, denoise step, element). The same
noise is drawn on 1, 2 or 64 ranks, in any micro-batch, and after a resume.

Nothing here waits for the device: which rows go where is decided on the host (gardo.types says what
is there), and index tensors are sent without waiting.

Shapes: P prompts of a step, G images each, B samples of this rank, T recorded steps, R training
rows, X one latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, Union

import torch

import gardo_kernels
from gardo.beside import Beside
from gardo.lazily import no_grad
from gardo.streams import Stream
from gardo.types import (
    Batch,
    Credit,
    Points,
    Prompt,
    Rollout,
    SamplePlan,
    select,
    taker,
    to_device,
)

if TYPE_CHECKING:
    from torch import Tensor

    from gardo_kernels import Backend


def noise_id(step: int, sample_B: Tensor) -> Tensor:
    """The global identity of samples: int64, the training step in the high 32 bits."""
    return (step << 32) + sample_B


# latents [B, X] and their prompts -> images, and what rewards said of them: fp32 [B], or [B, D]
Said = Union["Tensor", Callable[[], "Tensor"]]  # what a reward says, or what waits for it
Finish = Callable[["Tensor", Sequence[Prompt]], tuple["Tensor", Mapping[str, Said]]]


class FlowModel(Protocol):
    """What sampling and teaching need of a policy: prompts in, velocities, images out."""

    dtype: torch.dtype

    @property
    def latent_shape(self) -> tuple[int, ...]: ...
    @property
    def cfg_scale(self) -> float: ...
    def encode(self, prompts: list[str]) -> dict[str, Tensor]: ...
    def branches(
        self, x: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor], /
    ) -> tuple[Tensor, Tensor | None]: ...
    def velocity(
        self, x: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor], /
    ) -> Tensor: ...
    def decode(self, latents: Tensor, /) -> Tensor: ...


def rows_of(conditioning: Mapping[str, Tensor], index_R: Tensor) -> dict[str, Tensor]:
    take = taker(index_R)
    return {name: take(tensor) for name, tensor in conditioning.items()}


def groups_of(first: int, count: int, images_per_prompt: int) -> range:
    """Which prompts of the step samples first .. first + count belong to."""
    return range(first // images_per_prompt, (first + count - 1) // images_per_prompt + 1)


@no_grad
def sample(
    policy: FlowModel,
    prompts: Sequence[Prompt],
    plan: SamplePlan,
    *,
    images_per_prompt: int,
    first: int,
    count: int,
    seed: int,
    step: int,
    device: torch.device,
    micro_batch: int | None = None,
    fill: bool = False,
    seed_1: Tensor | None = None,
    conditioning: Mapping[str, Tensor] | None = None,
    finish: Finish | None = None,
    beside: Beside | None = None,
    between: Callable[[], None] = lambda: None,
    kernels: Backend = "auto",
) -> Rollout:
    """Samples first .. first + count of the step's P x G images, on this rank.

    `prompts` are the step's P prompts; sample i belongs to prompt i // G. `micro_batch` images go
    through the model at once; `fill` repeats the last one until a short call has as many. `seed_1`
    is the seed on the device, where the run keeps it (`World.seed_on`); `conditioning` is that of
    the prompts of `groups_of`, where they are encoded already. `finish` makes images of a
    micro-batch's latents, and perhaps scores them, `beside` the sampling of the next; without it
    they are decoded. `between` is called before each micro-batch, equally often on every rank.
    """
    finish = finish or (lambda x, prompts: (policy.decode(x), {}))
    beside = beside or Beside(device, on=False)
    sample_B = torch.arange(first, first + count)
    group_B = sample_B // images_per_prompt
    groups = groups_of(first, count, images_per_prompt)
    if conditioning is None:
        conditioning = policy.encode([prompts[group] for group in groups])
    prompt_B = group_B - groups.start
    seed_1 = to_device(gardo_kernels.seed_tensor(seed, "cpu"), device) if seed_1 is None else seed_1
    of_sample = tuple(prompts[g] for g in group_B.tolist())
    parts, finishing = [], []
    for rows, kept in calls_of(torch.arange(count), micro_batch or count, fill=fill):
        between()
        identity_B = noise_id(step, sample_B[rows])
        first_B = noise_id(step, group_B[rows] * images_per_prompt)
        noise_B = to_device(first_B if plan.same_initial_noise else identity_B, device)
        x = gardo_kernels.random_normal(
            seed_1, noise_B, Stream.INITIAL, policy.latent_shape, backend=kernels
        )
        part = _denoise(
            policy, rows_of(conditioning, prompt_B[rows]), plan, x, seed_1,
            to_device(identity_B, device), kernels,
        )  # fmt: skip
        parts.append([tensor[:kept] for tensor in part])
        x, prompts_here = parts[-1][0], [of_sample[row] for row in rows[:kept].tolist()]
        finishing.append(beside.begin(partial(finish, x, prompts_here), [x]))
    finished = [wait() for wait in finishing]
    final_BX, state_BTX, u_BTX, velocity_BTX = (torch.cat(p) for p in zip(*parts, strict=True))
    return Rollout(
        sample_B=sample_B,
        group_B=group_B,
        prompt_B=prompt_B,
        prompts=of_sample,
        conditioning=conditioning,
        final_BX=final_BX,
        images_B3HW=torch.cat([images for images, _ in finished]),
        values={name: _joined([v[name] for _, v in finished]) for name in finished[0][1]},
        step_T=torch.tensor(plan.record, dtype=torch.int64),
        state_BTX=state_BTX,
        u_BTX=u_BTX,
        velocity_BTX=velocity_BTX,
        transitions=plan.transitions.to(device),
        seed=seed,
        seed_1=seed_1,
        step=step,
    )


def _joined(said: Sequence[Said]) -> Said:
    """What a reward says of all micro-batches."""
    there = [part for part in said if isinstance(part, torch.Tensor)]
    if len(there) == len(said):
        return torch.cat(there)
    return lambda: torch.cat([part if isinstance(part, torch.Tensor) else part() for part in said])


def calls_of(
    rows: Tensor, micro_batch: int, *, fill: bool, calls: int | None = None
) -> Iterator[tuple[Tensor, int]]:
    """Rows of each model call, and how many of them count: the others repeat the last one.

    A call without rows of its own repeats row 0. `fill`: every call has `micro_batch` rows; else
    the last one is as short as it can be. `calls`: more of them than the rows need.
    """
    for call in range(math.ceil(len(rows) / micro_batch) if calls is None else calls):
        own = rows[call * micro_batch : (call + 1) * micro_batch]
        size = micro_batch if fill else max(len(own), 1)
        last = own[-1:] if len(own) else rows.new_zeros(1)
        yield torch.cat([own, last.expand(size - len(own))]), len(own)


def _denoise(
    policy: FlowModel,
    conditioning: Mapping[str, Tensor],
    plan: SamplePlan,
    x: Tensor,
    seed_1: Tensor,
    identity_B: Tensor,
    kernels: Backend,
) -> tuple[Tensor, ...]:
    """Final latents and the recorded states, noises and velocities of one micro-batch from noise x.

    All tensors on the device; `identity_B` as `noise_id` gives it.
    """
    shape, batch = policy.latent_shape, len(x)
    table = plan.transitions.to(x.device)
    noisy = plan.transitions.scored.tolist()
    looks_back = [*(plan.transitions.column("C") != 0).tolist(), False]
    model_input, previous = x, None
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in range(table.steps):
        step_B = torch.full((batch,), t, dtype=torch.int64, device=x.device)
        told_B = table.rows(step_B, "model_sigma")
        v, unprompted = policy.branches(model_input, told_B, conditioning)
        recorded = t in plan.record
        out = gardo_kernels.sde_step(
            x,
            v,
            table.table_TK,
            step_B,
            seed=seed_1 if noisy[t] else None,
            sample_id=identity_B if noisy[t] else None,
            uncond=unprompted,
            guidance=policy.cfg_scale,
            m_prev=previous if looks_back[t] else None,
            model_dtype=policy.dtype,
            keep_u=recorded,
            keep_m=looks_back[t + 1],
            backend=kernels,
        )
        if recorded:
            assert out.u is not None
            kept.append((x, out.u, out.velocity.to(policy.dtype)))
        x, model_input, previous = out.x, out.model_input, out.m
    states = (
        [torch.stack(k, 1) for k in zip(*kept, strict=True)]
        if kept
        else [x.new_zeros(batch, 0, *shape)] * 3
    )
    return x, *states


class Reader(Protocol):
    """What teaching needs of the engine: other weights, and equally many calls on every rank."""

    def reading(self, weights: str) -> AbstractContextManager[None]: ...
    def agree_max(self, value: int) -> int: ...


@no_grad
def teach(
    points: Points,
    wanted: Mapping[str, Tensor],
    *,
    policy: FlowModel,
    conditioning: Mapping[str, Tensor],
    engine: Reader,
    micro_batch: int,
    fill: bool = False,
) -> Points:
    """Velocities of other weights at the wanted rows: {weights: bool [R]}; zeros elsewhere.

    Every rank makes the same number of model calls: the largest count of all ranks decides, short
    ranks repeat a row. A teacher wanted nowhere on any rank costs nothing. `fill` as in `sample`.
    """
    rows_of_teacher = {weights: mask_R.nonzero().flatten() for weights, mask_R in wanted.items()}
    # agreed before any of them speaks: afterwards it would wait for what was said
    most = {weights: engine.agree_max(len(rows)) for weights, rows in rows_of_teacher.items()}
    for weights, rows in rows_of_teacher.items():
        velocity = torch.zeros_like(points.x_RX, dtype=policy.dtype)
        calls = math.ceil(most[weights] / micro_batch)
        with engine.reading(weights) if calls else nullcontext():
            for part, kept in calls_of(rows, micro_batch, fill=fill, calls=calls):
                here = to_device(part, velocity.device)
                v = policy.velocity(
                    points.x_RX[here],
                    points.sigma_R[here],
                    rows_of(conditioning, points.prompt_R[part]),
                )
                velocity[here[:kept]] = v[:kept].to(policy.dtype)
        points = points.with_velocity(weights, velocity)
    return points


def recorded_points(rollout: Rollout) -> Points:
    """The recorded steps of every sample as rows, a sample's steps side by side: R = B T.

    `sigma_R` is what the sampler told the model; `extra` has the rows of the transition table.
    """
    B, T = rollout.state_BTX.shape[:2]
    step_R = rollout.step_T.repeat(B)
    sample_R = torch.arange(B).repeat_interleave(T)
    here_R = to_device(step_R, rollout.state_BTX.device)  # once, for all columns
    return Points(
        sample_R=sample_R,
        prompt_R=rollout.prompt_B[sample_R],
        step_R=step_R,
        sigma_R=rollout.transitions.rows(here_R, "model_sigma"),
        x_RX=rollout.state_BTX.flatten(0, 1),
        extra={
            "u": rollout.u_BTX.flatten(0, 1),
            **{n: rollout.transitions.rows(here_R, n) for n in ("sigma", "dt", "h", "B", "std")},
        },
        velocities={
            "rollout": rollout.velocity_BTX.flatten(0, 1),
            **{name: v_BTX.flatten(0, 1) for name, v_BTX in rollout.velocities.items()},
        },
    )


def fresh_points(
    rollout: Rollout, step_BK: Tensor, *, kernels: Backend = "auto"
) -> tuple[Points, Tensor, Tensor]:
    """The images noised anew at K of the sampler's times, a sample's times side by side: R = B K.

    x_t = (1 - t) x0 + t noise. `step_BK` int64, on the host. Returns the points, x0 [R, X] and the
    noise [R, X].
    """
    B, K = step_BK.shape
    device, shape = rollout.final_BX.device, rollout.final_BX.shape[1:]
    identity_B = to_device(noise_id(rollout.step, rollout.sample_B), device)
    draw = gardo_kernels.random_normal
    noise_BKX = torch.stack(
        [draw(rollout.seed_1, identity_B, Stream.FRESH + k, shape, backend=kernels)
         for k in range(K)],
        1,
    )  # fmt: skip
    step_R = step_BK.flatten()
    sample_R = torch.arange(B).repeat_interleave(K)
    sigma_R = rollout.transitions.rows(step_R, "sigma")
    x0_RX = rollout.final_BX.repeat_interleave(K, 0)
    noise_RX = noise_BKX.flatten(0, 1)
    share = sigma_R.view(-1, *[1] * (x0_RX.dim() - 1))
    points = Points(
        sample_R=sample_R,
        prompt_R=rollout.prompt_B[sample_R],
        step_R=step_R,
        sigma_R=sigma_R,
        x_RX=(1 - share) * x0_RX + share * noise_RX,
    )
    return points, x0_RX, noise_RX


def update_of(sample_B: Tensor, updates: int, *, seed: int, step: int) -> Tensor:
    """The gradient step, 0 .. updates - 1, that each sample trains in: int64 [B], on the host.

    An update takes one of every `updates` neighbouring samples, drawn anew each step: the same
    samples on any number of ranks.
    """
    block_B = sample_B // updates
    draw = gardo_kernels.random_uniform(
        seed, noise_id(step, block_B), Stream.SHARES, updates, backend="torch"
    )
    order = draw.argsort(dim=1, stable=True)
    return order.gather(1, (sample_B % updates)[:, None])[:, 0]


@dataclass(frozen=True)
class Part:
    """The rows of one micro-batch, on the host; `last` and `share` as in `Batch`."""

    rows: Tensor
    last: bool = True
    share: float = 1.0


def parts(
    points: Points,
    *,
    sample_B: Tensor,
    updates: int,
    micro_batch: int,
    seed: int,
    step: int,
    idle_R: Tensor | None = None,
    agree_max: Callable[[int], int] = int,
) -> list[Part]:
    """The micro-batches of an iteration, update after update.

    An update takes the samples that `update_of` says, and all of a sample's rows. Rows of `idle_R`
    (bool: they weigh nothing) are left out, in whole micro-batches: every rank makes as many calls
    as the busiest one needs, at least one, and fills them up with idle rows of its own.
    """
    update_B = update_of(sample_B, updates, seed=seed, step=step)
    update_R = update_B[points.sample_R]
    found = []
    for update in range(updates):
        rows = kept = (update_R == update).nonzero().flatten()
        if idle_R is not None:
            idle = idle_R[rows]
            calls = max(1, math.ceil(agree_max(int((~idle).sum())) / micro_batch))
            order = idle.int().argsort(stable=True)  # idle rows last
            kept = rows[order[: calls * micro_batch].sort().values]
        pieces = kept.split(micro_batch)
        share = len(kept) / len(rows)
        found += [Part(piece, n == len(pieces), share) for n, piece in enumerate(pieces, start=1)]
    return found


def batch_of(points: Points, credit: Credit, part: Part, rollout: Rollout) -> Batch:
    """A micro-batch of the rollout's points; `credit` is this rank's."""
    chosen, device = select(points, part.rows), points.x_RX.device
    extra = {name: to_device(tensor, device) for name, tensor in chosen.extra.items()}
    advantage_R, gate_R, kl_weight_R = (
        to_device(value_B[chosen.sample_R], device)
        for value_B in (credit.advantage_B, credit.gate_B, credit.kl_weight_or_gate)
    )
    return Batch(
        points=replace(chosen, extra=extra),
        advantage_R=advantage_R,
        gate_R=gate_R,
        kl_weight_R=kl_weight_R,
        rollout=rollout,
        last=part.last,
        share=part.share,
    )


class LossContext:
    """What a loss may call: the trained model, its decoder, the differentiable reward."""

    def __init__(
        self, policy: FlowModel, score: Callable[[Tensor, Sequence[Prompt]], Tensor] | None = None
    ) -> None:
        """`score(images, prompts)` gives the proxies with gradients, fp32 [R]; for ReFL alone."""
        self._policy, self._score = policy, score

    def velocity(self, batch: Batch) -> Tensor:
        if batch.velocity_RX is not None:
            return batch.velocity_RX
        points = batch.points
        conditioning = rows_of(batch.rollout.conditioning, points.prompt_R)
        return self._policy.velocity(points.x_RX, points.sigma_R, conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        return self._policy.decode(latents)

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        if self._score is None:
            raise ValueError("this loss needs a differentiable reward; give LossContext its score")
        prompts = [batch.rollout.prompts[i] for i in batch.points.sample_R.tolist()]
        return self._score(images, prompts)
