"""Trains many small cases in one process group and writes what was seen: worker.py OUT CASE ...

Launched by the tests, alone or through the deepspeed launcher. A case is
ALGORITHM-WEIGHTS-ENGINE[+OPTION ...], such as gardo-lora-zero+tight+cut3: engine local, zero (ZeRO
stage 3) or stage0 to stage2, options as in OPTIONS, and

    cutN      stops dead after N gradient steps, as a killed run would
    resumeN   goes on with the run that cutN left behind
    universal writes DeepSpeed's universal layout, and lets a new engine's DeepSpeed load it
    reshard   loads the newest checkpoint of the run and saves it again, from these ranks
    broken    what gathering once needs of DeepSpeed is not there
    failing   gathering once fails in the middle, as it does when memory runs out

Rank 0 writes OUT/CASE.safetensors (noise and images of the first rollout, evaluation images of the
trained weights, what slots do to the model's output), OUT/CASE.json (all-gathers by phase) and
leaves the run in OUT/RUN.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gardo.config import check
from gardo.distributed.base import leave_process_group
from gardo.distributed.checkpoint import Checkpoints, CheckpointSettings
from gardo.distributed.shards import masters
from gardo.export import export_universal
from gardo.phases import sampled, scored, taught
from gardo.rewards.base import Panel
from gardo.rollout import noise_id
from gardo.session import Session, open_session
from gardo.streams import Stream
from gardo.train import train
from gardo_kernels import random_normal
from tests import ROOT

BASES: dict[str, dict[str, Any]] = {
    "flow_grpo": {"name": "flow_grpo", "clip_range": 1.0e-3, "beta": 1.0, "kl": "gaussian"},
    "diffusion_nft": {"name": "diffusion_nft", "beta": 0.04, "decay": {"slope": 0.1}},
    "awm": {"name": "awm", "times": [0, 3], "beta": 0.1, "ema_decay": {"slope": 0.1}},
    "kl_in_reward": {"name": "flow_grpo", "clip_range": 1.0e-3, "kl_in_reward": 0.1},
    "refl": {"name": "refl", "weight": 1.0, "margin": 0.0, "late": 0.5},
    "fast": {"name": "flow_grpo_fast", "clip_range": 1.0e-3, "beta": 0.1},
    "mix": {"name": "mix_grpo", "clip_range": 1.0e-3, "beta": 1.0, "kl": "gaussian",
            "window": {"kind": "random"}},
    "flash": {"name": "mix_grpo", "clip_range": 1.0e-3, "beta": 1.0, "kl": "gaussian",
              "window": {"kind": "progressive", "iterations": 1}, "flash": 0.5},
    "dance": {"name": "dance_grpo", "clip_range": 1.0e-3, "beta": 0.1, "kl": "velocity"},
    "guard": {"name": "grpo_guard", "clip_range": 1.0e-3, "beta": 1.0, "kl": "gaussian"},
    "ddpo": {"name": "ddpo", "beta": 1.0, "kl": "gaussian"},
}  # fmt: skip
SAMPLERS: dict[str, dict[str, Any]] = {  # where it is not the usual one
    "fast": {"steps": 6, "sde": "cps", "noise_level": 0.8},
    "mix": {"steps": 6},
    "flash": {"steps": 8, "schedule": "shifted_linear"},
    "dance": {"sde": "dance", "noise_level": 0.3, "schedule": "shifted_linear",
              "model_time": "integer", "same_initial_noise": True},
}  # fmt: skip
MECHANISMS = {
    "gate": {"fraction": 0.25, "limits": [0.1, 0.5], "warmup": 2},
    "diversity": {"features": "dinov3"},
    "reference": {"reset_updates": 4},
}
RELEASED = {"kl_reduction": "released", "kl_micro_batch": 3}
ALGORITHMS = {
    **BASES,
    "gardo": {"name": "gardo", "base": BASES["flow_grpo"], **MECHANISMS},
    "gardo_awm": {"name": "gardo", "base": BASES["awm"], **MECHANISMS},
    "gardo_released": {
        "name": "gardo",
        "base": {**BASES["flow_grpo"], **RELEASED},
        **MECHANISMS,
        "reference": {"reset_kl": 5e-5, "statistic": "loss"},
    },
    "gardo_nft_released": {
        "name": "gardo",
        "base": {**BASES["diffusion_nft"], **RELEASED},
        **MECHANISMS,
        "reference": {"reset_kl": 2e-4, "statistic": "loss"},
    },
    "gardo_nft": {"name": "gardo", "base": BASES["diffusion_nft"], **MECHANISMS},
    "gardo_flash": {"name": "gardo", "base": BASES["flash"], **MECHANISMS},
}
WEIGHTS = {
    "lora": ({"kind": "lora", "rank": 4, "alpha": 8}, 2e-3),
    "full": ({"kind": "full"}, 1e-4),
}
ENGINES: dict[str, dict[str, Any]] = {
    "local": {"engine": "local"},
    "zero": {"engine": "zero", "stage": 3},
    **{f"stage{n}": {"engine": "zero", "stage": n} for n in range(3)},
}
# Tiny models fit under DeepSpeed's limits, and then nothing is ever released: `tight` releases all.
OPTIONS: dict[str, dict[str, Any]] = {
    "tight": {"distributed": {"live_parameters": 1000, "reuse_distance": 0, "prefetch_bucket": 0}},
    "once": {"rollout": {"gather": "iteration"}},
    "each": {"rollout": {"gather": "step"}},
    "full": {"train": {"activation_checkpointing": "full"}},
    "selective": {"train": {"activation_checkpointing": "selective"}},
    "buckets": {"distributed": {"reduce_bucket": 30_000, "sub_group": 50_000}},
    "clip": {"train": {"max_grad_norm": 0.01}},
    "host": {"distributed": {"slots": "host"}},
    "offload": {"distributed": {"offload": "optimizer"}},
    "offload_all": {"distributed": {"offload": "parameters"}},
    "bf16": {"distributed": {"precision": "bfloat16"}},
    "bf16_masters": {"distributed": {"precision": "bfloat16", "masters": "bfloat16"}},
    "eight_bit": {"train": {"optimizer": {"name": "adamw_8bit", "lr": 2e-3}}},
    "deterministic": {"run": {"deterministic": True}},
    "persistent": {"distributed": {"persistence_threshold": 1000}},
    "hpz": {"distributed": {"hpz": 2}},
    "saving": {"checkpoint": {"every": 1, "keep": 2, "background": False}},
    "behind": {"checkpoint": {"background": True}},
    "triton": {"kernels": "triton"},
    "short": {"run": {"steps": 3}},
    "uneven": {  # some groups have no advantage; their rows are left out, or kept
        "rewards": {
            "uneven": {"kind": "tests.integration.uneven_proxy:Uneven", "role": "proxy"},
            "tiny_shape": {"role": "held_out"},
        },
    },
    "all_rows": {"train": {"keep_all_rows": True}},
    "recompute": {"algorithm": {"old_velocity": "recompute"}},
    "pref": {  # one group over all ranks, judged in pairs
        "data": {"prompts_per_step": 1, "images_per_prompt": 16},
        "rewards": {
            "tiny_shape": {
                "kind": "preference",
                "role": "proxy",
                "judge": {"kind": "tests.integration.pair_judge:Brighter"},
                "opponents": 4,
                "method": "bradley_terry",
            },
        },
    },
}


class Case:
    """A case's name taken apart."""

    def __init__(self, name: str) -> None:
        self.name = name
        base, *options = name.split("+")
        self.algorithm, self.weights, self.engine = base.split("-")
        self.cut = next((int(o[3:]) for o in options if o.startswith("cut")), None)
        self.resume = next((int(o[6:]) for o in options if o.startswith("resume")), None)
        self.reshard, self.universal = "reshard" in options, "universal" in options
        self.stale = "stale" in options
        self.fault = next((o for o in options if o in FAULTS), None)
        self.options = [o for o in options if o in OPTIONS]

    @property
    def run(self) -> str:
        """The name of the run: a cut run and its resumption share it."""
        marks = [f"cut{n}" for n in (self.cut, self.resume) if n is not None]
        marks += [self.fault] if self.fault else []
        marks += ["stale"] if self.stale else []
        base = f"{self.algorithm}-{self.weights}-{self.engine}"
        return ".".join([base, *self.options, *marks])


def recipe(case: Case, folder: Path, steps: int = 5) -> dict[str, Any]:
    """A small recipe with a continuous proxy: a counted one could flip on a pixel's last bit."""
    kind, lr = WEIGHTS[case.weights]
    sections: dict[str, Any] = {
        "model": {
            "family": "flux", "path": "builtin:flux", "size": [32, 32], "text_tokens": 8,
        },
        "train": {
            "weights": kind,
            "optimizer": {"lr": lr},
            "updates_per_step": 2,
            "micro_batch": 2 if case.algorithm == "refl" else 4,
        },
        "data": {
            "prompts": str(ROOT / "recipes/tiny_prompts.txt"),
            "prompts_per_step": 4,
            "images_per_prompt": 4,
        },
        "sampler": {
            "steps": 4, "train_steps": 2, "noise_level": 0.7,
            **SAMPLERS.get(case.algorithm.removeprefix("gardo_"), {}),
        },
        "algorithm": ALGORITHMS[case.algorithm],
        "rewards": {
            "tiny_shape": {"role": "proxy"},
            "tiny_purity": {"role": "auxiliary"},
            "dinov3": {"role": "features", "path": "builtin:dinov3", "size": 32},
        },
        "rollout": {"batch": 4},
        "evaluate": {
            "every": 100, "prompt_count": 4, "images_per_prompt": 1, "steps": 2, "batch": 2,
        },
        "checkpoint": {"every": 100},
        "distributed": {"threads": 1, **ENGINES[case.engine]},
        "run": {"name": case.run, "steps": steps, "seed": 7, "folder": str(folder)},
    }  # fmt: skip
    for option in case.options:
        for section, values in OPTIONS[option].items():
            merge = isinstance(values, dict)
            sections[section] = {**sections[section], **values} if merge else values
    return sections


class FirstImages(Panel):
    """A panel that keeps the first images it sees."""

    images: torch.Tensor | None = None

    def __call__(self, images_B3HW, prompts, **more):  # type: ignore[no-untyped-def]
        if self.images is None:
            self.images = images_B3HW
        return super().__call__(images_B3HW, prompts, **more)


class Gathers:
    """Counts ZeRO-3's all-gathers of weights."""

    def __init__(self) -> None:
        self.count = 0

    def watch(self) -> None:
        from deepspeed.runtime.zero import partition_parameters as zero

        gather = zero._dist_allgather_fn

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return gather(*args, **kwargs)

        zero._dist_allgather_fn = counted

    def by_phase(self, session: Session) -> list[tuple[str, int]]:
        """The list that every phase of the session from now on is added to."""
        seen: list[tuple[str, int]] = []
        phase = session.progress.phase

        @contextmanager
        def counting(name: str) -> Iterator[None]:
            before = self.count
            with phase(name):
                yield
            seen.append((name, self.count - before))

        session.progress.phase = counting  # type: ignore[method-assign]
        return seen


class Cut(Exception):
    pass


def cut_after(session: Session, updates: int) -> None:
    """Lets the run die after so many gradient steps."""
    step, done = session.engine.step, 0

    def stepping() -> bool:
        nonlocal done
        boundary = step()
        done += boundary
        if boundary and done == updates:
            raise Cut
        return boundary

    session.engine.step = stepping  # type: ignore[method-assign]


def go_stale(session: Session) -> None:
    """Recorded velocities that are not those that the sampler used: the contract must see it."""
    points = session.algorithm.points

    def stale(*given: Any) -> Any:
        fresh = points(*given)
        return fresh.with_velocity("rollout", fresh.velocities["rollout"] * 1.1)

    session.algorithm.points = stale  # type: ignore[method-assign]


@contextmanager
def broken_gather() -> Iterator[None]:
    from gardo.distributed.gather import GatherOnce

    working = GatherOnce._own_ids

    def missing(self: Any) -> Any:
        return self._offload.no_such_hooks

    GatherOnce._own_ids = missing  # type: ignore[method-assign]
    yield
    GatherOnce._own_ids = working  # type: ignore[method-assign]


@contextmanager
def failing_gather() -> Iterator[None]:
    from deepspeed.runtime.zero import partition_parameters as zero

    working, calls = zero._dist_allgather_fn, 0

    def third(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("of the test's making")
        return working(*args, **kwargs)

    zero._dist_allgather_fn = third
    yield
    zero._dist_allgather_fn = working


FAULTS = {"broken": broken_gather, "failing": failing_gather}


@torch.no_grad()
def velocity(session: Session) -> torch.Tensor:
    """The model's output on fixed inputs, with whatever weights are in place."""
    policy, engine = session.policy, session.engine
    row_R = torch.arange(2, device=engine.device)
    x_RX = random_normal(11, row_R, 0, policy.latent_shape)
    conditioning = policy.encode(session.prompts[:2])  # type: ignore[arg-type]
    return policy.velocity(x_RX, torch.tensor([0.9, 0.3], device=engine.device), conditioning)


def try_slots(session: Session) -> dict[str, torch.Tensor]:
    """What the model says with its own weights, with a slot's, and with its own again."""
    slots = session.engine.slots
    seen = {"live": velocity(session)}
    for name in slots.names:
        with session.engine.reading(name):
            seen[f"slot.{name}"] = velocity(session)
        seen[f"after.{name}"] = velocity(session)
    for name in slots.names:
        slots.copy("train", to=name)
        with session.engine.reading(name):
            seen[f"copied.{name}"] = velocity(session)
    return seen


def try_teachers(session: Session) -> dict[str, torch.Tensor]:
    """The reference's velocities where it is wanted: on one rank only, nowhere, everywhere.

    Every rank must make equally many calls, or this hangs. Kept: the largest difference to asking
    everywhere, and what is said where it was not asked.
    """
    engine = session.engine
    rollout = sampled(session, step=1000)
    credit = session.algorithm.credit(scored(session, rollout))
    points = session.algorithm.points(rollout, credit)
    everywhere = torch.ones_like(points.sample_R, dtype=torch.bool)
    first = torch.arange(len(everywhere), device=engine.device) == 0
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
        wanted = torch.where(mask_R.view(-1, *[1] * (whole.dim() - 1)), whole, 0)
        errors[f"teacher.{name}"] = (there - wanted).abs().max()[None]
    return errors


def try_universal(session: Session) -> dict[str, torch.Tensor]:
    """Whether DeepSpeed's own loader finds the trained masters and moments: 1 or 0."""
    from gardo.distributed import zero
    from gardo.distributed.shards import MOMENTS

    def bits(engine: Any) -> list[torch.Tensor]:
        pieces = engine.slots.shards.pieces
        state = engine.optimizer.state
        return [
            *masters(engine.slots.shards),
            *(piece.of(state[piece.home][kind]) for piece in pieces for kind in MOMENTS),
            *(torch.as_tensor(float(state[piece.home]["step"])) for piece in pieces),
        ]

    folder = session.recipe.run_folder / "universal"
    if session.engine.rank == 0:
        export_universal(session.recipe.run_folder, out=folder)
    session.engine.barrier()
    generated = zero.zero_config
    zero.zero_config = lambda *a, **k: {  # type: ignore[assignment]
        **generated(*a, **k), "checkpoint": {"load_universal": True},
    }  # fmt: skip
    settings = recipe(Case("flow_grpo-lora-zero"), session.recipe.run_folder / "other")
    for section in ("train", "distributed"):
        settings[section] = getattr(session.recipe, section).model_dump()
    other = open_session(check(settings, "other"), quiet=True).engine
    zero.zero_config = generated
    trained = bits(session.engine)
    fresh = masters(other.slots.shards)
    apart = any(not torch.equal(a, b) for a, b in zip(trained, fresh, strict=False))
    other._engine.load_checkpoint(str(folder))  # type: ignore[attr-defined]
    loaded = all(torch.equal(a, b) for a, b in zip(trained, bits(other), strict=True))
    other.close()
    return {"universal": torch.tensor([float(loaded and apart)])}


def run(name: str, out: Path, gathers: Gathers) -> None:
    case = Case(name)
    settings = check(recipe(case, out, steps=4 if "saving" in case.options else 5), name)
    resume = case.resume is not None or case.reshard
    with FAULTS[case.fault]() if case.fault else nullcontext():
        session = open_session(settings, quiet=True, resume=resume)
    if case.reshard:
        again = Checkpoints(
            out / f"{case.run}-reshard" / "checkpoints", session.engine, CheckpointSettings()
        )
        assert again.save(session.first_step, session.state()) is None
        session.engine.close()
        return
    phases = gathers.by_phase(session)
    session.panel = FirstImages(session.panel.rewards)
    plan, engine = session.geometry, session.engine
    sample_B = torch.arange(plan.first, plan.first + plan.samples, device=engine.device)
    noise = random_normal(7, noise_id(0, sample_B), Stream.INITIAL, session.policy.latent_shape)
    seen = {"start": velocity(session), "sigmas": session.algorithm.world.sigmas}
    if case.cut is not None:
        cut_after(session, case.cut)
    if case.stale:
        go_stale(session)
    try:
        train(session)
    except Cut:
        if session.log:
            session.log.close()
        engine.close()
        return
    if session.panel.images is not None:
        seen["images"] = engine.all_gather(session.panel.images)
    evaluation, _ = session.evaluator.batch(torch.arange(4, device=engine.device))
    seen |= {"noise": engine.all_gather(noise), "evaluation": evaluation}
    if "reference" in engine.slots.names and not resume:
        seen |= {n: engine.all_gather(e).max()[None] for n, e in try_teachers(session).items()}
    if case.universal:
        seen |= try_universal(session)
    seen |= try_slots(session)
    if session.log:
        session.log.close()
        save_file(seen, out / f"{name}.safetensors")
        blocks = session.policy.blocks()
        inside = {id(m) for block in blocks for m in block.modules()}
        outside = [m for m in session.policy.transformer.modules() if id(m) not in inside]
        counted = {
            "phases": phases,
            "blocks": len(blocks),
            "outside": sum(1 for m in outside if list(m.parameters(recurse=False))),
            "gather_note": getattr(engine, "gather_note", ""),
        }
        (out / f"{name}.json").write_text(json.dumps(counted))
    engine.close()


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    gathers = Gathers()
    if any("-local" not in case for case in arguments[1:]):
        gathers.watch()
    for case_name in arguments[1:]:
        run(case_name, Path(arguments[0]), gathers)
    leave_process_group()
