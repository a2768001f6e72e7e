"""Training that may be cut anywhere: started again, it goes on from its checkpoint to the bit."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gardo.files import write_atomically
from words.models import Budget

WARM_UP = 0.05  # of the steps
SAVED_EVERY = 60.0  # seconds


class Cut(Exception):
    """The time is spent; what was trained is kept."""


def fit(
    name: str,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    budget: Budget,
    *,
    file: Path,
    until: float,
    average: nn.Module | None = None,
) -> None:
    """AdamW on `loss(step)`, a function of the step alone, with a warm-up and cosine decay.

    `average` follows the weights, over about a tenth of the steps. The file is the checkpoint,
    written every minute and at the end. Raises Cut at `until`, monotonic seconds.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.99))
    first = _restored(file, model, optimizer, average)
    started = saved = time.monotonic()
    for step in range(first, budget.steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(budget, step)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if average is not None:
            _follow(average, model, 10 / budget.steps)
        done, now = step + 1, time.monotonic()
        if done % 100 == 0 or done == budget.steps:
            seconds = now - started
            print(
                f"{name} {done}/{budget.steps} loss {float(value.detach()):.4f} {seconds:.0f} s",
                flush=True,
            )
        if done == budget.steps or now > until or now - saved > SAVED_EVERY:
            _save(file, done, model, optimizer, average)
            saved = now
        if done < budget.steps and now > until:
            raise Cut(f"{name}: {done} of {budget.steps} steps")


def _rate(budget: Budget, step: int) -> float:
    decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / budget.steps))
    return budget.lr * min(1.0, (step + 1) / (WARM_UP * budget.steps)) * decay


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, share: float) -> None:
    pairs = zip(average.parameters(), model.parameters(), strict=True)
    targets, sources = map(list, zip(*pairs, strict=True))
    torch._foreach_lerp_(targets, sources, share)


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None
) -> dict[str, Any]:
    parts = {"model": model, "optimizer": optimizer, "average": average}
    return {name: part for name, part in parts.items() if part is not None}


def _save(file: Path, step: int, *parts: Any) -> None:
    held = io.BytesIO()
    states = {name: part.state_dict() for name, part in _state(*parts).items()}
    torch.save({"step": step, **states}, held)
    write_atomically(file, held.getvalue())


def _restored(file: Path, *parts: Any) -> int:
    """The steps that the checkpoint has, put into the parts; 0 without one."""
    if not file.is_file():
        return 0
    saved = torch.load(file, weights_only=True, map_location="cpu")
    for name, part in _state(*parts).items():
        part.load_state_dict(saved[name])
    return int(saved["step"])
