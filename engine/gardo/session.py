"""Everything a run is made of, put together from a recipe: checked first, loaded afterwards."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
import transformers
from torch import Tensor

from gardo import config
from gardo.algorithms.base import Algorithm, SamplerSettings, World
from gardo.config import Recipe
from gardo.distributed.base import Engine
from gardo.evaluation.evaluate import Evaluator
from gardo.planner import Geometry, geometry
from gardo.policies.base import Policy
from gardo.recipe_errors import RecipeError
from gardo.report.metrics_log import MetricsLog
from gardo.report.progress import Progress
from gardo.rewards.base import Panel
from gardo.rollout import rows_of
from gardo.types import Batch, Rollout


class LossContext:
    """What a loss may call: the trained model, its decoder, the differentiable reward."""

    def __init__(self, policy: Policy, panel: Panel) -> None:
        self.policy, self.panel = policy, panel
        self.rollout: Rollout | None = None

    def velocity(self, batch: Batch) -> Tensor:
        assert self.rollout is not None
        conditioning = rows_of(self.rollout.conditioning, batch.points.prompt_R)
        return self.policy.velocity(batch.points.x_RX, batch.points.sigma_R, conditioning)

    def decode(self, latents: Tensor) -> Tensor:
        return self.policy.decode(latents)

    def score(self, images: Tensor, batch: Batch) -> Tensor:
        assert self.rollout is not None
        prompts = [self.rollout.prompts[int(i)] for i in batch.points.sample_R]
        return self.panel.differentiable_score(images, prompts)


@dataclass
class Session:
    """A run in progress."""

    recipe: Recipe
    geometry: Geometry
    policy: Policy
    panel: Panel
    algorithm: Algorithm
    engine: Engine
    evaluator: Evaluator
    prompts: Sequence[str]
    ctx: LossContext
    log: MetricsLog | None
    progress: Progress
    first_step: int = 0

    def write(self, record: dict[str, Any]) -> None:
        if self.log:
            self.log.write(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.close()
        if self.log:
            self.log.close()
        if exception[0] is None:  # a failed rank must not wait for the others in a collective
            self.engine.close()


def build_algorithm(
    settings: Any, sampler: SamplerSettings, sigmas: Tensor, seed: int
) -> Algorithm:
    """The algorithm of a recipe's section, the base inside its wrapper."""
    world = World(sampler=sampler, sigmas=sigmas, seed=seed)
    plugin = config.algorithm_plugin(settings)
    base = getattr(settings, "base", None)
    if base is None:
        return plugin(settings, world)
    return plugin(settings, world, build_algorithm(base, sampler, sigmas, seed))


def build_policy(recipe: Recipe, device: torch.device) -> Policy:
    """The model with what trains switched on, in the precision that the engine starts from."""
    policy: Policy = config.policy_plugin(recipe.model)(
        recipe.model, dtype=getattr(torch, recipe.distributed.precision), device=device
    )
    weights = recipe.train.weights
    if weights.kind == "lora":
        policy.train_lora(
            rank=weights.rank,
            alpha=weights.alpha,
            targets=tuple(weights.targets) if weights.targets else None,
            seed=recipe.run.seed,
        )
    else:
        policy.train_full()
    return policy


def build_panel(recipe: Recipe, device: torch.device) -> Panel:
    settings = config.reward_settings(recipe)
    return Panel({n: config.reward_plugin(s)(s, device) for n, s in settings.items()})


def build_engine(recipe: Recipe, policy: Policy, plan: Geometry, device: torch.device) -> Engine:
    options: dict[str, Any] = {
        "optimizer": recipe.train.optimizer,
        "accumulation": plan.accumulation,
        "max_grad_norm": recipe.train.max_grad_norm,
        "device": device,
    }
    if recipe.distributed.engine == "local":
        from gardo.distributed.local import LocalEngine

        return LocalEngine(policy.trainable(), **options)
    from gardo.distributed.zero3 import Zero3Engine

    return Zero3Engine(policy.transformer, precision=recipe.distributed.precision, **options)


def keep_old_run(folder: Path) -> Path | None:
    """Moves an earlier run's folder out of the way, so that nothing is lost; returns its place."""
    if not folder.exists():
        return None
    number = next(
        n for n in itertools.count(1) if not folder.with_name(f"{folder.name}.{n}").exists()
    )
    return folder.rename(folder.with_name(f"{folder.name}.{number}"))


def quiet_libraries() -> None:
    """The run's output is ours: no loading bars, no note for each prompt that CLIP cuts."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def open_log(recipe: Recipe, progress: Progress) -> MetricsLog:
    """Makes the run's folder with its resolved recipe and an empty log."""
    folder = recipe.run_folder
    moved = keep_old_run(folder)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(config.dump(recipe), encoding="utf-8")
    if moved:
        progress.message(f"the earlier run of this name is now {moved}")
    return MetricsLog(folder / "metrics.jsonl")


def ranks() -> tuple[int, int, int]:
    """(rank, local rank, world) as the launcher says; (0, 0, 1) without one."""
    env = os.environ
    return int(env.get("RANK", 0)), int(env.get("LOCAL_RANK", 0)), int(env.get("WORLD_SIZE", 1))


def use_threads(recipe: Recipe, world: int) -> None:
    """CPU threads of this rank: the recipe's, or its share of the cores."""
    torch.set_num_threads(
        recipe.distributed.threads or max(1, len(os.sched_getaffinity(0)) // world)
    )


def open_session(recipe: Recipe, *, source: str = "recipe", quiet: bool = False) -> Session:
    """Checks the geometry, then loads the models and starts the engine."""
    rank, local_rank, world = ranks()
    quiet_libraries()
    if world > 1 and recipe.distributed.engine == "local":
        raise RecipeError(
            f"{source}: distributed.engine: local runs in one process, but {world} ranks were "
            "launched; use engine zero"
        )
    plan = geometry(recipe, rank=rank, world=world, source=source)
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if not cuda:
        use_threads(recipe, world)
    progress = Progress(recipe.run.steps, enabled=rank == 0 and not quiet)
    with progress.phase("load"):
        try:
            policy = build_policy(recipe, device)
            panel = build_panel(recipe, device)
        except (OSError, ValueError) as error:  # what a folder's inside or a hub can still refuse
            raise RecipeError(f"{source}: a model does not load: {error}") from error
        engine = build_engine(recipe, policy, plan, device)
    progress.take_seconds()
    log = open_log(recipe, progress) if rank == 0 else None
    algorithm = build_algorithm(
        recipe.algorithm,
        recipe.sampler,
        policy.sigmas(recipe.sampler.steps),
        recipe.run.seed,
    )
    engine.make_slots(algorithm.slots)
    return Session(
        recipe=recipe,
        geometry=plan,
        policy=policy,
        panel=panel,
        algorithm=algorithm,
        engine=engine,
        evaluator=Evaluator(
            policy,
            panel,
            engine,
            recipe.evaluation_prompts(),
            recipe.evaluate,
            seed=recipe.run.seed,
            folder=recipe.run_folder,
        ),
        prompts=recipe.prompts(),
        ctx=LossContext(policy, panel),
        log=log,
        progress=progress,
    )
