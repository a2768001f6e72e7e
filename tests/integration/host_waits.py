"""Counts where the host would wait for a GPU, in a run on a CPU.

A run on `DEVICE` is told by its device's index: under `HostWaits` a tensor that was made on DEVICE,
or of one that was, says that it is there, any other that it is on the host. What torch makes
without Python (weights of a file, gradients) counts as the device's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

DEVICE, HOST = torch.device("cpu", 0), torch.device("cpu")
# What needs values, or a size that depends on values, of its first argument
READS = {
    "item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "unique", "unique_consecutive",
    "bincount", "masked_select", "equal", "allclose", "is_nonzero", "__bool__", "__int__",
    "__float__", "__index__", "__array__", "__contains__", "__format__", "__repr__",
}  # fmt: skip
FACTORIES = {"tensor", "as_tensor", "new_tensor"}  # of values that the host has
INDEXING = {"__getitem__", "__setitem__"}
# Torch's own Python, which asks C++ where a tensor is
BLIND = tuple(f"{torch.__path__[0]}/{part}/" for part in ("optim", "nn/utils", "utils"))
OURS = ("/gardo/", "/gardo_kernels/", "/tests/")


class HostWaits(TorchFunctionMode):
    """`waits` and `mixed`, calls with tensors of both places that a GPU would refuse: "phase: what
    in module:function" of each, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.mixed: list[str] = []
        self._phase = ""
        self._host = WeakIdKeyDictionary()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            real = func(*args)
            return real if real != HOST else DEVICE if self._is_there(args[0]) else HOST
        given = list(_tensors((args, tuple(kwargs.values()))))
        goes_there = self._goes_there(func.__name__, args, kwargs, given)
        self._judge(func.__name__, args, kwargs, given, goes_there)
        return self._placed(func(*args, **kwargs), goes_there, given)

    def _is_there(self, tensor: Tensor) -> bool:
        return tensor not in self._host

    def _goes_there(self, name: str, args: Any, kwargs: Any, given: Sequence[Tensor]) -> bool:
        """Whether what the call returns is on the device."""
        if name == "cpu":
            return False
        asked = [a for a in (*args[1:], kwargs.get("device")) if isinstance(a, torch.device)]
        if asked and not _caller().f_code.co_filename.startswith(BLIND):
            return asked[0] == DEVICE
        return any(map(self._is_there, given))

    def _judge(
        self, name: str, args: Any, kwargs: Any, given: Sequence[Tensor], goes_there: bool
    ) -> None:
        there = [self._is_there(tensor) for tensor in given]
        first = bool(there) and there[0]
        if name in FACTORIES:
            waits = goes_there and not any(isinstance(a, Tensor) for a in (args[1:] or args))
        elif name in INDEXING and first:
            index = list(_tensors(args[1:2]))
            waits = any(i.dtype == torch.bool or not self._is_there(i) for i in index)
        elif name in ("to", "copy_"):
            moves = len({*there, goes_there}) > 1
            waits = moves and not (goes_there and kwargs.get("non_blocking"))
        elif name == "repeat_interleave":
            waits = len(there) > 1 and there[1]
        else:
            waits = name in READS and first
            other = [tensor for tensor, on in zip(given, there, strict=True) if not on]
            if any(there) and any(tensor.dim() for tensor in other):
                self.mixed.append(self._place(name))
        if waits:
            self.waits.append(self._place(name))

    def _place(self, name: str) -> str:
        frame: Any = _caller()
        while not any(part in frame.f_code.co_filename for part in OURS):
            frame = frame.f_back
        path = frame.f_code.co_filename
        module = next(path.split(part)[-1] for part in OURS if part in path)
        return f"{self._phase}: {name} in {module}:{frame.f_code.co_name}"

    def _placed(self, result: Any, goes_there: bool, given: Sequence[Tensor]) -> Any:
        """The result, known to be where it is; another tensor where a move found nothing to do."""
        if isinstance(result, (tuple, list)):
            placed = [self._placed(one, goes_there, given) for one in result]
            return type(result)(placed) if type(result) in (tuple, list) else result
        if not isinstance(result, Tensor):
            return result
        if any(result is tensor for tensor in given):
            if goes_there == self._is_there(result):
                return result
            result = result.view_as(result)
        if goes_there:
            self._host.pop(result, None)
        else:
            self._host[result] = True
        return result


def _caller() -> Any:
    """The frame that called torch."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename in (__file__, torch.overrides.__file__):
        frame = frame.f_back
    return frame


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
