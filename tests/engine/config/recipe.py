"""A good small recipe, fragments merged into it, and what a bad one is told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gardo import plugins
from gardo.config import load, read_yaml
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError
from gardo.recipe_text import write_yaml
from gardo.tiny import world
from tests import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
GOOD = """\
model: {family: flux, path: "builtin:flux", size: [32, 32], guidance: 3.5, text_tokens: 8}
train:
  weights: {kind: lora, rank: 16, alpha: 32}
  optimizer: {name: adamw, lr: 1.0e-3}
  updates_per_step: 2
  micro_batch: 72
data: {prompts: prompts.txt, prompts_per_step: 8, images_per_prompt: 12}
sampler: {steps: 8, train_steps: 6, sde: flow, noise_level: 0.7}
algorithm:
  name: gardo
  base:
    name: flow_grpo
    clip_range: 1e-3
    beta: 3.0
    advantage: {std: none, scale: 6.0}
  gate: {fraction: 0.1, limits: [0.02, 0.2]}
  diversity: {features: dinov3}
  reference: {reset_updates: 50}
rewards:
  tiny_count: {role: proxy}
  tiny_shape: {role: auxiliary}
  tiny_purity: {role: auxiliary}
  dinov3: {role: features, path: "builtin:dinov3", size: 32}
  tiny_fidelity: {role: held_out}
evaluate: {every: 20, images_per_prompt: 8, steps: 8, batch: 48, diversity: attributes}
distributed: {engine: zero, stage: 3}
run: {name: good-run, steps: 80, seed: 42}
"""
REQUIRED = ("model", "train", "data", "sampler", "algorithm", "rewards", "run")


def listed(package: str) -> str:
    """The built-in plug-ins as messages list them."""
    return ", ".join(plugins.names(f"gardo.{package}"))


def written(folder: Path, fragment: str = "") -> Path:
    """`recipe.yaml` in `folder`: the good one with `fragment` merged in; a null takes a field out.

    Beside it `prompts.txt`, the prompts of the tiny world.
    """
    recipe = read_yaml(GOOD, "good recipe")
    _merge(recipe, read_yaml(fragment, "fragment") or {})
    (folder / "prompts.txt").write_text("\n".join(world.prompts()))
    path = folder / "recipe.yaml"
    path.write_text(write_yaml(recipe) if fragment else GOOD)
    return path


def _merge(section: dict[str, Any], fragment: dict[str, Any]) -> None:
    for key, value in fragment.items():
        if value is None:
            del section[key]
        elif isinstance(value, dict) and isinstance(section.get(key), dict):
            _merge(section[key], value)
        else:
            section[key] = value


def refusal(path: Path, overrides: Sequence[str] = ()) -> str:
    with pytest.raises(RecipeError) as raised:
        load(path, overrides)
    return str(raised.value)


def values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values: each load makes classes of its own, so recipes differ."""
    return recipe.model_dump(mode="json")
