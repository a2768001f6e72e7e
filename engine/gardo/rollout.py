"""Sampling, and what lies between it and the gradient: teachers, updates, micro-batches.

All randomness is a function of coordinates: (seed, step, sample, denoise step, element). The same
noise is drawn on 1, 2 or 64 ranks, in any micro-batch, and after a resume.

Shapes: P prompts of a step, G images each, B samples of this rank, T recorded steps, R training
rows, X one latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gardo.streams import Stream
from gardo.types import Batch, Credit, Points, Prompt, Rollout, SamplePlan, select
from gardo_kernels import Backend, random_normal, random_uniform, sde_step, seed_tensor


def noise_id(step: int, sample_B: Tensor) -> Tensor:
    """The global identity of samples: int64, the training step in the high 32 bits."""
    return (step << 32) + sample_B


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
    return {name: tensor[index_R] for name, tensor in conditioning.items()}


def groups_of(first: int, count: int, images_per_prompt: int) -> range:
    """Which prompts of the step samples first .. first + count belong to."""
    return range(first // images_per_prompt, (first + count - 1) // images_per_prompt + 1)


@torch.no_grad()
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
    kernels: Backend = "auto",
) -> Rollout:
    """Samples first .. first + count of the step's P x G images, on this rank.

    `prompts` are the step's P prompts; sample i belongs to prompt i // G. `micro_batch` images go
    through the model at once.
    """
    sample_B = torch.arange(first, first + count, device=device)
    group_B = sample_B // images_per_prompt
    groups = groups_of(first, count, images_per_prompt)
    conditioning = policy.encode([prompts[group] for group in groups])
    prompt_B = group_B - groups.start
    parts = [
        _denoise(policy, rows_of(conditioning, prompt_B[part]), plan, sample_B[part],
                 images_per_prompt, seed, step, kernels)
        for part in torch.arange(count, device=device).split(micro_batch or count)
    ]  # fmt: skip
    final_BX, images, state_BTX, u_BTX, velocity_BTX = (
        torch.cat(p) for p in zip(*parts, strict=True)
    )
    return Rollout(
        sample_B=sample_B,
        group_B=group_B,
        prompt_B=prompt_B,
        prompts=tuple(prompts[int(g)] for g in group_B),
        conditioning=conditioning,
        final_BX=final_BX,
        images_B3HW=images,
        step_T=torch.tensor(plan.record, dtype=torch.int64, device=device),
        state_BTX=state_BTX,
        u_BTX=u_BTX,
        velocity_BTX=velocity_BTX,
        transitions=plan.transitions.to(device),
        seed=seed,
        step=step,
    )


def _denoise(
    policy: FlowModel,
    conditioning: Mapping[str, Tensor],
    plan: SamplePlan,
    sample_B: Tensor,
    images_per_prompt: int,
    seed: int,
    step: int,
    kernels: Backend,
) -> tuple[Tensor, ...]:
    """Final latents, images and the recorded states, noises and velocities of one micro-batch."""
    shape, batch = policy.latent_shape, len(sample_B)
    identity_B = noise_id(step, sample_B)
    first_of_group_B = noise_id(step, sample_B // images_per_prompt * images_per_prompt)
    x = random_normal(
        seed,
        first_of_group_B if plan.same_initial_noise else identity_B,
        Stream.INITIAL,
        shape,
        backend=kernels,
    )
    table = plan.transitions.to(sample_B.device)
    noisy = plan.transitions.scored.tolist()
    looks_back = [*(plan.transitions.column("C") != 0).tolist(), False]
    seed_1 = seed_tensor(seed, sample_B.device)
    model_input, previous = x, None
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in range(table.steps):
        step_B = torch.full((batch,), t, dtype=torch.int64, device=sample_B.device)
        told_B = table.rows(step_B, "model_sigma")
        v, unprompted = policy.branches(model_input, told_B, conditioning)
        recorded = t in plan.record
        out = sde_step(
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
    return x, policy.decode(x), *states


class Reader(Protocol):
    """What teaching needs of the engine: other weights, and equally many calls on every rank."""

    def reading(self, weights: str) -> AbstractContextManager[None]: ...
    def agree_max(self, value: int) -> int: ...


@torch.no_grad()
def teach(
    points: Points,
    wanted: Mapping[str, Tensor],
    *,
    policy: FlowModel,
    conditioning: Mapping[str, Tensor],
    engine: Reader,
    micro_batch: int,
) -> Points:
    """Velocities of other weights at the wanted rows: {weights: bool [R]}; zeros elsewhere.

    Every rank makes the same number of model calls: the largest count of all ranks decides, short
    ranks repeat a row. A teacher wanted nowhere on any rank costs nothing.
    """
    for weights, mask_R in wanted.items():
        rows = mask_R.nonzero().flatten()
        velocity = torch.zeros_like(points.x_RX, dtype=policy.dtype)
        calls = math.ceil(engine.agree_max(len(rows)) / micro_batch)
        with engine.reading(weights) if calls else nullcontext():
            for call in range(calls):
                part = rows[call * micro_batch : (call + 1) * micro_batch]
                padded = part if len(part) else rows.new_zeros(1)
                v = policy.velocity(
                    points.x_RX[padded],
                    points.sigma_R[padded],
                    rows_of(conditioning, points.prompt_R[padded]),
                )
                velocity[part] = v[: len(part)].to(policy.dtype)
        points = points.with_velocity(weights, velocity)
    return points


def recorded_points(rollout: Rollout) -> Points:
    """The recorded steps of every sample as rows, a sample's steps side by side: R = B T.

    `sigma_R` is what the sampler told the model; `extra` has the rows of the transition table.
    """
    B, T = rollout.state_BTX.shape[:2]
    step_R = rollout.step_T.repeat(B)
    sample_R = torch.arange(B, device=step_R.device).repeat_interleave(T)
    return Points(
        sample_R=sample_R,
        prompt_R=rollout.prompt_B[sample_R],
        step_R=step_R,
        sigma_R=rollout.transitions.rows(step_R, "model_sigma"),
        x_RX=rollout.state_BTX.flatten(0, 1),
        extra={
            "u": rollout.u_BTX.flatten(0, 1),
            **{n: rollout.transitions.rows(step_R, n) for n in ("sigma", "dt", "h", "B", "std")},
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

    x_t = (1 - t) x0 + t noise. Returns the points, x0 [R, X] and the noise [R, X].
    """
    B, K = step_BK.shape
    identity_B = noise_id(rollout.step, rollout.sample_B)
    shape = rollout.final_BX.shape[1:]
    noise_BKX = torch.stack(
        [random_normal(rollout.seed, identity_B, Stream.FRESH + k, shape, backend=kernels)
         for k in range(K)],
        1,
    )  # fmt: skip
    step_R = step_BK.flatten()
    sample_R = torch.arange(B, device=step_R.device).repeat_interleave(K)
    sigma_R = rollout.transitions.rows(step_R, "sigma")
    x0_RX, noise_RX = rollout.final_BX[sample_R], noise_BKX.flatten(0, 1)
    share = sigma_R.view(-1, *[1] * (x0_RX.dim() - 1))
    points = Points(
        sample_R=sample_R,
        prompt_R=rollout.prompt_B[sample_R],
        step_R=step_R,
        sigma_R=sigma_R,
        x_RX=(1 - share) * x0_RX + share * noise_RX,
    )
    return points, x0_RX, noise_RX


def update_of(
    sample_B: Tensor, updates: int, *, seed: int, step: int, kernels: Backend = "auto"
) -> Tensor:
    """The gradient step, 0 .. updates - 1, that each sample trains in: int64 [B].

    An update takes one of every `updates` neighbouring samples, drawn anew each step: the same
    samples on any number of ranks.
    """
    block_B = sample_B // updates
    draw = random_uniform(seed, noise_id(step, block_B), Stream.SHARES, updates, backend=kernels)
    order = draw.argsort(dim=1, stable=True)
    return order.gather(1, (sample_B % updates)[:, None])[:, 0]


@dataclass(frozen=True)
class Part:
    """The rows of one micro-batch; `last` and `share` as in `Batch`."""

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
    kernels: Backend = "auto",
    idle_R: Tensor | None = None,
    agree_max: Callable[[int], int] = int,
) -> list[Part]:
    """The micro-batches of an iteration, update after update.

    An update takes the samples that `update_of` says, and all of a sample's rows. Rows of `idle_R`
    (bool: they weigh nothing) are left out, in whole micro-batches: every rank makes as many calls
    as the busiest one needs, at least one, and fills them up with idle rows of its own.
    """
    update_B = update_of(sample_B, updates, seed=seed, step=step, kernels=kernels)
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
    chosen = select(points, part.rows)
    return Batch(
        points=chosen,
        advantage_R=credit.advantage_B[chosen.sample_R],
        gate_R=credit.gate_B[chosen.sample_R],
        kl_weight_R=credit.kl_weight_or_gate[chosen.sample_R],
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
        prompts = [batch.rollout.prompts[int(i)] for i in batch.points.sample_R]
        return self._score(images, prompts)
