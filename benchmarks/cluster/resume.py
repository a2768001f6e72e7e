"""A run that is cut and goes on, beside one that is not: are the last checkpoints the same bits?

    python -m cluster.resume --out FOLDER RECIPE --gpus N ... --set checkpoint.every=1 ...

Every rank is killed; with --asked the run is asked to end (SIGTERM), and must do it well. All other
arguments are handed to `gardo train`. Exit code 1 where the files differ.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gardo.distributed.saved import Saved, committed


def train(arguments: Sequence[str], name: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "gardo.cli", "train", *arguments, "--set", f"run.name={name}"]
    return subprocess.Popen(command, start_new_session=True)


def finished(process: subprocess.Popen[bytes]) -> None:
    if code := process.wait():
        raise SystemExit(f"gardo train ended with {code}")


def cut_after_a_checkpoint(process: subprocess.Popen[bytes], run: Path, *, asked: bool) -> int:
    """The step of the newest checkpoint when the run was asked to end and did, or was killed."""
    while not committed(run / "checkpoints"):
        if process.poll() is not None:
            raise SystemExit("the run ended before it could be cut")
        time.sleep(0.02)
    if asked:
        process.terminate()
        finished(process)
    else:
        for group in groups_under(process.pid):
            os.killpg(group, signal.SIGKILL)
        process.wait()
    return Saved(committed(run / "checkpoints")[0]).step


def groups_under(pid: int) -> set[int]:
    """Process groups of a process and all that it has started; `gardo train` gives its ranks one"""
    import psutil

    parent = psutil.Process(pid)
    return {os.getpgid(p.pid) for p in (parent, *parent.children(recursive=True))}


def files(run: Path) -> tuple[int, dict[str, str]]:
    """The last checkpoint: its step, and the digest of each of its files."""
    saved = Saved(committed(run / "checkpoints")[0])
    return saved.step, {file["name"]: file["sha256"] for file in saved.manifest["files"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--asked", action="store_true")
    options, arguments = parser.parse_known_args()
    runs = options.out / "runs"
    cut_by = "asked to end" if options.asked else "killed"
    finished(train(arguments, "whole"))
    step = cut_after_a_checkpoint(train(arguments, "cut"), runs / "cut", asked=options.asked)
    finished(train([*arguments, "--resume"], "cut"))
    (last, whole), (same_last, cut) = files(runs / "whole"), files(runs / "cut")
    differ = [name for name in whole if cut.get(name) != whole[name]]
    if last != same_last or differ:
        raise SystemExit(f"{cut_by} after step {step}: {len(differ)} of {len(whole)} files differ")
    print(f"{cut_by} after step {step} of {last}: all {len(whole)} files have the same bits")


if __name__ == "__main__":
    main()
