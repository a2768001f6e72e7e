"""What a run's folder says for the model card of its weights; report/model_card.py writes it."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gardo
from gardo.algorithms.base import plugin_of
from gardo.algorithms.wrapper import WrapperSettings
from gardo.distributed.average import AVERAGE
from gardo.distributed.saved import Saved
from gardo.hf_prompts import is_dataset
from gardo.licences import hub_id_of, licence_of
from gardo.recipe import Recipe, policy_plugin, reward_plugin, reward_settings
from gardo.recipe_errors import RecipeError
from gardo.report.metrics_log import Record, read_metrics
from gardo.report.model_card import CardFacts, Scored
from gardo.rewards.assembly import with_judges
from gardo.rewards.base import RewardSettings
from gardo.rewards.catalogue import default_weights, used_weights

MADE_WITH = ("torch", "diffusers", "transformers", "peft")
ADDRESS = re.compile(r"^(openai:)?https?://\S+")


def card_facts(run_folder: Path, recipe: Recipe, saved: Saved, *, format: str,
               average: bool) -> CardFacts:  # fmt: skip
    """Of the weights in a checkpoint, or their average. Records of later iterations are left out"""
    records = [one for one in _records(run_folder) if one["step"] <= saved.step]
    model, plugin = recipe.model, policy_plugin(recipe.model)
    state = saved.manifest.get("state") or {}
    base = state.get("base") or {}
    start = _start(run_folder, saved.step)
    return CardFacts(
        name=recipe.run.name,
        base=hub_id_of(model.path) or without_place(model.path),
        hub_id=hub_id_of(model.path),
        identity={name: str(base[name]) for name in ("revision", "sha256") if base.get(name)},
        licence=licence_of(model.path),
        family=without_place(model.family),
        pipeline=plugin.Settings.pipeline_name,
        transformer=plugin.transformer_name,
        precision=recipe.distributed.precision,
        format=format,
        average=average,
        evaluated_average=recipe.evaluated == AVERAGE,
        step=saved.step,
        recipe=without_places(recipe.model_dump(mode="json")),
        processes=saved.manifest.get("world"),
        algorithms=list(_algorithms(recipe.algorithm)),
        prompts=without_place(recipe.data.prompts),
        prompt_count=_prompt_count(recipe),
        rewards=[_scored(n, its) for n, its in with_judges(reward_settings(recipe)).items()],
        evaluations=[one for one in records if one["kind"] == "evaluation"],
        steps=[one for one in records if one["kind"] == "step"],
        trained_with=_versions_of(start),
        exported_with={"gardo": gardo.__version__, **dict(_versions())},
        devices=_devices(start),
    )


def without_places(value: Any) -> Any:
    """A recipe's values with nothing of the machine that they come from: of a path its last part,
    of an address its scheme."""
    if isinstance(value, dict):
        return {name: without_places(one) for name, one in value.items()}
    if isinstance(value, list):
        return [without_places(one) for one in value]
    return without_place(value) if isinstance(value, str) else value


def without_place(text: str) -> str:
    """Hub ids and what is no path stay as they are."""
    if ADDRESS.match(text):
        return f"{text.partition('://')[0]}://..."
    prefix = "hf:" if text.startswith("hf:") else ""
    path = text.removeprefix(prefix)
    if "\n" not in path and path.startswith(("/", "~", "./", "../")):
        return prefix + (Path(path).name or path[:1])
    home = str(Path.home())
    return text.replace(home, "~") if len(home) > 1 else text


def _records(run_folder: Path) -> list[Record]:
    try:
        return read_metrics(run_folder / "metrics.jsonl")
    except OSError:
        return []


def _start(run_folder: Path, step: int) -> Mapping[str, Any]:
    """What the run's environment.json says of the last start before `step`; {} without one."""
    try:
        starts = json.loads((run_folder / "environment.json").read_text("utf-8"))["starts"]
        before = [one for one in starts if one.get("after_step", 0) < max(step, 1)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return before[-1] if before else {}


def _versions_of(start: Mapping[str, Any]) -> dict[str, str]:
    packages = start.get("packages", {})
    found = {name: str(packages[name]) for name in MADE_WITH if name in packages}
    if "gardo" not in start:
        return found
    revision = f" ({start['revision']})" if start.get("revision") else ""
    return {"gardo": f"{start['gardo']}{revision}", **found}


def _devices(start: Mapping[str, Any]) -> str:
    """`8 x NVIDIA H100 80GB HBM3`."""
    names = Counter(str(one.get("name", "?")) for one in start.get("devices", ()))
    return ", ".join(f"{count} x {name}" for name, count in names.items())


def _algorithms(settings: Any) -> Iterator[tuple[str, str]]:
    """Names from the outermost to the innermost, each with the sentence that its file opens with"""
    layers = settings.layers() if isinstance(settings, WrapperSettings) else [settings]
    for layer in layers:
        module = sys.modules.get(plugin_of(layer).__module__)
        first = ((module and module.__doc__) or "").strip().partition("\n")[0]
        yield without_place(layer.name), first.rstrip(".:")


def _prompt_count(recipe: Recipe) -> int | None:
    """None where the prompts are not here any more, or would have to be downloaded."""
    if is_dataset(recipe.data.prompts):
        return None
    try:
        return len(recipe.prompts())
    except (OSError, ValueError, RecipeError):
        return None


def _scored(name: str, settings: RewardSettings) -> Scored:
    about = reward_plugin(settings).about
    used = list(used_weights(settings))
    version = getattr(settings, "version", None)
    return Scored(
        name=name,
        role=settings.role if "role" in type(settings).model_fields else "",
        kind=without_place(settings.kind) + (f" {version}" if version else ""),
        formula=about.formula if about else "",
        weights=tuple(
            (hub_id_of(path) or without_place(path)) + (f"@{revision}" if revision else "")
            for path, revision in used
        ),
        licence=_licence_of_weights(settings, [path for path, _ in used]),
    )


def _licence_of_weights(settings: RewardSettings, paths: list[str]) -> str:
    """What its publishers say of a reward's own default weights; else what is known of each."""
    about = reward_plugin(settings).about
    if {*paths} <= {*default_weights(type(settings))}:
        return about.licence if about and about.licence != "-" else ""
    known = [licence_of(path) for path in paths]
    return ", ".join(dict.fromkeys(one.title if one.known else "see its page" for one in known))


def _versions() -> Iterator[tuple[str, str]]:
    for name in MADE_WITH:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
