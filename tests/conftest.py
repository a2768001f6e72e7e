"""Threads for CPU runs, a quicker interpreter, one counted reason for skipped GPU tests."""

from __future__ import annotations

import os
import sys

import pytest

from gardo.ending import hear_signals
from tests.interpreter import look_once

hear_signals()  # what tests start is sent some; CI may run under nohup, or behind an &
if not os.path.exists("/dev/nvidiactl"):  # kernels run as Python; read when one is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

LONGEST = {"integration", "test_packaging.py", "test_compiled.py"}  # run first: none is waited for


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.isdisjoint(item.path.parts))
    needing_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not needing_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        reason = f"needs an NVIDIA GPU (one of {len(needing_gpu)} such tests collected)"
        for item in needing_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def cpu_threads() -> None:
    """This process's share of the cores; OMP_NUM_THREADS, where set, wins."""
    torch = sys.modules.get("torch")  # tests that never import it should not pay for it
    if torch is not None and "OMP_NUM_THREADS" not in os.environ:
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        torch.set_num_threads(min(16, max(1, len(os.sched_getaffinity(0)) // workers)))


@pytest.fixture(scope="session", autouse=True)
def interpreted_sooner() -> None:
    if "triton" in sys.modules:
        look_once()
