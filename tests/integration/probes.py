"""What is looked at in a run that has trained: tensors by name, the same call on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from gardo.distributed.optimizers import build_optimizer
from gardo.distributed.saved import Saved, committed
from gardo.distributed.universal import NAMES
from gardo.distributed.zero_config import zero_config
from gardo.export import export_universal
from gardo.loading import build_policy
from gardo.phases import sampled, scored, taught
from gardo.report.progress import Progress
from gardo.rewards.panel import Panel
from gardo.session import Session
from gardo_kernels import random_normal
from tests.integration.faults import AllGathers, Around

Seen = dict[str, Tensor]


class FirstImages(Panel):
    """A panel that keeps the first images it sees."""

    images: Tensor | None = None

    def __call__(self, images_B3HW, prompts, **more):  # type: ignore[no-untyped-def]
        if self.images is None:
            self.images = images_B3HW
        return super().__call__(images_B3HW, prompts, **more)


class PhaseGathers(Around):
    """A progress that counts the all-gathers of every phase: (phase, how many), in order."""

    def __init__(self, progress: Progress, gathers: AllGathers) -> None:
        super().__init__(progress)
        self._gathers = gathers
        self.seen: list[tuple[str, int]] = []

    @contextmanager
    def phase(self, name: str, *, rows: int = 0) -> Iterator[None]:
        before = self._gathers.count
        with self.inner.phase(name, rows=rows):
            yield
        self.seen.append((name, self._gathers.count - before))


@torch.no_grad()
def velocity(session: Session) -> Tensor:
    """The model's output on fixed inputs, with whatever weights are in place."""
    policy, engine = session.policy, session.engine
    row_R = torch.arange(2, device=engine.device)
    x_RX = random_normal(11, row_R, 0, policy.latent_shape)
    conditioning = policy.encode(session.prompts[:2])  # type: ignore[arg-type]
    return policy.velocity(x_RX, torch.tensor([0.9, 0.3], device=engine.device), conditioning)


def evaluation(session: Session) -> Seen:
    """The evaluation's first images, by the pipeline, with the trained weights."""
    images, _ = session.evaluator.batch(torch.arange(4, device=session.engine.device))
    return {"evaluation": images}


def slots(session: Session) -> Seen:
    """What the model says with a slot's weights, with its own again, with a copy of its own.

    Last of all, because it overwrites the slots.
    """
    slots = session.engine.slots
    seen = {}
    for name in slots.names:
        with session.engine.reading(name):
            seen[f"slot.{name}"] = velocity(session)
        seen[f"after.{name}"] = velocity(session)
    for name in slots.names:
        slots.copy("train", to=name)
        with session.engine.reading(name):
            seen[f"copied.{name}"] = velocity(session)
    return seen


def teachers(session: Session) -> Seen:
    """The reference's velocities where it is wanted: on one rank only, nowhere, everywhere.

    Every rank must make equally many calls, or this hangs. Kept: the largest difference to asking
    everywhere, and what is said where it was not asked.
    """
    engine = session.engine
    if "reference" not in engine.slots.names:
        return {}
    rollout = sampled(session, step=1000)
    credit = session.algorithm.credit(scored(session, rollout))
    points = session.algorithm.points(rollout, credit)
    everywhere = torch.ones_like(points.sample_R, dtype=torch.bool)
    first = torch.arange(len(everywhere)) == 0
    said = {
        "all": everywhere,
        "none": ~everywhere,
        "one_rank": everywhere if engine.rank == 0 else ~everywhere,
        "one_row": everywhere & first & (engine.rank == 0),
    }
    told = {n: taught(session, points, rollout, {"reference": m}) for n, m in said.items()}
    whole = told["all"].velocities["reference"]
    errors = {}
    for name, mask_R in said.items():
        there = told[name].velocities["reference"]
        there_R = mask_R.to(whole.device)
        wanted = torch.where(there_R.view(-1, *[1] * (whole.dim() - 1)), whole, 0)
        errors[f"teacher.{name}"] = (there - wanted).abs().max()[None]
    return {name: engine.all_gather(error).max()[None] for name, error in errors.items()}


def universal(session: Session) -> Seen:
    """Whether a DeepSpeed engine that knows nothing of ours finds what was trained: 1 or 0 each."""
    recipe, run = session.recipe, session.recipe.run_folder
    if session.engine.rank == 0:
        export_universal(run, out=run / "universal")
    session.engine.barrier()
    policy = build_policy(recipe, session.engine.device)
    policy.load_transformer()
    trained = policy.trainable()
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    config = zero_config(recipe.distributed, blocks=policy.blocks(), module=policy.transformer,
                         accumulation=1, max_grad_norm=1.0)  # fmt: skip
    engine, *_ = deepspeed.initialize(
        model=policy.transformer,
        optimizer=build_optimizer(list(trained.values()), recipe.train.optimizer),
        config={**config, "checkpoint": {"load_universal": True}},
        dist_init_required=False,
    )
    fresh = {name: safe_get_full_fp32_param(p).clone() for name, p in trained.items()}
    engine.load_checkpoint(str(run / "universal"))
    saved = Saved(committed(run / "checkpoints")[0])
    equal = dict.fromkeys(NAMES, True)
    moved = False
    for name, p in trained.items():
        masters = saved.whole("master", name, shapes[name])
        moved |= not torch.equal(fresh[name], masters)
        for kind, stored in NAMES.items():
            now = (safe_get_full_fp32_param(p) if kind == "fp32"
                   else safe_get_full_optimizer_state(p, kind))  # fmt: skip
            equal[kind] &= torch.equal(now, saved.whole(stored, name, shapes[name]))
    updates = {float(state["step"]) for state in engine.basic_optimizer.state.values()}
    engine.destroy()
    found = {**equal, "moved": moved, "step": updates == {float(saved.manifest["updates"])}}
    return {f"universal.{name}": torch.tensor(float(there)) for name, there in found.items()}


PROBES: dict[str, Callable[[Session], Seen]] = {
    "evaluation": evaluation,
    "teachers": teachers,
    "universal": universal,
    "slots": slots,
}
