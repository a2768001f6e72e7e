"""FLOPs of a transformer's calls, from the shapes that its modules see.

A linear layer takes 2 in out of a token forward, as many for the gradient of its input where that
is asked for, and as many for that of its weight. Attention takes 4 L^2 d of a row of L tokens
forward (scores and values), twice that backward. Norms, activations and embeddings are left out:
they are memory traffic. Nothing that checkpointing runs again counts.

Shapes: R rows, L tokens, d the width of all heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class ModuleFlops:
    """By phase: of forward passes, and with the backward passes of those that record a graph."""

    forward: Counter[str] = field(default_factory=Counter)
    total: Counter[str] = field(default_factory=Counter)

    def add(self, phase: str, forward: int, backward: int) -> None:
        self.forward[phase] += forward
        self.total[phase] += forward + backward


@contextmanager
def counted(transformer: nn.Module, phase: Callable[[], str]) -> Iterator[ModuleFlops]:
    """Counts every call of the transformer inside; `phase()` says for what it runs."""
    flops = ModuleFlops()
    handles = []

    def linear(module: Any, inputs: tuple[Tensor, ...], _: object) -> None:
        forward = 2 * inputs[0].numel() * module.out_features
        asked = inputs[0].requires_grad + module.weight.requires_grad
        flops.add(phase(), forward, forward * asked * torch.is_grad_enabled())

    def attention(
        module: Any, inputs: tuple[Tensor, ...], named: dict[str, Any], _: object
    ) -> None:
        streams = [*inputs[:1], named.get("hidden_states"), named.get("encoder_hidden_states")]
        given = [stream for stream in streams if stream is not None]
        tokens = sum(stream.shape[1] for stream in given)
        forward = 4 * given[0].shape[0] * tokens**2 * module.inner_dim
        flops.add(phase(), forward, 2 * forward * torch.is_grad_enabled())

    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(linear))
        elif hasattr(module, "to_q") and hasattr(module, "inner_dim"):
            handles.append(module.register_forward_hook(attention, with_kwargs=True))
    try:
        yield flops
    finally:
        for handle in handles:
            handle.remove()
