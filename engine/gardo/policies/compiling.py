"""Blocks compiled one by one: all blocks of a kind run the same compiled code.

A block's `forward` is compiled, not the block: what hooks a module (ZeRO's gathers, counters of
calls) stays outside, and parameters are inputs, so that weights may be gathered, released and
exchanged between calls. Rollout, teachers and training call the same blocks, so they share
numerics, and compiled code too where they share shapes: shapes are static, short calls are filled
up (`Geometry.fill`). There is one graph for each kind of block, number of rows, and whether a
gradient is asked for, of the block's input and of its weights; the first block of a list may have
one of its own, where its input has other strides or no gradient.

`selective` and `matmuls` of checkpointing.py act on single ops, which a compiled block does not
show: there the block is compiled with its checkpoint inside, and the compiler keeps and runs again
what they say. `none` leaves that choice to the compiler: it runs cheap elementwise ops again.
"""

from __future__ import annotations

import functools
import time
import types
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from gardo.policies.checkpointing import Checkpointing, kept_inside
from gardo.types import Phase

if TYPE_CHECKING:
    from torch import nn

BACKEND = "inductor"
MOST = 64  # graphs of a kind of block; more of them are shapes that do not stand still


class Compiled:
    """How many graphs were compiled and how long it took, since the last time it was asked.

    `phase()` gives what measures; compiling is its phase `compile`.
    """

    def __init__(self, phase: Callable[[], Phase]) -> None:
        self._phase, self._open = phase, ExitStack()
        self._graphs, self._seconds, self._started = 0, 0.0, 0.0
        from torch._dynamo.callback import callback_handler

        callback_handler.register_start_callback(self._start)
        callback_handler.register_end_callback(self._end)
        self._handler = callback_handler

    def _start(self, _: Any) -> None:
        self._started = time.perf_counter()
        self._open.enter_context(self._phase()("compile"))

    def _end(self, _: Any) -> None:
        self._open.close()
        self._graphs += 1
        self._seconds += time.perf_counter() - self._started

    def take(self) -> tuple[int, float]:
        """Graphs and seconds; zeros once nothing new is met."""
        taken = self._graphs, self._seconds
        self._graphs, self._seconds = 0, 0.0
        return taken

    def close(self) -> None:
        """Stops to count."""
        self._handler.remove_start_callback(self._start)
        self._handler.remove_end_callback(self._end)


def compile_blocks(transformer: Any, blocks: Iterable[nn.Module], mode: Checkpointing) -> None:
    """Compiles each block's forward pass, and its backward pass with it, when it is first called.

    `mode` is what `checkpoint_blocks` was told: what it does inside blocks is done here.
    """
    import torch._dynamo  # seconds, which a recipe that is only checked does not wait for
    import torch._functorch.config

    torch._dynamo.config.recompile_limit = max(MOST, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._functorch.config.force_non_lazy_backward_lowering = True  # while it is waited for
    inside = kept_inside(mode)
    if inside is not None:
        transformer.disable_gradient_checkpointing()
    for block in blocks:
        forward: Any = block.forward
        if inside is not None:
            forward = types.MethodType(_checkpointed(forward.__func__, inside), block)
        block.forward = torch.compile(forward, dynamic=False, backend=BACKEND)


@functools.cache
def _checkpointed(original: Callable[..., Any], keeps: Callable[[], Any]) -> Callable[..., Any]:
    """A block's forward with a checkpoint around it; one function for all blocks of a kind."""

    from torch.utils.checkpoint import checkpoint

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(self, *args, **kwargs)
        return checkpoint(
            original, self, *args, use_reentrant=False, preserve_rng_state=False,
            context_fn=keeps, **kwargs,
        )  # fmt: skip

    return forward


def compile_trouble(device: torch.device) -> str:
    """Why torch does not compile for the device, and what to do; "" where it does.

    A small function is compiled to see: seconds, unless torch's cache has it.
    """

    def small(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x) + 1

    try:
        torch.compile(small, dynamic=False, backend=BACKEND)(torch.ones(64, device=device)).cpu()
    except Exception as error:  # whatever a compiler or a driver can say
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        wants = "g++" if device.type == "cpu" else "gcc and Python's headers"
        return f"torch does not compile here ({said}); it needs {wants}"
    return ""
