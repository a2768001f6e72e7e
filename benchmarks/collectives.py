"""How many collectives a rank makes, and of how many bytes, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

KINDS = ("all_gather", "all_gather_into_tensor", "all_reduce", "barrier", "broadcast",
         "reduce_scatter_tensor")  # fmt: skip


class Collectives:
    """Counts, while it is open, the calls of `torch.distributed` that gardo and DeepSpeed make.

    `calls` and `bytes` are by kind; the bytes of a call are those of its largest tensor, which is
    what the ranks hold together: gathered, or before it is reduced. To be entered before the first
    process group: DeepSpeed takes some of the functions from torch then.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()

    def __enter__(self) -> Collectives:
        self._own = {kind: getattr(dist, kind) for kind in KINDS}
        for kind, function in self._own.items():
            setattr(dist, kind, self._counted(kind, function))
        return self

    def __exit__(self, *exception: object) -> None:
        for kind, function in self._own.items():
            setattr(dist, kind, function)

    def _counted(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[kind] += 1
            self.bytes[kind] += max(map(_bytes, (*args, *kwargs.values())), default=0)
            return function(*args, **kwargs)

        return call


def _bytes(argument: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(argument))


def _tensors(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for inner in argument:
            yield from _tensors(inner)
