"""The values of a new recipe: its model's start, with these rewards, on so many GPUs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path
from typing import Any

from gardo import plugins
from gardo.config import check
from gardo.planner import geometry
from gardo.planner.geometry import divisors
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError
from gardo.recipe_rules import WITHOUT_PROMPTS
from gardo.recipe_text import read, read_yaml
from gardo.suite import family_of
from gardo.tiny import world
from gardo.types import Prompt

USUAL_GPUS = 8  # that the batches of the starts are for
LEAST = 12  # prompts an iteration, where fewer GPUs take fewer; a smaller start stays as it is
Raw = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """What `gardo new` was asked for."""

    model: str
    rewards: Sequence[str]
    gpus: int
    room: int  # bytes of each GPU
    full: bool  # all weights train, not a LoRA
    algorithm: str
    prompts: str  # as the recipe names them
    prompt: Prompt | None  # the first of them, where they are known
    held_out: float  # share of them
    name: str  # of the run


@cache
def starts() -> Raw:
    return read(Path(__file__).with_name("starts.yaml"))


def start_of(model: str) -> tuple[str, Raw]:
    """The family of a model, and what a recipe for it starts from. RecipeError."""
    models = starts()["models"]
    path = models[model]["path"] if model in models else model
    try:
        family = family_of(path, "")
    except RecipeError:
        raise RecipeError(
            f"--model {model}: no folder of Flux or SD3 in diffusers format, and no hub id whose "
            f"family is known; give one of {', '.join(models)}, or such a folder"
        ) from None
    key = model if model in models else family
    return family, {**copy.deepcopy(models[key]), "path": path}


def values(asked: Asked) -> Raw:
    """Of all sections, in the order of the schema. RecipeError."""
    family, start = start_of(asked.model)
    own = copy.deepcopy(starts()["algorithms"].get(asked.algorithm, {}))
    base = start["algorithm"].get("base", {}).get("name")
    algorithm = {"gardo": start["algorithm"], base: start["algorithm"].get("base")}.get(
        asked.algorithm
    )
    train, distributed = start["train"], start["distributed"]
    if asked.full:
        train = {**train, **copy.deepcopy(starts()["full"]["train"])}
        distributed = {**distributed, "stage": 3}
    data = {**start["data"], **own.get("data", {})}
    if "data" in own:
        train.pop("micro_batch")
    raw: Raw = {
        "model": {"family": family, "path": start["path"], **start["model"]},
        "train": train,
        "data": {"prompts": asked.prompts, **data},
        "sampler": own.get("sampler", start["sampler"]),
        "algorithm": algorithm or own.get("algorithm") or {"name": asked.algorithm},
        "rewards": panel(asked, start["rewards"]),
        "evaluate": start["evaluate"],
        "checkpoint": start.get("checkpoint"),
        "distributed": distributed,
        "run": {"name": asked.name, **start["run"]},
    }
    if raw["evaluate"]["diversity"] == "attributes" and not _of_the_tiny_world(asked.prompt):
        raw["evaluate"]["diversity"] = "features"
    if asked.held_out:
        raw["data"]["held_out"] = asked.held_out
        raw["evaluate"]["prompts"] = "held_out"
    return {name: section for name, section in raw.items() if section}


def panel(asked: Asked, start: Mapping[str, Mapping[str, Raw]]) -> Raw:
    """The first reward is the proxy; the others, or the start's, check it.

    With GARDO they are auxiliaries, which its gate compares with; else they are only reported.
    """
    known = {name: its for role in start.values() for name, its in role.items()}
    named = {name.rpartition(":")[2].lower(): name for name in asked.rewards}
    proxy, *others = named
    checks = "auxiliary" if asked.algorithm == "gardo" else "held_out"
    roles = {proxy: "proxy"}
    for name in others:
        roles[name] = "features" if _gives_features(named[name]) else checks
    if checks not in roles.values():
        roles |= {n: checks for n in start["auxiliary"] if n not in roles and _suits(n, asked)}
    if "features" not in roles.values():
        roles |= dict.fromkeys(start["features"], "features")
    if checks != "held_out":
        left = [name for name in start["held_out"] if name not in roles and _suits(name, asked)]
        roles |= dict.fromkeys(left[:1], "held_out")
    return {
        name: {
            **({"kind": named[name]} if named.get(name, name) != name else {}),
            "role": role,
            **known.get(name, {}),
        }
        for name, role in roles.items()
    }


def _suits(name: str, asked: Asked) -> bool:
    """Whether a reward of the start can score the prompts: those of the tiny world ask for it."""
    try:
        if asked.prompt is not None:
            plugins.resolve("gardo.rewards", name).check_prompt(asked.prompt)
    except ValueError:
        return False
    return True


def _of_the_tiny_world(prompt: Prompt | None) -> bool:
    try:
        world.parse(prompt or "")
    except ValueError:
        return False
    return True


def _gives_features(name: str) -> bool:
    try:
        return bool(plugins.resolve("gardo.rewards", name).gives_features)
    except (ValueError, AttributeError):
        return False  # its section's check says what is wrong


# ---- a batch that splits, in memory that is there ------------------------------------------------


def fitted(
    raw: Raw, asked: Asked, source: str, say: Callable[[str], object] = print
) -> tuple[Raw, str]:
    """With a batch that splits over the GPUs, and what makes it fit there; and the verdict.

    None, "", of a model that is too small to ask. `say` is told what takes long. RecipeError.
    """
    raw = split(raw, asked.gpus, source)
    recipe = _checked(raw, source)
    if recipe.model.path.startswith("builtin:"):
        return raw, ""
    from gardo.planner.page import plan, verdict_line  # seconds, and none of a refusal's

    say(f"planning for --gpus {asked.gpus} of {asked.room / 1e9:g} GB, up to a minute")
    planned = plan(recipe, world=asked.gpus, room=asked.room, source=source)
    if planned.fits or not planned.advice:
        return raw, verdict_line(planned.memory, planned.room, planned.settled)
    changes, memory = planned.advice
    for change in changes:
        for setting in filter(None, change.on(recipe).split("--set ")):
            field, _, value = setting.strip().partition("=")
            put(raw, field.split("."), read_yaml(value, field))
    return raw, verdict_line(memory, planned.room, _checked(raw, source))


def split(raw: Raw, gpus: int, source: str) -> Raw:
    """With as many prompts as split over the GPUs, fewer where there are few, and micro-batches
    that divide what each trains."""
    data, train = raw["data"], raw["train"]
    usual, images = data["prompts_per_step"], data["images_per_prompt"]
    unit = gpus * train["updates_per_step"]
    unit //= gcd(unit, images)
    wanted = max(min(usual, LEAST), min(usual, usual * gpus // USUAL_GPUS))
    data["prompts_per_step"] = max(unit, round(wanted / unit) * unit)
    most = train.pop("micro_batch", None)
    if most:
        rows = geometry(_checked(raw, source), rank=0, world=gpus, source=source).rows
        train["micro_batch"] = max(n for n in divisors(rows) if n <= most)
    return raw


def _checked(raw: Raw, source: str) -> Recipe:
    return check(copy.deepcopy(raw), source, rules=WITHOUT_PROMPTS)


def put(raw: Raw, keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        raw = raw.setdefault(key, {})
    raw[keys[-1]] = value
