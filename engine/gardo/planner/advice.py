"""Which settings make a recipe fit: a few are tried in order of what they cost, best first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from gardo.config import Recipe
from gardo.planner.geometry import geometry
from gardo.planner.memory import Counted, Memory


@dataclass(frozen=True)
class Change:
    field: str
    value: Any

    def __str__(self) -> str:
        return f"--set {self.field}={self.value}"


def changed(recipe: Recipe, change: Change) -> Recipe:
    """The recipe with one field of a section changed."""
    *sections, name = change.field.split(".")
    whole: Any = recipe
    parents = [whole := getattr(whole, section) for section in sections]
    value = parents[-1].model_copy(update={name: change.value})
    for section, parent in zip(reversed(sections[1:]), reversed(parents[:-1]), strict=True):
        value = parent.model_copy(update={section: value})
    return recipe.model_copy(update={sections[0]: value})


def _divisors(number: int, below: int) -> list[int]:
    """Of the number, largest first."""
    return [n for n in range(below - 1, 0, -1) if number % n == 0]


def _sampled_at_once(recipe: Recipe, world: int) -> list[int]:
    samples = geometry(recipe, rank=0, world=world).samples
    return _divisors(samples, recipe.rollout.batch or samples)


def _trained_at_once(recipe: Recipe, world: int) -> list[int]:
    plan = geometry(recipe, rank=0, world=world)
    return _divisors(plan.rows, plan.micro_batch)


def _after(values: list[Any], now: Any) -> list[Any]:
    return values[values.index(now) + 1 :] if now in values else []


# What may be changed in which phase, cheapest first; "" in every phase.
OPTIONS: tuple[tuple[str, str, Callable[[Recipe, int], list[Any]]], ...] = (
    ("sample", "rollout.batch", _sampled_at_once),
    ("decode", "rollout.batch", _sampled_at_once),
    ("train", "train.activation_checkpointing",
     lambda r, _: _after(["none", "selective"], r.train.activation_checkpointing)),
    ("train", "train.micro_batch", _trained_at_once),
    ("teachers", "train.micro_batch", _trained_at_once),
    ("train", "train.activation_checkpointing",
     lambda r, _: _after(["none", "selective", "full"], r.train.activation_checkpointing)),
    ("", "distributed.stage",
     lambda r, n: [3] if n > 1 and r.distributed.engine == "zero" and r.distributed.stage < 3
     else []),
    ("", "rollout.gather",
     lambda r, _: ["step"] if r.distributed.stage == 3 and r.rollout.gather != "step" else []),
    ("", "distributed.slots",
     lambda r, _: ["host"] if r.slots and r.distributed.slots == "device" else []),
    ("", "train.optimizer.name", lambda r, _: _after(["adamw", "adamw_8bit"],
                                                     r.train.optimizer.name)),
    ("", "distributed.offload",
     lambda r, _: _after(["none", "optimizer"], r.distributed.offload)
     if r.distributed.engine == "zero" and r.distributed.stage else []),
)  # fmt: skip


def variants(recipe: Recipe, world: int, phase: str) -> Iterator[Change]:
    """Single changes that may lower the peak of a phase, cheapest first."""
    for where, field, values in OPTIONS:
        if where in ("", phase):
            for value in values(recipe, world):
                yield Change(field, value)


def advise(
    counted: Counted, recipe: Recipe, world: int, room: int
) -> tuple[list[Change], Memory] | None:
    """Changes after which the recipe fits into `room` bytes, and its memory then; None: none do.

    The phase with the highest peak is lowered by its cheapest change that helps, until all fit.
    """
    made: list[Change] = []
    while True:
        memory = counted.memory(recipe, geometry(recipe, rank=0, world=world), world)
        if memory.peak <= room:
            return made, memory
        helpful = _first_that_fits(counted, recipe, world, room, memory)
        if helpful is None:
            return None
        recipe = changed(recipe, helpful)
        made = [*(c for c in made if c.field != helpful.field), helpful]


def _first_that_fits(
    counted: Counted, recipe: Recipe, world: int, room: int, now: Memory
) -> Change | None:
    """The first change after which the peak's phase fits; if none does, the one that helps most."""
    phase, best, least = now.peak_phase.name, None, now.peak
    for change in variants(recipe, world, phase):
        other = changed(recipe, change)
        memory = counted.memory(other, geometry(other, rank=0, world=world), world)
        there = memory.resident + next(p.bytes for p in memory.phases if p.name == phase)
        if there <= room:
            return change
        if there < least:
            best, least = change, there
    return best
