"""What an iteration executes, whoever runs it: launches, host waits, FLOPs of the transformer."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from core_ops.counting import Counter
from gardo.planner.live import CPU_ATTENTION

WRAPPERS = ("PeftModel", "DeepSpeedEngine")  # of a transformer, where one is called in its place


class Executed:
    """Counts between `start` and `stop`, which may lie in different functions.

    FLOPs are those of torch's own counter, backward passes and what checkpointing runs again
    included.
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._roots = {type(transformer).__name__, *WRAPPERS}
        self._counter = Counter()
        self._flops = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        self._open = ExitStack()

    def start(self) -> None:
        self._open.enter_context(self._counter)
        self._open.enter_context(self._flops)

    def stop(self) -> None:
        self._open.close()

    def counts(self) -> dict[str, Any]:
        by_module = self._flops.get_flop_counts()
        return {
            "launches": self._counter.launches,
            "waits": self._counter.syncs,
            "flops": sum(sum(by_module[root].values()) for root in self._roots & by_module.keys()),
        }
