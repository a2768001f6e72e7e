"""Reads recipes: safe YAML plus `--set a.b=c`, against a strict schema (recipe.py).

A recipe's plug-in sections (model, algorithm, rewards) are checked by the settings of the plug-in
that they name; an error names the file, the field, the value and the mend, before anything heavy
loads.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import Any, Literal, TypeVar, Union

from pydantic import BaseModel, ValidationError, create_model
from typing_extensions import TypedDict

from gardo import plugins, recipe_rules
from gardo.algorithms.base import Algorithm, AlgorithmSettings
from gardo.algorithms.wrapper import Wrapper
from gardo.evaluation.evaluate import HELD_OUT
from gardo.hf_prompts import MARK, is_dataset
from gardo.policies.base import Policy
from gardo.policies.settings import PolicySettings
from gardo.recipe import Recipe
from gardo.recipe_errors import Origin, RecipeError, explained, placed, shown
from gardo.recipe_switch import switched
from gardo.recipe_text import read, write_yaml
from gardo.recipe_text import read_yaml as read_yaml  # for who reads recipes that are written
from gardo.rewards.assembly import ScoringSettings, check_places
from gardo.rewards.base import Reward, RewardSettings
from gardo.settings import Strict, is_hub_id

Settings = TypeVar("Settings", bound=Strict)


def load(path: str | Path, overrides: Sequence[str] = (), *, prompts: bool = True) -> Recipe:
    """The recipe of a file with `a.b=c` overrides applied. RecipeError says what to mend.

    `prompts=False` leaves alone what need not be there to plan: prompt files, a starting LoRA.
    """
    path, origin = Path(path), Origin()
    raw = _overridden(path, overrides, origin)
    rules = recipe_rules.ALL if prompts else recipe_rules.WITHOUT_PROMPTS
    return check(raw, str(path), origin, rules=rules)


def _overridden(path: Path, overrides: Sequence[str], origin: Origin) -> dict[str, Any]:
    """What a file says, with `a.b=c` overrides applied and its files found."""
    raw = read(path)
    before = copy.deepcopy(raw.get("algorithm"))
    for override in overrides:
        _override(raw, override, origin)
    if "algorithm" in raw:
        raw["algorithm"] = switched(before, raw["algorithm"], origin)
    _absolute_paths(raw, path.parent)
    return raw


def check(
    raw: dict[str, Any],
    source: str,
    origin: Origin | None = None,
    *,
    rules: Sequence[Callable[[Recipe], None]] | None = None,
) -> Recipe:
    """The recipe of a mapping; `source` names the file in errors, `origin` the --set of a field.

    `rules` are those between sections; all of them if left out.
    """
    origin = origin or {}
    if isinstance(raw.get("rewards"), dict):
        raw = {**raw, "rewards": _named(raw["rewards"])}
    try:
        schema = recipe_schema(raw)
        recipe = schema.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(explained(schema, error, source, origin)) from None
    except _BadName as error:
        raise RecipeError(placed(error, source, origin)) from None
    for rule in recipe_rules.ALL if rules is None else rules:
        try:
            rule(recipe)
        except ValueError as error:
            raise RecipeError(placed(error, source, origin)) from None
    return recipe


def _named(rewards: dict[str, Any]) -> dict[str, Any]:
    """The rewards that are there (null is not), each with its kind: its name if left out."""
    return {
        name: {"kind": name, **section} if isinstance(section, dict) else section
        for name, section in rewards.items()
        if section is not None
    }


def _override(raw: dict[str, Any], override: str, origin: Origin) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise RecipeError(
            f"--set {override}: expected FIELD=VALUE, such as --set train.optimizer.lr=1e-4"
        )
    keys = tuple(name.split("."))
    here: Any = raw
    for key in keys[:-1]:
        if here.get(key) is None:
            here[key] = {}
        here = here[key]
        if not isinstance(here, dict):
            raise RecipeError(f"--set {name}: {key!r} is a value, not a section")
    new = read_yaml(value, f"--set {name}")
    if keys[0] == "rewards" and len(keys) == 2 and new is None and keys[1] not in here:
        raise RecipeError(
            f"--set {name}: there is no such reward to take out; there are {', '.join(here)}"
        )
    here[keys[-1]] = new
    origin[keys] = f"--set {name}"


def _absolute_paths(raw: dict[str, Any], folder: Path) -> None:
    """Files are looked for beside the recipe, then where the command runs; `held_out` is none."""
    train = raw.get("train")
    weights = train.get("weights") if isinstance(train, dict) else None
    for part, field in (
        (raw.get("data"), "prompts"),
        (raw.get("evaluate"), "prompts"),
        (weights, "path"),
    ):
        if isinstance(part, dict) and isinstance(part.get(field), str):
            given = part[field]
            held_out = part is raw.get("evaluate") and given == HELD_OUT
            part[field] = given if held_out else found_file(given, folder)


def found_file(given: str, folder: Path) -> str:
    """The path of a file that something in `folder` names: beside it, or where the command runs.

    A data set of the hub stays as it is given.
    """
    mark = MARK if is_dataset(given) else ""
    path = os.path.expanduser(given.removeprefix(mark))
    beside = folder / path
    if os.path.exists(beside):
        return mark + os.path.abspath(beside)
    return given if mark and is_hub_id(path) else mark + os.path.abspath(path)


# ---- plug-in sections ----------------------------------------------------------------------------


BASES: dict[str, tuple[type, type[BaseModel]]] = {  # of a plug-in, and of its Settings
    "gardo.algorithms": (Algorithm, AlgorithmSettings),
    "gardo.policies": (Policy, PolicySettings),
    "gardo.rewards": (Reward, RewardSettings),
}


class _BadName(Exception):
    pass


def _plugin(package: str, section: Any, field: str, location: str) -> Any:
    named = section.get(field) if isinstance(section, dict) else None
    if not isinstance(named, str):
        known = f"one of {', '.join(plugins.names(package))}"
        if section is not None and not isinstance(section, dict):
            raise _BadName(f"{location}: {shown(section)}: write a mapping with {field}: {known}")
        missing = "missing" if named is None else f"{shown(named)} is no name"
        raise _BadName(f"{location}.{field}: {missing}; {known}")
    try:
        plugin = plugins.resolve(package, section[field])
    except ValueError as error:
        raise _BadName(f"{location}.{field}: {error}") from None
    given, (base, settings) = shown(section[field]), BASES[package]
    if not hasattr(plugin, "Settings"):
        raise _BadName(f"{location}.{field}: {given} is no plug-in: it has no Settings")
    for found, wanted in ((plugin, base), (plugin.Settings, settings)):
        if not (isinstance(found, type) and issubclass(found, wanted)):
            raise _BadName(
                f"{location}.{field}: {given} is no plug-in: "
                f"{getattr(found, '__name__', type(found).__name__)} is no subclass of "
                f"{wanted.__module__}.{wanted.__name__}"
            )
    return plugin


def _model_settings(section: Any) -> type[BaseModel]:
    settings: type[BaseModel] = _plugin("gardo.policies", section, "family", "model").Settings
    own: dict[str, Any] = {"family": (str, ...)} if ":" in section["family"] else {}
    return create_model(settings.__name__, __base__=settings, **own) if own else settings


def _algorithm_settings(section: Any, location: str = "algorithm") -> type[BaseModel]:
    plugin = _plugin("gardo.algorithms", section, "name", location)
    settings: type[BaseModel] = plugin.Settings
    own: dict[str, Any] = {"name": (str, ...)} if ":" in section["name"] else {}
    if issubclass(plugin, Wrapper):
        own["base"] = (_algorithm_settings(section.get("base"), f"{location}.base"), ...)
    return create_model(settings.__name__, __base__=settings, **own) if own else settings


def _reward_settings(name: str, section: Any) -> type[BaseModel]:
    location = f"rewards.{name}"
    settings = _plugin("gardo.rewards", section, "kind", location).Settings
    own: dict[str, Any] = {"kind": (str, ...)} if ":" in section["kind"] else {}
    if "judge" in settings.model_fields:
        own["judge"] = (_judge_settings(section.get("judge"), f"{location}.judge"), ...)
    return create_model(settings.__name__, __base__=settings, **own) if own else settings


def _judge_settings(section: Any, location: str) -> type[BaseModel]:
    """A reward inside another: it has no role and no weight of its own."""
    settings = _plugin("gardo.rewards", section, "kind", location).Settings
    own: dict[str, Any] = {"role": (Literal["judge"], "judge"), "weight": (None, None)}
    if ":" in section["kind"]:
        own["kind"] = (str, ...)
    return create_model(settings.__name__, __base__=settings, **own)


def recipe_schema(raw: dict[str, Any]) -> type[Recipe]:
    """The schema of this recipe: its plug-in sections have the plug-ins' own settings."""
    panel = _panel(raw.get("rewards"), "name at least one with role proxy")
    model = _model_settings(raw.get("model"))
    return create_model(
        "Recipe",
        __base__=Recipe,
        model=(model, ...),
        algorithm=(_algorithm_settings(raw.get("algorithm")), ...),
        rewards=(panel, ...),
    )


def _panel(rewards: Any, mend: str) -> Any:
    """The type of a section `rewards`: of each, its plug-in's settings."""
    if not isinstance(rewards, dict) or not rewards:
        raise _BadName(f"rewards: missing; {mend}")
    for name in rewards:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise _BadName(f"rewards.{name}: a name is a letter, then letters, digits, - or _")
    # no model, of which a reward called `json` or `copy` would be an attribute
    panel: Any = TypedDict("Rewards", {n: _reward_settings(n, r) for n, r in rewards.items()})  # type: ignore[misc]
    return panel


def reward_sections(
    raw: dict[str, Any], source: str, origin: Origin | None = None
) -> dict[str, RewardSettings]:
    """Rewards alone, by name, as a server has them: they need no role. RecipeError."""
    origin = origin or {}
    try:
        sections = {n: {"role": _role(n, r), **r} for n, r in _named(raw).items()}
        panel: Any = TypedDict("Rewards", {n: _reward_settings(n, r) for n, r in sections.items()})  # type: ignore[misc]
        schema = create_model("Served", __base__=Strict, rewards=(panel, ...))
        return dict(schema.model_validate({"rewards": sections}).rewards)  # type: ignore[attr-defined]
    except ValidationError as error:
        raise RecipeError(explained(schema, error, source, origin)) from None
    except _BadName as error:
        raise RecipeError(placed(error, source, origin)) from None


@dataclass(frozen=True)
class RewardFile:
    """The rewards of a recipe, for who scores pictures and trains nothing."""

    rewards: dict[str, RewardSettings]
    scoring: ScoringSettings
    prompts: Path | None  # the recipe's own, where they are here
    size: tuple[int, int] | None  # of its pictures, where it says one


def reward_file(path: str | Path, overrides: Sequence[str] = ()) -> RewardFile:
    """Of a recipe, or of a file that has nothing but `rewards`. RecipeError.

    The rest of a recipe is not looked at: a server need not have its model.
    """
    path, origin = Path(path), Origin()
    raw = _overridden(path, overrides, origin)
    if not isinstance(raw.get("rewards"), dict) or not raw["rewards"]:
        raise RecipeError(f"{path}: rewards: missing; name at least one, such as ocr: {{}}")
    rewards = reward_sections(raw["rewards"], str(path), origin)
    schema = create_model("Recipe", __base__=Strict, scoring=(ScoringSettings, ...))
    try:
        scoring = schema.model_validate({"scoring": raw.get("scoring", {})}).scoring  # type: ignore[attr-defined]
        check_places(rewards, scoring)
    except ValidationError as error:
        raise RecipeError(explained(schema, error, str(path), origin)) from None
    except ValueError as error:
        raise RecipeError(placed(error, str(path), origin)) from None
    data = raw.get("data")
    prompts = data.get("prompts") if isinstance(data, dict) else None
    here = isinstance(prompts, str) and os.path.isfile(prompts)
    size: tuple[int, int] | None = None
    match raw.get("model"):
        case {"size": [int(height), int(width)]}:
            size = height, width
    return RewardFile(rewards, scoring, Path(str(prompts)) if here else None, size)


def _role(name: str, section: Any) -> str:
    """One that the reward may have."""
    plugin = _plugin("gardo.rewards", section, "kind", f"rewards.{name}")
    return "features" if plugin.gives_features else "held_out"


def full_schema() -> dict[str, Any]:
    """JSON schema of recipes with every built-in plug-in (`gardo schema`)."""

    def union(package: str) -> Any:
        classes = [plugins.resolve(package, n).Settings for n in plugins.names(package)]
        return Union[tuple(classes)]  # noqa: UP007  built at run time

    sections: dict[str, Any] = {
        "model": (union("gardo.policies"), ...),
        "algorithm": (union("gardo.algorithms"), ...),
        "rewards": (GenericAlias(dict, (str, union("gardo.rewards"))), ...),
    }
    schema = create_model("Recipe", __base__=Recipe, **sections)
    return schema.model_json_schema()


def load_rewarded(
    schema: type[Settings],
    path: Path,
    overrides: Sequence[str],
    *,
    prepare: Callable[[dict[str, Any]], None],
    rules: Sequence[Callable[[Settings], None]],
) -> Settings:
    """A file that is no recipe and has a section `rewards` as a recipe has one. RecipeError.

    `schema` says the rest of it; `prepare` changes what was read before it is checked, and `rules`
    are those between its fields.
    """
    origin: Origin = {}
    raw, source = _overridden(path, overrides, origin), str(path)
    if isinstance(raw.get("rewards"), dict):
        raw["rewards"] = _named(raw["rewards"])
    prepare(raw)
    try:
        panel = _panel(raw.get("rewards"), "name at least one, such as pickscore: {role: held_out}")
        exact = create_model(schema.__name__, __base__=schema, rewards=(panel, ...))
    except _BadName as error:
        raise RecipeError(placed(error, source, origin)) from None
    try:
        found = exact.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(explained(exact, error, source, origin)) from None
    for rule in rules:
        try:
            rule(found)
        except ValueError as error:
            raise RecipeError(placed(error, source, origin)) from None
    return found


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return write_yaml(recipe.model_dump(mode="json"))
