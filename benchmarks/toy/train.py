"""One run of the toy: the engine's own loop around a policy in the plane.

What `gardo.train` does, less what a plane has no use for: checkpoints, logs, ranks, and the ratio
contract (one process in fp32 samples and trains in the same numerics).

Shapes: B samples, 2 coordinates.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

from torch import Tensor

from gardo.algorithms import World, build
from gardo.distributed.local import LocalEngine
from gardo.flow import shifted_linear_sigmas, transitions
from gardo.rollout import LossContext, batch_of, parts, sample, teach
from gardo.types import Batch, Credit, Metrics, Rollout, SamplePlan, Scores
from toy.world import CPU, PlanePolicy, Toy, Training, panel

EVALUATION_STEP = 1 << 20  # an iteration that training never reaches: its noise is nobody else's


def positions(policy: PlanePolicy, settings: Training, seed: int) -> Tensor:
    """Evaluation samples [B, 2] by the deterministic sampler: for a seed always the same noise."""
    sigmas = shifted_linear_sigmas(settings.sampler.steps, settings.shift)
    count = settings.evaluation_samples
    return sample(
        policy,
        [""],
        SamplePlan(transitions=transitions(sigmas, "ode"), record=()),
        images_per_prompt=count,
        first=0,
        count=count,
        seed=seed,
        step=EVALUATION_STEP,
        device=CPU,
    ).final_BX


class Run:
    """An arm of the comparison with one seed, from a copy of the pre-trained policy on."""

    def __init__(self, toy: Toy, arm: str, seed: int, pretrained: PlanePolicy) -> None:
        self.settings, self.layout, self.seed = toy.training, toy.layout, seed
        self.policy = copy.deepcopy(pretrained)
        self.panel = panel(toy.layout)
        sampler = self.settings.sampler
        sigmas = shifted_linear_sigmas(sampler.steps, self.settings.shift)
        world = World(sampler=sampler, sigmas=sigmas, seed=seed)
        self.algorithm = build(toy.arms[arm].algorithm, world)
        self.engine = LocalEngine(
            dict(self.policy.named_parameters()),
            optimizer=self.settings.optimizer,
            accumulation=1,
            max_grad_norm=self.settings.max_grad_norm,
            device=CPU,
        )
        self.engine.make_slots(self.algorithm.slots)
        self.ctx = LossContext(self.policy, self.panel.differentiable_score)

    def rollout(self, step: int) -> tuple[Rollout, Scores]:
        """The samples of an iteration and their scores, before any credit."""
        engine, settings = self.engine, self.settings
        plan = self.algorithm.plan(step)
        with engine.reading(plan.weights):
            rollout = sample(
                self.policy,
                [""] * settings.groups,
                plan,
                images_per_prompt=settings.group_size,
                first=0,
                count=settings.groups * settings.group_size,
                seed=self.seed,
                step=step,
                device=CPU,
            )
        scores = self.panel(
            rollout.images_B3HW, rollout.prompts, sample_B=rollout.sample_B, group_B=rollout.group_B
        )
        return rollout, scores

    def credit(self, scores: Scores) -> Credit:
        return self.algorithm.credit(self.algorithm.measured(scores))

    def batches(self, rollout: Rollout, credit: Credit, step: int) -> Iterator[Batch]:
        """All rows of an iteration at once, with what the teachers say of them."""
        algorithm, settings = self.algorithm, self.settings
        rows = len(rollout.sample_B) * algorithm.rows_per_sample(
            algorithm.settings, settings.sampler
        )
        points = algorithm.points(rollout, credit)
        points = teach(
            points,
            algorithm.teachers(points, credit),
            policy=self.policy,
            conditioning=rollout.conditioning,
            engine=self.engine,
            micro_batch=rows,
        )
        for part in parts(
            points, sample_B=rollout.sample_B, updates=1, micro_batch=rows, seed=self.seed,
            step=step,
        ):  # fmt: skip
            yield batch_of(points, credit, part, rollout)

    def iteration(self, step: int) -> tuple[Scores, Metrics, list[str]]:
        """Sample, score, credit, teach, train: one gradient step on all rows at once."""
        algorithm, engine = self.algorithm, self.engine
        rollout, scores = self.rollout(step)
        totals = Metrics()
        for batch in self.batches(rollout, self.credit(scores), step):
            loss, metrics = algorithm.loss(self.ctx, batch)
            totals.add(metrics)
            engine.backward(loss, last=batch.last)
            engine.step()
            algorithm.after_update(engine.slots)
        return scores, totals, algorithm.after_step(engine.slots, totals)

    def train(self) -> None:
        for step in range(self.settings.iterations):
            self.iteration(step)

    def positions(self) -> Tensor:
        return positions(self.policy, self.settings, self.seed)
