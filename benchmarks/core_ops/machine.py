"""Where the benchmark runs: a GPU, or the CPU as its twin for everything but speed.

Both time a call, count what it launches and waits for, and compile it; only a GPU has graphs and a
peak of memory.
"""

from __future__ import annotations

import datetime
import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton

from pages import revision

from .cases import Call, Outputs, TorchCall
from .counting import Counter

Runs = Callable[[], Any]


class Machine:
    """The CPU. `name` and what else a row says of the place come from `facts`."""

    device = torch.device("cpu")
    is_gpu = False
    reps_at_once = 1

    def facts(self) -> dict[str, Any]:
        return {
            "device": f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
            "clock_sm_mhz": "", "clock_mem_mhz": "", "driver": "", "torch": torch.__version__,
            "triton": triton.__version__, "revision": revision(),
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip

    def microseconds(self, call: Runs, *, flush: bool) -> float:
        """One call; the CPU's caches are left as they are."""
        start = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - start)

    def launches_and_syncs(self, call: Runs) -> tuple[int, int]:
        with Counter() as count:
            call()
        return count.launches, count.syncs

    def peak_bytes(self, call: Runs) -> int | None:
        """Memory above what stood before, or None where it cannot be told."""
        return None

    def compiled(self, call: TorchCall) -> TorchCall | None:
        return None

    def graph(self, call: Call) -> Call | None:
        return None


class Gpu(Machine):
    """An NVIDIA GPU. Small cases are timed in runs of `reps_at_once` calls, from an idle device:
    launches weigh as they do in a loop. Large ones one by one, the L2 cache full of something else
    and the device busy while the host prepares, as it is behind a model's forward pass."""

    device = torch.device("cuda")
    is_gpu = True
    reps_at_once = 10
    BUSY_CYCLES = 4_000_000  # about 2 ms: longer than the host needs for the calls of one path

    def __init__(self) -> None:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.other = torch.ones(cache, device=self.device)  # 4 bytes each: four times the cache
        self.sink = torch.empty((), device=self.device)

    def facts(self) -> dict[str, Any]:
        """With the clocks of this moment: taken for each case, behind its timing."""
        query = "name,clocks.sm,clocks.mem,driver_version"
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"],
            capture_output=True, text=True,
        )  # fmt: skip
        fields = [field.strip() for field in done.stdout.split(",")]
        name, sm, mem, driver = fields if len(fields) == 4 else ("", "", "", "")
        return {
            **super().facts(),
            "device": name or torch.cuda.get_device_name(0),
            "clock_sm_mhz": sm, "clock_mem_mhz": mem, "driver": driver,
        }  # fmt: skip

    def microseconds(self, call: Runs, *, flush: bool) -> float:
        reps = 1 if flush else self.reps_at_once
        torch.cuda.synchronize()
        if flush:
            torch.cuda._sleep(self.BUSY_CYCLES)
            # read, not written: lines that are written must be flushed in the timed kernel's time
            torch.sum(self.other, out=self.sink)
        self.start.record()
        for _ in range(reps):
            call()
        self.end.record()
        self.end.synchronize()
        return 1e3 * self.start.elapsed_time(self.end) / reps

    def launches_and_syncs(self, call: Runs) -> tuple[int, int]:
        """Kernels, copies and fills as the profiler sees them; waits as torch warns of them."""
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        on_gpu = torch.autograd.DeviceType.CUDA
        launches = sum(event.device_type == on_gpu for event in profile.events() or [])
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return launches, sum("synchroniz" in str(warning.message) for warning in seen)

    def peak_bytes(self, call: Runs) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        torch.cuda.synchronize()
        del out
        return torch.cuda.max_memory_allocated() - before

    def compiled(self, call: TorchCall) -> TorchCall | None:
        torch._dynamo.reset()  # one case's code is another's, with other shapes
        return torch.compile(call, mode="max-autotune-no-cudagraphs", dynamic=False)

    def graph(self, call: Call) -> Call | None:
        """The call captured; a replay returns the same tensors every time."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call()

        def replay() -> Outputs:
            graph.replay()
            return out

        return replay


def this_machine(kind: str) -> Machine:
    """`auto` takes the GPU where there is one."""
    if kind == "cuda" or (kind == "auto" and torch.cuda.is_available()):
        return Gpu()
    return Machine()
