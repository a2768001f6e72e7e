"""Which layers a LoRA goes to, by the names that a recipe gives."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from gardo.settings import FieldError

if TYPE_CHECKING:
    from torch import nn


def check_targets(module: nn.Module, targets: Iterable[str]) -> None:
    """FieldError where a target is the end of no layer's name; PEFT is silent if another one is."""
    layers = [
        n for n, m in module.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    for target in targets:
        if any(name == target or name.endswith(f".{target}") for name in layers):
            continue
        near = difflib.get_close_matches(target, [*sorted(_ends(layers)), *layers], 3, 0.5)
        mend = f"did you mean {' or '.join(near)}?" if near else "leave targets out for the usual"
        raise FieldError(
            f"train.weights.targets: {target!r} is no layer of the transformer; {mend}"
        )


def _ends(names: Iterable[str]) -> set[str]:
    """What names can end in, without the numbers of blocks."""
    parts = (re.sub(r"^.*blocks\.\d+\.", "", name).split(".") for name in names)
    return {".".join(part[start:]) for part in parts for start in range(len(part))}
