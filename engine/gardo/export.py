"""Trained weights out of a run's newest checkpoint, for diffusers: a LoRA, or a transformer."""

from __future__ import annotations

from pathlib import Path

import torch

from gardo.config import check, read_yaml
from gardo.distributed.saved import Saved, Unusable, committed, step_of
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
    saved = _checkpoint(folder, step, verify)
    if policy is None:
        source = folder / "recipe.yaml"
        recipe = check(
            read_yaml(source.read_text(encoding="utf-8"), str(source)), str(source), rules=False
        )
        policy = build_policy(recipe, torch.device("cpu"))
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in policy.trainable().items()}
    dtype = policy.dtype if policy.lora is None else torch.float32
    weights = {n: saved.whole("master", n, shape).to(dtype) for n, shape in shapes.items()}
    return policy.export(weights, out or folder / "export")


def _checkpoint(folder: Path, step: int | None, verify: bool) -> Saved:
    """The checkpoint to export, whole and undamaged."""
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
        saved = Saved(wanted[0])
        damage = saved.damage(kind="master") if verify else None
    except Unusable as error:
        raise RecipeError(str(error)) from error
    if damage:
        others = "; --step N exports an older one" if len(found) > 1 else ""
        raise RecipeError(f"{damage}{others}")
    return saved
