"""Trained weights out of a run's newest checkpoint, for diffusers: a LoRA, or a transformer."""

from __future__ import annotations

from pathlib import Path

import torch

from gardo.config import check, read_yaml
from gardo.distributed.saved import Saved, Unusable, committed, step_of
from gardo.distributed.universal import write_universal
from gardo.policies.base import Policy
from gardo.recipe_errors import RecipeError
from gardo.session import build_policy


def export_run(
    folder: Path,
    *,
    out: Path | None = None,
    policy: Policy | None = None,
    step: int | None = None,
    verify: bool = True,
) -> Path:
    """Exports a run's weights after `step` iterations (the newest checkpoint) to `out`.

    `out` is the run's `export/` unless given. Builds the policy from the run's recipe unless it is
    given, without reading its transformer's weights. `verify` checks the digests first. Returns the
    LoRA file, or the transformer folder after full fine-tuning. RecipeError where the run has no
    such weights.
    """
    saved = _checkpoint(folder, step)
    if verify and (damage := saved.damage(kind="master")):
        raise RecipeError(damage)
    policy = policy or _policy_of(folder)
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in policy.trainable().items()}
    dtype = policy.dtype if policy.lora is None else torch.float32
    weights = {n: saved.whole("master", n, shape).to(dtype) for n, shape in shapes.items()}
    return policy.export(weights, out or folder / "export")


def export_universal(folder: Path, *, out: Path | None = None, step: int | None = None) -> Path:
    """Writes a run's masters and moments in DeepSpeed's universal layout, to `out`.

    `out` is the run's `universal/` unless given. RecipeError where the run has no such checkpoint.
    """
    saved = _checkpoint(folder, step)
    if damage := saved.damage():
        raise RecipeError(damage)
    shapes = {n: tuple(p.shape) for n, p in _policy_of(folder).trainable().items()}
    try:
        return write_universal(saved, shapes, out or folder / "universal")
    except Unusable as error:
        raise RecipeError(str(error)) from error


def _policy_of(folder: Path) -> Policy:
    """The policy of a run's recipe, its transformer without weights, on a whole base: what trains
    has the same names there."""
    source = folder / "recipe.yaml"
    recipe = check(
        read_yaml(source.read_text(encoding="utf-8"), str(source)), str(source), rules=()
    )
    model = recipe.model.model_copy(update={"base": None})
    return build_policy(recipe.model_copy(update={"model": model}), torch.device("cpu"))


def _checkpoint(folder: Path, step: int | None) -> Saved:
    """The checkpoint of a step, or the newest."""
    found = committed(folder / "checkpoints")
    if not found:
        raise RecipeError(
            f"{folder}: no checkpoints; name the folder of a run, such as runs/tiny-flux-gardo"
        )
    wanted = [p for p in found if step is None or step_of(p) == step]
    if not wanted:
        have = ", ".join(p.name for p in found)
        raise RecipeError(f"{folder}: no checkpoint of step {step}; it has {have}")
    try:
        return Saved(wanted[0])
    except Unusable as error:
        raise RecipeError(str(error)) from error
