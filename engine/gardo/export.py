"""Trained weights out of a run, for diffusers.

`final/trainable.safetensors` (fp32) in, a LoRA or a transformer folder out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gardo.config import check, read_yaml
from gardo.policies.base import Policy
from gardo.recipe_errors import RecipeError
from gardo.session import build_policy

FINAL = Path("final") / "trainable.safetensors"


def save_final(folder: Path, weights: Mapping[str, Tensor]) -> Path:
    """Writes the trainable weights (fp32, by name) of a finished run; replaced in one move."""
    path = folder / FINAL
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({n: t.contiguous() for n, t in weights.items()}, part)
    os.replace(part, path)
    return path


def export_run(folder: Path, *, out: Path | None = None, policy: Policy | None = None) -> Path:
    """Exports a run's weights to `out` (the run's `export/`).

    Builds the policy from the run's recipe unless it is given. Returns the LoRA file, or the
    transformer folder after full fine-tuning. RecipeError where the run has no weights.
    """
    path = folder / FINAL
    if not path.is_file():
        raise RecipeError(
            f"{folder}: no {FINAL}; name the folder of a finished run, such as runs/tiny-flux-gardo"
        )
    if policy is None:
        source = folder / "recipe.yaml"
        recipe = check(
            read_yaml(source.read_text(encoding="utf-8"), str(source)), str(source), rules=False
        )
        policy = build_policy(recipe, torch.device("cpu"))
    return policy.export(load_file(path), out or folder / "export")
