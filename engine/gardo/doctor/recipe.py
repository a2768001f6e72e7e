"""What a recipe needs, and whether it is here: models, prompts, packages, batch, memory, disk.

Each finding ends with the mend. Nothing is loaded, written or downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from gardo import recipe_rules
from gardo.distributed.checkpoint import ROOM
from gardo.doctor.finding import Finding
from gardo.doctor.models import models, size
from gardo.hf_prompts import MARK, is_dataset
from gardo.machine import check_accelerator, check_machine
from gardo.nvidia import gpus_here
from gardo.planner import geometry
from gardo.planner.memory import SHARED, total
from gardo.planner.page import Plan, advice_line, disk_bytes, plan, verdict_line
from gardo.planner.shadow import Shadow
from gardo.recipe import Recipe, reward_plugin, reward_settings
from gardo.recipe_errors import RecipeError
from gardo.rewards.assembly import with_judges, worker_name
from gardo.rewards.serving.chat import OPENAI
from gardo.settings import FieldError

SERVING = ("fastapi", "uvicorn", "prometheus_client")  # what a worker's own process imports
KINDS = 4  # of pictures that run.keep_samples keeps


@dataclass(frozen=True)
class Where:
    """The GPUs that a recipe is asked about: those here, or others of so many bytes."""

    gpus: int  # ranks; without GPUs processes on the CPU
    room: int | None  # bytes of each; None: not known
    here: bool

    @classmethod
    def of(cls, gpus: int | None, room: int | None) -> Where:
        """`gpus` of `room` bytes; what is left out is this machine's."""
        there = gpus_here()
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(there)]
        smallest = min(sizes, default=None)
        if room is not None or 0 < there < (gpus or 0):
            return cls(gpus or there or 8, room or smallest, here=False)
        return cls(gpus or there or 1, smallest, here=True)


def examine(recipe: Recipe, source: str, where: Where) -> Iterator[Finding]:
    """All findings of a recipe that was read without its prompts' files."""
    yield from models(recipe)
    yield from _files(recipe)
    yield from _packages(recipe)
    yield from _served(recipe)
    if where.here:
        yield _device(recipe, source)
    batch = _batch(recipe, where.gpus)
    yield batch
    if batch.state == "ok":
        with _no_network():
            yield from _planned(recipe, where)


def _files(recipe: Recipe) -> Iterator[Finding]:
    """Prompts, and what `load` leaves alone without them."""
    yield from _broken(recipe, recipe_rules.OF_FILES)
    prompts = recipe.data.prompts
    if is_dataset(prompts) and not os.path.isdir(prompts.removeprefix(MARK)):
        detail = f"{prompts}: a data set; a run reads it from the hub or its cache"
        yield Finding("data.prompts", "note", detail)
        return
    if broken := [*_broken(recipe, recipe_rules.OF_PROMPTS)]:
        yield broken[0]  # the rest says the same
        return
    training, asked = len(recipe.prompts()), len(recipe.evaluation_prompts())
    detail = f"{prompts}: {training} to train on, {asked} to evaluate with"
    yield Finding("data.prompts", "ok", detail, {"train": training, "evaluate": asked})


def _broken(recipe: Recipe, rules: Iterable[Callable[[Recipe], None]]) -> Iterator[Finding]:
    """A problem for each rule that does not hold."""
    for rule in rules:
        try:
            rule(recipe)
        except ValueError as error:
            field, _, rest = str(error).partition(": ")
            yield Finding(field, "problem", rest)


def _packages(recipe: Recipe) -> Iterator[Finding]:
    """Those that rewards need here beside gardo's own."""
    for name, settings in with_judges(reward_settings(recipe)).items():
        worker = worker_name(settings)
        if settings.where != "here" and not worker:
            continue
        if worker and getattr(recipe.scoring.workers.get(worker), "python", None):
            detail = f"{worker} has a Python of its own; `gardo rewards check` tries it"
            yield Finding(f"rewards.{name}", "note", detail)
            continue
        needed = (*reward_plugin(settings).packages, *(SERVING if worker else ()))
        if lacking := [p for p in needed if importlib.util.find_spec(p) is None]:
            mend = "pip install 'gardo-engine[rewards]'"
            detail = f"{settings.kind} needs {', '.join(lacking)}, not installed; {mend}"
            yield Finding(f"rewards.{name}", "problem", detail, {"lacking": lacking})
        elif needed:
            yield Finding(f"rewards.{name}", "ok", f"{', '.join(needed)} installed")


def _served(recipe: Recipe) -> Iterator[Finding]:
    """Rewards that a server scores: it is not asked here."""
    every = with_judges(reward_settings(recipe))
    for name, settings in every.items():
        if settings.where.startswith((OPENAI, "http")):
            detail = f"scored at {settings.where}, which was not asked; `gardo rewards check` does"
            yield Finding(f"rewards.{name}", "note", detail)


def _device(recipe: Recipe, source: str) -> Finding:
    device = torch.device("cuda" if gpus_here() else "cpu")
    try:
        check_accelerator(recipe, source)
        check_machine(recipe, 1, device, source)
    except RecipeError as error:
        said = str(error).removeprefix(f"{source}: ")
        return Finding("device", "problem", f"{said}; or ask about others: --gpu-memory 80GB")
    return Finding("device", "ok", f"{device.type}; optimizer, attention and base run on it")


def _batch(recipe: Recipe, gpus: int) -> Finding:
    data, updates = recipe.data, recipe.train.updates_per_step
    try:
        if recipe.distributed.engine == "local" and gpus > 1:
            raise FieldError("distributed.engine: local runs in one process; use zero, or 1 GPU")
        cut = geometry(recipe, rank=0, world=gpus)
    except (RecipeError, ValueError) as error:
        return Finding("batch", "problem", str(error).removeprefix("recipe: "))
    return Finding(
        "batch",
        "ok",
        f"{data.prompts_per_step} prompts x {data.images_per_prompt} images on {gpus} rank"
        f"{'s' * (gpus > 1)}: each {cut.samples} images, {updates} updates of {cut.accumulation} "
        f"micro-batches of {cut.micro_batch} rows",
        {"ranks": gpus, "images_a_rank": cut.samples, "micro_batches": cut.accumulation},
    )


# ---- what the planner counts ---------------------------------------------------------------------


def _planned(recipe: Recipe, where: Where) -> Iterator[Finding]:
    """Memory of the GPUs and of the host, and room on the disk."""
    try:
        if where.room is not None:
            planned = plan(recipe, world=where.gpus, room=where.room)
            yield _gpu_memory(planned)
            if where.here:
                yield _host_memory(planned)
                yield _disk(recipe, planned.shadow)
            return
        if not recipe.model.path.startswith("builtin:"):
            detail = "no GPU is here to plan for; --gpus 8 --gpu-memory 80GB plans for others"
            yield Finding("gpu memory", "note", detail)
        yield _disk(recipe, Shadow(recipe))
    except (RecipeError, ValueError) as error:
        yield Finding("memory", "note", f"not planned: {error}")
    except Exception as error:  # a model of one's own may do what no plan foresees
        yield Finding("memory", "note", f"not planned: {type(error).__name__}: {error}")


def _gpu_memory(planned: Plan) -> Finding:
    facts = {"peak_bytes": planned.memory.peak, "gpu_bytes": planned.room}
    line = verdict_line(planned.memory, planned.room, planned.settled)
    if planned.fits:
        return Finding("gpu memory", "ok", line, facts)
    detail = f"{line}; {advice_line(planned.recipe, planned.advice)}"
    return Finding("gpu memory", "problem", detail, facts)


def _host_memory(planned: Plan) -> Finding:
    """What the ranks of this machine keep there; their text encoders are there once."""
    parts, there = planned.memory.host, psutil.virtual_memory().total
    shared = total(part for part in parts if SHARED in part.name)
    need = planned.world * (total(parts) - shared) + shared
    facts = {"bytes": need, "host_bytes": there}
    detail = f"{size(need)} of {size(there)} by the plan, beside what processes take"
    if need <= there:
        return Finding("host memory", "ok", detail, facts)
    mend = "use fewer ranks, or leave distributed.offload out"
    return Finding("host memory", "problem", f"{detail}; {mend}", facts)


def _disk(recipe: Recipe, shadow: Shadow) -> Finding:
    """At the run's folder: checkpoints, the export, pictures that are kept."""
    keeps = recipe.run.keep_samples
    pictures = keeps.most * KINDS * keeps.count * keeps.longest**2 * 3 if keeps else 0
    need = int(ROOM * disk_bytes(recipe, shadow)) + pictures
    folder = recipe.run_folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    facts = {"bytes": need, "free_bytes": free, "folder": str(folder)}
    detail = f"{size(need)} for checkpoints, export and pictures; {size(free)} free at {there}"
    if need <= free:
        return Finding("disk", "ok", detail, facts)
    mend = "give run.folder a larger disk, or use a smaller checkpoint.keep"
    return Finding("disk", "problem", f"{detail}; {mend}", facts)


@contextmanager
def _no_network() -> Iterator[None]:
    """Inside, the hub's client asks nobody: a plan reads configurations that are not here."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
