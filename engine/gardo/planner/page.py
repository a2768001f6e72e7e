"""What `gardo plan` prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

from gardo.distributed.optimizers import moment_bytes
from gardo.planner.advice import Change, advise
from gardo.planner.geometry import Geometry, geometry
from gardo.planner.memory import Counted, Memory, Part, total
from gardo.planner.shadow import Shadow
from gardo.planner.sizes import gigabytes
from gardo.planner.time import MATMUL, NETWORK, NVLINK, SHARE, Seconds, seconds
from gardo.recipe import Recipe


def _parts(parts: Iterable[Part]) -> str:
    shown = [
        f"{p.name} {gigabytes(p.bytes)}{' (assumed)' if p.assumed else ''}"
        for p in parts
        if p.bytes
    ]
    return ", ".join(shown)


def _memory(memory: Memory) -> Iterator[str]:
    yield f"stays      {gigabytes(memory.resident):>7}  {_parts(memory.stays)}"
    for phase in memory.phases:
        sign = " " if phase.before else "+"
        yield f"{phase.name:10} {gigabytes(memory.peak_of(phase)):>7}  {sign} {_parts(phase.parts)}"
    if memory.host:
        yield f"host       {gigabytes(total(memory.host)):>7}  {_parts(memory.host)}"
    for worker, parts in memory.workers.items():
        yield f"{worker}: {gigabytes(total(parts))}  {_parts(parts)}"
    if memory.unknown:
        yield f"not counted: {', '.join(memory.unknown)}"


@dataclass(frozen=True)
class Plan:
    """A recipe on GPUs that need not be here."""

    recipe: Recipe
    source: str
    world: int
    room: int  # bytes of each GPU
    nodes: int
    geometry: Geometry
    shadow: Shadow
    settled: Recipe  # as it would run in that room
    memory: Memory
    time: Seconds
    advice: tuple[list[Change], Memory] | None  # where it does not fit, and something would

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.room

    @property
    def hours(self) -> float:
        return self.time.total * self.recipe.run.steps / 3600

    @property
    def images(self) -> int:
        data = self.recipe.data
        return self.recipe.run.steps * data.prompts_per_step * data.images_per_prompt


def plan(recipe: Recipe, *, world: int, room: int, nodes: int = 1, source: str = "recipe") -> Plan:
    """RecipeError where the recipe's batches do not divide over `world` GPUs."""
    cut = geometry(recipe, rank=0, world=world, source=source)
    shadow = Shadow(recipe)
    counted = Counted(shadow)
    settled = counted.settled(recipe, cut, world, room)
    memory = counted.memory(settled, cut, world)
    advice = advise(counted, recipe, world, room) if memory.peak > room else None
    time = seconds(settled, shadow, cut, world, nodes)
    return Plan(recipe, source, world, room, nodes, cut, shadow, settled, memory, time, advice)


def as_text(of: Plan) -> str:
    """The page that `gardo plan` prints."""
    recipe, cut, shadow, time = of.recipe, of.geometry, of.shadow, of.time
    lines = [
        f"{of.source} on {of.world} GPU{'s' * (of.world > 1)} of {gigabytes(of.room)} GB",
        "",
        f"model      {shadow.parameters / 1e9:.2f} B parameters, of which train "
        f"{shadow.trainable / 1e6:.1f} M",
        f"iteration  {recipe.data.prompts_per_step} prompts x {recipe.data.images_per_prompt} "
        f"images; each GPU: {cut.samples} images, {recipe.train.updates_per_step} updates of "
        f"{cut.accumulation} micro-batches of {cut.micro_batch} rows",
        "",
        "Memory of a GPU in GB, counted on tensors without data, but for what is assumed",
        *_memory(of.memory),
        "",
        verdict_line(of.memory, of.room, of.settled),
        *([] if of.fits else [advice_line(recipe, of.advice)]),
        "",
        f"Time, modelled, not measured: {MATMUL / 1e12:.0f} TFLOP/s a GPU, of which sampling "
        f"reaches {SHARE['sample']:.0%} and training {SHARE['train']:.0%}, in eager blocks as "
        "diffusers and PEFT run them",
        f"iteration  {time.total:.1f} s "
        f"({', '.join(f'{name} {s:.1f}' for name, s in time.phases.items())}); "
        f"{time.flops / 1e15:.2f} PFLOP a GPU",
        f"gathering  {time.gathering:.1f} s, if nothing of it is hidden "
        f"({(NVLINK if of.nodes == 1 else NETWORK) / 1e9:.0f} GB/s)",
        f"run        {recipe.run.steps} iterations: {_long(of.hours)}, {of.images:,} images, "
        "without rewards and evaluations",
        f"disk       {gigabytes(disk_bytes(recipe, shadow))} GB of checkpoints and export",
    ]
    return "\n".join(lines)


def as_data(of: Plan) -> dict[str, Any]:
    """The same for `gardo plan --json`: bytes, counts, seconds that are modelled, not measured."""
    memory, recipe = of.memory, of.recipe
    changes, then = of.advice or ([], None)
    return {
        "recipe": of.source,
        "gpus": of.world,
        "machines": of.nodes,
        "gpu_bytes": of.room,
        "fits": of.fits,
        "peak_bytes": memory.peak,
        "peak_phase": memory.peak_phase.name,
        "parameters": of.shadow.parameters,
        "trainable": of.shadow.trainable,
        "stays": _bytes(memory.stays),
        "phases": {
            phase.name: {"peak_bytes": memory.peak_of(phase), "parts": _bytes(phase.parts)}
            for phase in memory.phases
        },
        "host": _bytes(memory.host),
        "workers": {name: _bytes(parts) for name, parts in memory.workers.items()},
        "not_counted": [*memory.unknown],
        "prompts_per_step": recipe.data.prompts_per_step,
        "images_per_prompt": recipe.data.images_per_prompt,
        "images_a_gpu": of.geometry.samples,
        "updates": recipe.train.updates_per_step,
        "micro_batches": of.geometry.accumulation,
        "micro_batch": of.geometry.micro_batch,
        "advice": [change.on(recipe) for change in changes],
        "advice_peak_bytes": then.peak if then else None,
        "modelled_seconds": {**of.time.phases, "total": of.time.total},
        "modelled_hours": of.hours,
        "images": of.images,
        "disk_bytes": disk_bytes(recipe, of.shadow),
    }


def _bytes(parts: Iterable[Part]) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in parts:
        found[part.name] = found.get(part.name, 0) + int(part.bytes)
    return found


def verdict_line(memory: Memory, room: int, recipe: Recipe) -> str:
    """`recipe` as it was settled for that room."""
    each = recipe.distributed.stage == 3 and recipe.rollout.gather == "step"
    return (
        f"peak {gigabytes(memory.peak)} GB of {gigabytes(room)}, in phase "
        f"{memory.peak_phase.name}{', weights gathered at every forward' * each}: "
        f"{'fits' if memory.peak <= room else 'does not fit'}"
    )


def advice_line(recipe: Recipe, found: tuple[list[Change], Memory] | None) -> str:
    """Of what `advise` gave for a recipe."""
    if found is None:
        return "nothing that was tried makes it fit; use more GPUs, or a smaller model.size"
    changes, memory = found
    settings = " ".join(change.on(recipe) for change in changes)
    return f"fits with  {settings}   (peak {gigabytes(memory.peak)} GB)"


def _long(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def disk_bytes(recipe: Recipe, shadow: Shadow) -> int:
    """Checkpoints that are kept, one that is being written, and the exported weights."""
    moments = moment_bytes(recipe.train.optimizer.name, recipe.distributed.masters)
    of_one = ceil(shadow.trainable * (4 + moments + 4 * len(recipe.slots)))
    return (recipe.checkpoint.keep + 1) * of_one + 2 * shadow.trainable
