"""Everything a run is made of, put together from a recipe: checked first, loaded afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from gardo import environment
from gardo.algorithms.base import Algorithm, World, build
from gardo.bad_updates import BadUpdates
from gardo.beside import Beside
from gardo.distributed.average import Average
from gardo.distributed.base import Engine, gather_text
from gardo.distributed.checkpoint import Checkpoints
from gardo.distributed.nodes import check_folder
from gardo.distributed.saved import Unusable, committed
from gardo.ending import Stop
from gardo.evaluation.evaluate import Evaluator
from gardo.loading import (
    join_ranks,
    load_models,
    meet_endpoints_of,
    quiet_libraries,
    start_workers,
)
from gardo.machine import (
    as_it_runs,
    blocks_trouble,
    check_accelerator,
    check_machine,
    kernels_trouble,
    ranks,
    settled_compile,
    use_allocator,
    use_bf16_reductions,
    use_deterministic_kernels,
    use_device,
    use_threads,
)
from gardo.meeting import meeting
from gardo.planner import Geometry, geometry
from gardo.policies.base import Policy
from gardo.recipe import Recipe, reward_settings
from gardo.recipe_errors import RecipeError
from gardo.report.kept import forget_after
from gardo.report.live import LiveReport
from gardo.report.metrics_log import MetricsLog, missing, read_metrics
from gardo.report.phase_clock import PhaseClock
from gardo.report.profile import StepProfile
from gardo.report.progress import Progress
from gardo.report.trackers.base import Trackers
from gardo.rewards.assembly import Workers
from gardo.rewards.panel import Panel
from gardo.rollout import LossContext
from gardo.run_folder import check_changes, keep_id, open_log, own_folder, run_id
from gardo.run_lock import RunLock
from gardo.types import Prompt


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
    checkpoints: Checkpoints
    prompts: Sequence[Prompt]
    ctx: LossContext
    beside: Beside
    log: MetricsLog | None
    trackers: Trackers
    live: LiveReport
    progress: Progress
    bad_updates: BadUpdates
    workers: Workers  # of this machine, where this is its first rank
    average: Average | None = None  # of the weights, where the recipe asks for one
    profile: StepProfile | None = None  # where one was asked for, on the first rank
    stop: Stop = field(default_factory=Stop)
    first_step: int = 0
    finished: int = 0  # iterations
    evaluated: int = -1  # after so many of them, last

    def write(self, record: dict[str, Any]) -> None:
        if not self.log:
            return
        waited = self.log.problem
        self.log.write(record)
        self.trackers.write(record)
        self.live.write()
        if self.log.problem and not waited:
            problem = self.log.problem
            self.progress.message(f"{self.log.path}: {problem}; its lines wait in memory for room")
        elif waited and not self.log.problem:
            self.progress.message(f"{self.log.path}: all lines are written")

    def state(self) -> dict[str, Any]:
        """All state that is not in the engine's tensors; JSON. The rest follows from the recipe."""
        return {
            "base": self.policy.identity if self.engine.rank == 0 else None,
            "algorithm": self.algorithm.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "bad_updates": self.bad_updates.state_dict(),
            "evaluation": self.evaluator.identity,
            "evaluated": self.evaluated,
            "first_evaluation": {n: v.tolist() for n, v in self.evaluator.first.items()},
        }

    def resume(self) -> None:
        """Goes back to the newest checkpoint of the run."""
        saved, wrong = self.checkpoints.newest()
        for problem in wrong:
            self.progress.message(f"checkpoint passed over: {problem}")
        last = self.recipe.run.steps
        if saved and saved.step > last:
            raise RecipeError(
                f"run.steps: {last}, but {saved.folder} is past that; give more steps, or export it"
            )
        if saved is None:
            raise RecipeError(
                f"{self.checkpoints.folder}: no checkpoint verifies; leave out --resume to start "
                "anew (this run is kept, under another name)"
            )
        try:
            state = self.checkpoints.restore(saved)
        except Unusable as error:
            raise RecipeError(str(error)) from error
        base = self.policy.identity if self.engine.rank == 0 else state["base"]
        if self.engine.agree_max(int(base != state["base"])):
            raise RecipeError(
                f"{saved.folder}: it trained {state['base']}, model.path and train.weights.path "
                f"are {base}; use those that it trained"
            )
        self.checkpoints.set_aside(saved)
        self.algorithm.load_state_dict(state["algorithm"])
        if self.average:
            self.average.load_state_dict(state["average"])
        if "bad_updates" in state:  # not in checkpoints of an earlier release
            self.bad_updates.load_state_dict(state["bad_updates"])
        if state.get("evaluation", self.evaluator.identity) == self.evaluator.identity:
            self.evaluator.restore(state["first_evaluation"])
        else:
            self.progress.message(
                "evaluations are not those of before: changes count from the next one on"
            )
        self.first_step = self.finished = saved.step
        self.evaluated = state.get("evaluated", saved.step)
        self.progress.resumed(saved.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.profile:
            self.profile.close()
        self.trackers.close()
        if self.log:
            self.log.close()
            self.live.close()
            if self.log.problem:
                self.progress.message(f"{self.log.path} lacks its last lines: {self.log.problem}")
        self.progress.close()
        if self.policy.compiled:
            self.policy.compiled.close()
        self.checkpoints.close()
        self.panel.close()
        self.workers.close()
        if exception[0] is None:  # a failed rank must not wait for the others in a collective
            self.engine.close()


def world_of(recipe: Recipe, policy: Policy) -> World:
    """What the algorithm may know of the run."""
    return World(
        sampler=recipe.sampler,
        sigmas=recipe.sampler.sigmas(policy.sigmas),
        seed=recipe.run.seed,
        kernels=recipe.kernels,
        updates=recipe.train.updates_per_step,
    )


def build_evaluator(recipe: Recipe, policy: Policy, panel: Panel, engine: Engine) -> Evaluator:
    return Evaluator(
        policy,
        panel,
        engine,
        recipe.evaluation_prompts(),
        recipe.evaluate,
        seed=recipe.run.seed,
        folder=recipe.run_folder,
        kernels=recipe.kernels,
    )


def prepare(recipe: Recipe, source: str) -> tuple[Recipe, torch.device, Geometry, list[str]]:
    """Readies this rank and meets the others: all that is refused before anything heavy loads.

    The recipe as it runs here, with notes where that is not as it was asked for.
    """
    rank, local_rank, world = ranks()
    use_allocator()
    check_accelerator(recipe, source)
    device = use_device(local_rank)
    check_machine(recipe, world, device, source)
    if recipe.train.compile == "auto" and device.type == "cpu":
        recipe = settled_compile(recipe, "none")
    plan = geometry(recipe, rank=rank, world=world, source=source)
    kernels = kernels_trouble(recipe, device, source)
    blocks = blocks_trouble(recipe, device, source)
    use_threads(recipe, world)
    use_bf16_reductions(recipe.run.bf16_reduced_precision_reduction)
    if recipe.run.deterministic:
        use_deterministic_kernels()
    with meeting(recipe, source):
        group = join_ranks(recipe, device)
    try:
        check_folder(Path(recipe.run.folder), group)
        meet_endpoints_of(
            reward_settings(recipe), group, prompt=recipe.prompts()[0], size=recipe.model.size
        )
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from error
    runs, notes = as_it_runs(recipe, group, kernels=kernels, blocks=blocks)
    return runs, device, plan, notes


def open_session(
    asked: Recipe,
    *,
    source: str = "recipe",
    quiet: bool = False,
    resume: bool = False,
    profile: bool = False,
    lock: RunLock | None = None,
) -> Session:
    """Checks the geometry, then loads the models and starts the engine.

    `resume` goes on from the run's newest checkpoint, if it has one; `profile` records a step.
    `lock` is taken before anything of the run is touched, to be given back by who made it; without
    one nobody else must be using the run's folder.
    """
    quiet_libraries()
    resume = resume and bool(committed(asked.checkpoint_folder))
    changes = check_changes(asked, source) if resume else []
    known = run_id(asked.run_folder) if resume else None
    recipe, device, plan, notes = prepare(asked, source)
    if lock:
        notes.append(own_folder(lock, join_ranks(recipe, device), source))
    log_file = recipe.run_folder / "metrics.jsonl"
    history = read_metrics(log_file) if resume and log_file.is_file() else []
    first = ranks()[0] == 0
    progress = Progress(
        recipe.run.steps,
        enabled=first and not quiet,
        history=history,
        phases=PhaseClock(device),
    )
    with progress.phase("load"):
        workers = start_workers(recipe, progress.message)
        policy, panel, engine = load_models(recipe, plan, device, source, workers)
    measured: list[Policy | Panel | Engine] = [policy, panel, engine]
    for part in measured:
        part.phase = progress.phase
    progress.phases.watch(policy.transformer)
    progress.take()
    progress.phases.memory.take()
    algorithm = build(recipe.algorithm, world_of(recipe, policy))
    engine.make_slots(recipe.slots)
    session = Session(
        recipe=recipe,
        geometry=plan,
        policy=policy,
        panel=panel,
        algorithm=algorithm,
        engine=engine,
        evaluator=build_evaluator(recipe, policy, panel, engine),
        checkpoints=Checkpoints(recipe.checkpoint_folder, engine, recipe.checkpoint, known),
        prompts=recipe.prompts(),
        ctx=LossContext(policy, panel.differentiable_score),
        beside=Beside(device, on=recipe.rollout.overlap, phase=progress.phase),
        log=None,
        trackers=Trackers(recipe.run_folder, progress.message),
        live=LiveReport(recipe.run_folder),
        progress=progress,
        bad_updates=BadUpdates(recipe.train.bad_updates),
        workers=workers,
        average=Average(recipe.train.ema) if recipe.train.ema else None,
    )
    for said in filter(None, (engine.gather_note, *notes)):
        progress.message(said)
    if resume:
        session.resume()
        for change in changes:
            progress.message(f"changed since the run started: {change}")
        if log_file.is_file():
            for trouble in missing(log_file, session.first_step):
                progress.message(trouble)
    start = environment.describe(engine, after_step=session.first_step)
    problem = begin_files(session, asked, start, profile=profile) if first else ""
    if said := gather_text(engine, problem)[0]:
        raise RecipeError(f"{source}: run.folder: {said}")
    return session


def begin_files(s: Session, asked: Recipe, start: dict[str, Any], *, profile: bool) -> str:
    """Opens what the first rank writes in the run's folder; what was wrong with that, if anything.

    `asked` is the recipe as its user wrote it, `start` this machine and its libraries.
    """
    folder, left = s.recipe.run_folder, s.recipe.run.steps - s.first_step
    try:
        s.log = open_log(asked, s.progress, s.first_step)
        s.checkpoints.run = keep_id(folder, s.checkpoints.run)
        environment.keep(folder, start)
        said = asked.model_dump(mode="json")
        about = {"id": s.checkpoints.run, "name": asked.run.name, "recipe": said}
        s.trackers.start(asked.run.track, about, s.first_step)
        forget_after(folder, s.first_step)
        if profile and left:
            s.profile = StepProfile(folder / "profile", s.engine.device, left=left)
    except OSError as error:  # a full disk
        return str(error)
    return ""
