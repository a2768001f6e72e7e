"""Which settings make a recipe fit: a few are tried in order of what they cost, best first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from gardo.planner.geometry import divisors, geometry
from gardo.planner.memory import Counted, Memory
from gardo.policies.quantised import BASES
from gardo.recipe import Recipe, reward_settings
from gardo.recipe_errors import RecipeError

Values = Callable[[Recipe, int], list[Any]]  # of a field, for a recipe on so many ranks


REWARDS = "rewards.*.dtype"  # of all that have fp32 models
LAST_RESORT = "data.prompts_per_step"  # fewer images change what is learned


@dataclass(frozen=True)
class Change:
    field: str
    value: Any

    def on(self, recipe: Recipe) -> str:
        """As the command line of a recipe has it."""
        if self.field != REWARDS:
            return f"--set {self.field}={self.value}"
        names = _wide_rewards(recipe)
        return " ".join(f"--set rewards.{name}.dtype={self.value}" for name in names)


def changed(recipe: Recipe, change: Change) -> Recipe:
    """The recipe with one field of a section changed, or all its rewards."""
    if change.field == REWARDS:
        for name in _wide_rewards(recipe):
            recipe = changed(recipe, Change(f"rewards.{name}.dtype", change.value))
        return recipe
    made: Recipe = _replaced(recipe, change.field.split("."), change.value)
    return made


def _replaced(section: Any, names: list[str], value: Any) -> Any:
    """A section, or the rewards by their names, with one value inside changed."""
    (name, *inner), whole = names, isinstance(section, dict)
    old = section[name] if whole else getattr(section, name)
    new = {name: _replaced(old, inner, value) if inner else value}
    return {**section, **new} if whole else section.model_copy(update=new)


def _divisors(number: int, below: int) -> list[int]:
    """Of the number, largest first."""
    return [n for n in reversed(divisors(number)) if n < below]


def _after(values: list[Any], now: Any) -> list[Any]:
    return values[values.index(now) + 1 :] if now in values else []


def _sampled_at_once(recipe: Recipe, world: int) -> list[int]:
    plan = geometry(recipe, rank=0, world=world)
    return _divisors(plan.samples, plan.sampled)


def _trained_at_once(recipe: Recipe, world: int) -> list[int]:
    plan = geometry(recipe, rank=0, world=world)
    return _divisors(plan.rows, plan.micro_batch)


def _decoded_at_once(recipe: Recipe, _: int) -> list[int]:
    return [1] if recipe.rollout.decode_batch != 1 else []


def _evaluated_at_once(recipe: Recipe, _: int) -> list[int]:
    return _divisors(recipe.evaluate.batch, recipe.evaluate.batch)


def _checkpointing(*modes: str) -> Values:
    return lambda recipe, _: _after(list(modes), recipe.train.activation_checkpointing)


def _encoders(recipe: Recipe, _: int) -> list[str]:
    return _after(["resident", "offload", "free"], recipe.model.encoders)


def _stage(recipe: Recipe, world: int) -> list[int]:
    settings = recipe.distributed
    partitions = world > 1 and settings.engine == "zero" and settings.stage < 3
    return [3] if partitions else []


def _gather(recipe: Recipe, _: int) -> list[str]:
    each = recipe.distributed.stage < 3 or recipe.rollout.gather == "step"
    return [] if each else ["step"]


def _slots(recipe: Recipe, _: int) -> list[str]:
    return ["host"] if recipe.slots and recipe.distributed.slots == "device" else []


def _optimizer(recipe: Recipe, _: int) -> list[str]:
    return _after(["adamw", "adamw_8bit"], recipe.train.optimizer.name)


def _base(recipe: Recipe, _: int) -> list[str]:
    can = recipe.train.weights.kind == "lora" and recipe.distributed.stage < 3
    whole = recipe.model.base not in BASES and recipe.distributed.engine == "zero"
    return ["nf4"] if can and whole else []


def _offload(recipe: Recipe, _: int) -> list[str]:
    settings = recipe.distributed
    can = settings.engine == "zero" and settings.stage
    return _after(["none", "optimizer"], settings.offload) if can else []


def _wide_rewards(recipe: Recipe) -> list[str]:
    """Names of the rewards, or their judges, that have fp32 models."""
    rewards: dict[str, Any] = dict(reward_settings(recipe))
    judges = {f"{name}.judge": getattr(s, "judge", None) for name, s in rewards.items()}
    both = (rewards | judges).items()
    return [name for name, settings in both if getattr(settings, "dtype", "") == "float32"]


def _reward_types(recipe: Recipe, _: int) -> list[str]:
    return ["bfloat16"] if _wide_rewards(recipe) else []


def _prompts(recipe: Recipe, world: int) -> list[int]:
    """Fewer prompts a step that still split over the ranks."""
    data, found = recipe.data, []
    for count in _divisors(data.prompts_per_step, data.prompts_per_step):
        fewer = changed(recipe, Change("data.prompts_per_step", count))
        try:
            geometry(fewer, rank=0, world=world)
        except RecipeError:
            continue
        found.append(count)
    return found


# What may be changed in which phase, cheapest first; "" in every phase.
OPTIONS: tuple[tuple[str, str, Values], ...] = (
    ("sample", "rollout.batch", _sampled_at_once),
    ("decode", "rollout.decode_batch", _decoded_at_once),
    ("evaluate", "evaluate.batch", _evaluated_at_once),
    ("", "model.encoders", _encoders),
    ("train", "train.activation_checkpointing", _checkpointing("none", "matmuls")),
    ("train", "train.micro_batch", _trained_at_once),
    ("teachers", "train.micro_batch", _trained_at_once),
    ("train", "train.activation_checkpointing",
     _checkpointing("none", "matmuls", "selective", "full")),
    ("", "distributed.stage", _stage),
    ("", "rollout.gather", _gather),
    ("", "distributed.slots", _slots),
    ("", "train.optimizer.name", _optimizer),
    ("", REWARDS, _reward_types),
    ("", "model.base", _base),
    ("", "distributed.offload", _offload),
    ("", LAST_RESORT, _prompts),
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
    Then each change is taken back as far as the others allow, the dearest first.
    """
    made: list[Change] = []
    now = recipe
    while True:
        memory = counted.memory(now, geometry(now, rank=0, world=world), world)
        if memory.peak <= room:
            break
        helpful = _first_that_fits(counted, now, world, room, memory)
        if helpful is None:
            return None
        now = changed(now, helpful)
        made = [*(c for c in made if c.field != helpful.field), helpful]
    for _, field, values in reversed(OPTIONS):
        if any(change.field == field for change in made):
            made = _taken_back(counted, recipe, world, room, made, field, values)
    now = reduce(changed, made, recipe)
    return made, counted.memory(now, geometry(now, rank=0, world=world), world)


def _taken_back(
    counted: Counted,
    recipe: Recipe,
    world: int,
    room: int,
    made: list[Change],
    field: str,
    values: Values,
) -> list[Change]:
    """The changes with the least value of one field that still fits, or without it."""
    others = [change for change in made if change.field != field]
    without = reduce(changed, others, recipe)
    choices = [others, *([*others, Change(field, value)] for value in values(without, world))]
    for choice in choices:
        now = reduce(changed, choice, recipe)
        try:
            plan = geometry(now, rank=0, world=world)
        except RecipeError:  # it does not split without this one
            continue
        if counted.memory(now, plan, world).peak <= room:
            return choice
    return made


def _first_that_fits(
    counted: Counted, recipe: Recipe, world: int, room: int, now: Memory
) -> Change | None:
    """The first change after which the peak's phase fits; if none does, the one that helps most.

    The last resort is none of them while anything else helps.
    """
    phase, best, least = now.peak_phase.name, None, now.peak
    for change in variants(recipe, world, phase):
        if change.field == LAST_RESORT and best:
            return best
        other = changed(recipe, change)
        try:
            plan = geometry(other, rank=0, world=world)
        except RecipeError:  # micro-batches that do not divide fewer rows
            continue
        memory = counted.memory(other, plan, world)
        there = next(memory.peak_of(p) for p in memory.phases if p.name == phase)
        if there <= room:
            return change
        if there < least:
            best, least = change, there
    return best
