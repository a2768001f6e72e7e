"""compute-sanitizer on a small case of every op: accesses out of bounds, races in shared memory.

    python -m campaign.sanitizer --out FOLDER       writes memcheck.txt, racecheck.txt

The cases are the ops' own examples, as the doctor runs them. Without torch's caching allocator
every tensor ends where its memory does, so that an access past it is one.

racecheck looks at shared memory alone. Whether a loss's last program may read what the others have
stored in global memory is not its question: `tests/kernels/test_compiled.py` looks at the order of
stores and ticket, and the benchmark at ten runs' bits.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

TOOLS = ("memcheck", "racecheck")
FOUND = 9  # exit code of a tool that has found something

EVERY_OP = """
import torch
from gardo_kernels._examples import On, op_modules
for name, op in op_modules().items():
    for case, _ in op.examples(On("triton", torch.device("cuda"))):
        torch.cuda.synchronize()
        print(f"{name} {case} ran", flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND)]
        done = subprocess.run(
            [*command, sys.executable, "-c", EVERY_OP],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        (options.out / f"{tool}.txt").write_text(done.stdout, encoding="utf-8")
        said = " ".join(done.stdout.strip().splitlines()[-1:])
        print(f"{tool}: exit {done.returncode}; {said}", flush=True)
        failed += [tool] if done.returncode else []
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
