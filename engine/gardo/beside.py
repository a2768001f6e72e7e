"""Work beside the loop's own: in a thread, and on a GPU in a stream, of its own.

While a micro-batch is sampled, the one before it is decoded and scored. What is begun runs in the
order in which it was begun, one at a time; it must not talk to other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gardo.types import Phase, no_phase

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")


class Beside:
    """Runs jobs beside what its thread does; `on` False: at once, in their place."""

    def __init__(self, device: torch.device, *, on: bool, phase: Phase = no_phase) -> None:
        """What waits for a job counts as the phase `decode`."""
        self._phase = phase
        self._threads = ThreadPoolExecutor(1, "gardo-beside") if on else None
        self._stream = torch.cuda.Stream(device) if on and device.type == "cuda" else None

    def begin(
        self, job: Callable[[], Result], inputs: Sequence[Tensor] = ()
    ) -> Callable[[], Result]:
        """Begins the job, which may read `inputs`; what is returned gives its result, or its error.

        Without gradients.
        """
        if self._threads is None:
            result = job()
            return lambda: result
        running = self._threads.submit(self._within_stream(job, inputs))

        def wait() -> Result:
            with self._phase("decode"):
                result = running.result()
                if self._stream:
                    now = torch.cuda.current_stream()
                    now.wait_stream(self._stream)
                    _used_in(now, result)
                return result

        return wait

    def _within_stream(self, job: Callable[[], Result], inputs: Sequence[Tensor]) -> Any:
        """The job after what its inputs wait for; the allocator knows who reads them."""
        stream = self._stream
        if stream is not None:
            ready = torch.cuda.current_stream().record_event()
            _used_in(stream, inputs)

        def run() -> Result:
            with torch.no_grad(), torch.cuda.stream(stream):  # None: nothing happens
                if stream is not None:
                    stream.wait_event(ready)
                return job()

        return run


def _used_in(stream: Any, tensors: Any) -> None:
    from torch.utils._pytree import tree_leaves

    for tensor in tree_leaves(tensors):
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            tensor.record_stream(stream)
