"""What `gardo plan` prints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from math import ceil

from gardo.distributed.optimizers import moment_bytes
from gardo.planner.advice import Change, advise
from gardo.planner.geometry import geometry
from gardo.planner.memory import Counted, Memory, Part, total
from gardo.planner.shadow import Shadow
from gardo.planner.time import MATMUL, NETWORK, NVLINK, SHARE, seconds
from gardo.recipe import Recipe


def bytes_of(text: str) -> int:
    """80GB, 79.1GiB, 24g -> bytes. ValueError says what is understood."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GIB|G|)\s*", text.upper())
    if not found or not float(found[1]):
        raise ValueError(f"{text!r} is no memory size; write 80GB or 79GiB")
    return int(float(found[1]) * (2**30 if found[2] == "GIB" else 10**9))


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f}" if count >= 1e8 else f"{count / 1e9:.3f}"


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


def plan_page(
    recipe: Recipe, *, world: int, room: int, nodes: int = 1, source: str = "recipe"
) -> tuple[list[str], bool]:
    """The lines of the page, and whether the recipe fits into `room` bytes of each GPU."""
    plan = geometry(recipe, rank=0, world=world, source=source)
    shadow = Shadow(recipe)
    counted = Counted(shadow)
    settled = counted.settled(recipe, plan, world, room)
    memory = counted.memory(settled, plan, world)
    fits = memory.peak <= room
    time = seconds(settled, shadow, plan, world, nodes)
    data, steps = recipe.data, recipe.run.steps
    lines = [
        f"{source} on {world} GPU{'s' * (world > 1)} of {gigabytes(room)} GB",
        "",
        f"model      {shadow.parameters / 1e9:.2f} B parameters, of which train "
        f"{shadow.trainable / 1e6:.1f} M",
        f"iteration  {data.prompts_per_step} prompts x {data.images_per_prompt} images; each GPU: "
        f"{plan.samples} images, {recipe.train.updates_per_step} updates of {plan.accumulation} "
        f"micro-batches of {plan.micro_batch} rows",
        "",
        "Memory of a GPU in GB, counted on tensors without data, but for what is assumed",
        *_memory(memory),
        "",
        verdict_line(memory, room, settled),
    ]
    if not fits:
        lines.append(advice_line(recipe, advise(counted, recipe, world, room)))
    hours = time.total * steps / 3600
    phases = ", ".join(f"{name} {s:.1f}" for name, s in time.phases.items())
    lines += [
        "",
        f"Time, modelled, not measured: {MATMUL / 1e12:.0f} TFLOP/s a GPU, of which sampling "
        f"reaches {SHARE['sample']:.0%} and training {SHARE['train']:.0%}, in eager blocks as "
        "diffusers and PEFT run them",
        f"iteration  {time.total:.1f} s ({phases}); {time.flops / 1e15:.2f} PFLOP a GPU",
        f"gathering  {time.gathering:.1f} s, if nothing of it is hidden "
        f"({(NVLINK if nodes == 1 else NETWORK) / 1e9:.0f} GB/s)",
        f"run        {steps} iterations: {hours:.1f} hours, "
        f"{steps * data.prompts_per_step * data.images_per_prompt:,} images, without rewards and "
        "evaluations",
        f"disk       {gigabytes(_disk(recipe, shadow))} GB of checkpoints and export",
    ]
    return lines, fits


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


def _disk(recipe: Recipe, shadow: Shadow) -> int:
    """Checkpoints that are kept, one that is being written, and the exported weights."""
    moments = moment_bytes(recipe.train.optimizer.name, recipe.distributed.masters)
    of_one = ceil(shadow.trainable * (4 + moments + 4 * len(recipe.slots)))
    return (recipe.checkpoint.keep + 1) * of_one + 2 * shadow.trainable
