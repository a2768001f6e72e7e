"""Fake tensors, which have shapes and no memory, and the bytes of tensors that are alive."""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count


def make_fake(module: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Parameters of `dtype` and buffers on fake tensors; they may be on the meta device before."""
    with mode:
        for part in module.modules():
            for name, p in list(part.named_parameters(recurse=False)):
                value = torch.empty(p.shape, dtype=dtype)
                setattr(part, name, nn.Parameter(value, requires_grad=p.requires_grad))
            for name, buffer in list(part.named_buffers(recurse=False)):
                setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def forget_fakes(module: nn.Module) -> None:
    """Clears what functions beside the module's classes remember of their calls (lru_cache).

    transformers keeps DINOv3's coordinates so; a fake one would reach the next real call.
    """
    for name in {type(part).__module__ for part in module.modules()}:
        for value in vars(sys.modules[name]).values():
            for cell in getattr(value, "__closure__", None) or ():
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, those of `known` left out."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {t.untyped_storage()._cdata: 0 for t in known}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, key, value))


CPU_ATTENTION = {  # what attention of fake tensors on the CPU is; torch's counter does not know it
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
