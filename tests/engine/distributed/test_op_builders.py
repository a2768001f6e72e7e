"""DeepSpeed's C++ and CUDA ops: none is compiled, or asked whether it could be, at a start."""

from __future__ import annotations

import subprocess
import sys

from tests.integration.launch import environment

CODE = """
import sys, torch
started = []
sys.addaudithook(lambda event, given: event == "subprocess.Popen" and started.append(given[1]))
from gardo.distributed.zero import start_process_group
start_process_group(torch.device("cpu"), 60.0)
torch.distributed.barrier()
print([command for command in started if command[0] in ("gcc", "g++", "cc", "c++", "nvcc")])
"""


def test_no_compiler_runs_at_the_start_of_a_process_group() -> None:
    """Its probe takes gcc, nvcc and warnings about CUDA_HOME on every rank, for ops not used."""
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment(), capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr
