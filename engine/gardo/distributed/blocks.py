"""Transformer blocks as the unit in which ZeRO-3 gathers: one gather a block and pass.

DeepSpeed calls that a leaf module, and has two traps. Its hooks see positional arguments only,
while diffusers calls blocks by keyword: gradients then die on released weights. And it reduces a
leaf's gradients when the gradients of the leaf's inputs are done: where no input has one, as in the
first block under LoRA, that is before the leaf's own backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def make_leaves(blocks: Sequence[nn.Module]) -> None:
    """Marks the blocks as leaf modules that are called as DeepSpeed needs it.

    Their class changes to a subclass of itself, of the same name; names of parameters stay.
    """
    classes: dict[type, type] = {}
    for block in blocks:
        original = type(block)
        if original not in classes:
            classes[original] = _positional(original)
        block.__class__ = classes[original]
        block._z3_leaf = True  # type: ignore[assignment]


def _positional(original: type) -> type:
    signature = inspect.signature(original.forward)  # type: ignore[attr-defined]

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if bound.kwargs:
            raise TypeError(f"{original.__name__}: {sorted(bound.kwargs)} cannot be positional")
        given = list(bound.args[1:])
        tensors = [i for i, value in enumerate(given) if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and not any(given[i].requires_grad for i in tensors):
            given[tensors[0]] = given[tensors[0]].detach().requires_grad_()
        return original.__call__(self, *given)  # type: ignore[operator]

    body = {"__call__": __call__, "__module__": original.__module__}
    return type(original.__name__, (original,), body)
