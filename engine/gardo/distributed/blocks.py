"""Transformer blocks as the unit in which ZeRO-3 gathers: one gather a block and pass.

DeepSpeed calls that a leaf module: it hooks the module and nothing inside. Its hooks are Python at
every pass of every module, dearer than a small module's arithmetic, so modules outside the blocks
that consist of others (the time embedding, the last norm) are leaves too.

DeepSpeed has two traps there. Its hooks see positional arguments only, while diffusers calls blocks
by keyword: gradients then die on released weights. And it reduces a leaf's gradients when the
gradients of the leaf's inputs are done: where no input has one, as in the first block under LoRA,
that is before the leaf's own backward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def leaves_of(module: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks, and beside them the largest modules that have modules with weights inside."""
    return [*blocks, *_beside(module, {id(block) for block in blocks})]


def _beside(module: nn.Module, blocks: Collection[int]) -> Iterator[nn.Module]:
    for child in module.children():
        if any(id(m) in blocks for m in child.modules()):
            if id(child) not in blocks:
                yield from _beside(child, blocks)
        elif any(any(True for _ in inner.parameters()) for inner in child.children()):
            yield child


def make_leaves(modules: Sequence[nn.Module]) -> None:
    """Marks the modules as leaf modules that are called as DeepSpeed needs it.

    Their class changes to a subclass of itself, of the same name; names of parameters stay.
    """
    classes: dict[type, type] = {}
    for module in modules:
        original = type(module)
        if original not in classes:
            classes[original] = _leaf_class(original)
        module.__class__ = classes[original]
        module._z3_leaf = True  # type: ignore[assignment]
        module._trains = any(p.requires_grad for p in module.parameters())  # type: ignore[assignment]


def keep_parameters(modules: Sequence[nn.Module]) -> None:
    """Has leaves remember their parameters, which no longer change: DeepSpeed asks for them several
    times a pass, and would walk the modules inside each time."""
    for module in modules:
        module._kept = list(module.named_parameters())  # type: ignore[assignment]


def _leaf_class(original: type) -> type:
    signature = inspect.signature(original.forward)  # type: ignore[attr-defined]

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        if bound.kwargs:
            raise TypeError(f"{original.__name__}: {sorted(bound.kwargs)} cannot be positional")
        given = dict(list(bound.arguments.items())[1:])
        if torch.is_grad_enabled() and self._trains and not any(map(_has_gradient, given.values())):
            first = next(n for n, value in given.items() if _is_floating(value))
            given[first] = given[first].detach().requires_grad_()
        # what comes after has no gradient, so that nobody has to see it
        seen = max((i for i, v in enumerate(given.values(), 1) if _has_gradient(v)), default=0)
        names = list(given)
        unseen = {name: given[name] for name in names[seen:]}
        return original.__call__(self, *(given[n] for n in names[:seen]), **unseen)  # type: ignore[operator]

    def named_parameters(self: Any, prefix: str = "", recurse: bool = True, **options: Any) -> Any:
        if recurse and not prefix and "_kept" in self.__dict__:
            return iter(self._kept)
        return original.named_parameters(self, prefix, recurse, **options)  # type: ignore[attr-defined]

    body = {
        "__call__": __call__,
        "named_parameters": named_parameters,
        "__module__": original.__module__,
    }
    return type(original.__name__, (original,), body)


def _has_gradient(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_has_gradient, value))
    return isinstance(value, Tensor) and value.requires_grad


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
