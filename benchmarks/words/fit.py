"""Training that may be cut anywhere: started again, it goes on from its checkpoint to the bit."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer

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


def _save(
    file: Path, step: int, model: nn.Module, optimizer: Optimizer, average: nn.Module | None
) -> None:
    tensors = {
        f"optimizer.{index}.{name}": value
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    for part, module in _modules(model, average):
        tensors |= {f"{part}.{name}": value for name, value in module.state_dict().items()}
    # tied weights have two names, and safetensors wants a storage for each
    apart = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    write_atomically(file, save({**apart, "steps": torch.tensor(step)}))


def _restored(file: Path, model: nn.Module, optimizer: Optimizer, average: nn.Module | None) -> int:
    """The steps that the checkpoint has, put into the parts; 0 without one."""
    if not file.is_file():
        return 0
    tensors = load_file(file)
    for part, module in _modules(model, average):
        module.load_state_dict({name: tensors[f"{part}.{name}"] for name in module.state_dict()})
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        part, _, rest = key.partition(".")
        if part == "optimizer":
            index, name = rest.split(".")
            state[int(index)][name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})
    return int(tensors["steps"])


def _modules(model: nn.Module, average: nn.Module | None) -> list[tuple[str, nn.Module]]:
    return [("model", model), *([("average", average)] if average is not None else [])]
