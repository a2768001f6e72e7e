"""Counts what a piece of code asks of a GPU, on any machine: launches, bytes, temporaries, syncs.

An ATen op that computes is one launch and moves its tensor arguments and results once; views and
allocations are none. That is exact for elementwise ops and reductions, a lower bound for the few
ops that take several kernels (sort, nonzero). A Triton kernel is one launch and is counted as it is
launched, or interpreted. Ops of ours are opened: what they do inside is counted, not they.

A synchronisation is an op whose result the host must wait for: a value read back (`.item()`,
`bool`, `float`), or a size that depends on values (`nonzero`, indexing with a boolean mask).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Constants and looks at shapes, which stay on the host.
NOTHING = {"scalar_tensor", "is_same_size", "_unsafe_view", "sym_size", "sym_numel", "sym_stride"}
# The results' values or sizes go to the host.
WAIT = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
MASKABLE = {"index", "index_put", "index_put_", "_index_put_impl_"}


def tensors(*trees: Any) -> list[Tensor]:
    return [leaf for tree in trees for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_of(some: Iterable[Tensor]) -> int:
    """Bytes that stand behind these tensors; what is broadcast counts once."""
    total = 0
    for t in some:
        count = t.element_size()
        for size, stride in zip(t.shape, t.stride(), strict=True):
            count *= 1 if stride == 0 and size > 0 else size
        total += count
    return total


def memory(some: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage behind these tensors, by its address."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in some}


class Counter(TorchDispatchMode):
    """Counts what runs inside `with Counter() as count:`, its backward passes included.

    launches (of which `triton_launches` are Triton kernels), bytes moved, bytes allocated, syncs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.triton_launches = self.bytes = self.allocated = self.syncs = 0
        self._made: set[int] = set()
        self._depth = 0
        self._in_kernel = False

    def __enter__(self) -> Counter:
        if self._depth == 0:
            self._wrap_launchers()
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._depth -= 1
        if self._depth == 0:
            GridExecutor.__call__, JITFunction.run = self._launchers

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._in_kernel:  # the interpreter's own copies
            return func(*args, **kwargs)
        given = tensors(args, kwargs)
        # a range of the profiler; what a fake tensor is asked of its device
        if (func.namespace != "aten" and not given) or func.namespace == "prim":
            return func(*args, **kwargs)
        if func.namespace != "aten":
            # Straight to the op's implementation, with this mode on again for what it does.
            device = given[0].device.type
            key = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[device.upper()])
            with self:
                return func.redispatch(key, *args, **kwargs)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.is_view or name in NOTHING:
            return out
        before, after = given, tensors(out)
        known = memory(before)
        made = {at: size for at, size in memory(after).items() if at not in known}
        self.allocated += sum(made.values())
        self._made |= made.keys()
        masked = name in MASKABLE and any(
            t.dtype in (torch.bool, torch.uint8) for t in tensors(args[1])
        )
        self.syncs += name in WAIT or masked
        # A value that is read back is a copy, not a kernel.
        if name not in ALLOCATE and name not in ("_local_scalar_dense", "item"):
            self.launches += 1
            self.bytes += bytes_of(before) + bytes_of(after)
        return out

    def kept(self, *results: Any) -> int:
        """Bytes of what was allocated inside and is among the results."""
        kept = memory(tensors(*results))
        return sum(size for at, size in kept.items() if at in self._made)

    def _wrap_launchers(self) -> None:
        """Both ways in which Triton starts a kernel, interpreted and compiled."""
        self._launchers = GridExecutor.__call__, JITFunction.run
        interpret, launch = self._launchers
        count = self

        def interpreted(grid: Any, *args: Any, **kwargs: Any) -> Any:
            return count._kernel(interpret, grid, *args, **kwargs)

        def launched(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            start = launch if warmup else count._kernel
            first = (kernel,) if warmup else (launch, kernel)
            return start(*first, *args, grid=grid, warmup=warmup, **kwargs)

        GridExecutor.__call__ = interpreted
        JITFunction.run = launched

    def _kernel(self, start: Any, *args: Any, **kwargs: Any) -> Any:
        self.launches += 1
        self.triton_launches += 1
        # Once each, however often they are passed.
        self.bytes += bytes_of({id(t): t for t in tensors(args[1:], kwargs)}.values())
        self._in_kernel = True
        try:
            return start(*args, **kwargs)
        finally:
            self._in_kernel = False
