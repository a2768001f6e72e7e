"""Who owns a run: one process, however many want to, and nobody once it is gone."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gardo.distributed.group import Group
from gardo.recipe_errors import RecipeError
from gardo.run_folder import own_folder
from gardo.run_lock import Owner, RunLock, Taken, started


def lock_file(run: Path, owner: Owner | None) -> Path:
    """A lock that was left there: of `owner`, or not even written."""
    path = RunLock(run).path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(owner)) if owner else "")
    return path


def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_it_is_taken_once_and_given_back(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tiny"
    with RunLock(run) as lock:
        assert lock.take() == ""
        said = rf"^tiny: {run} is being trained by process {os.getpid()} on .*; give another run\."
        with pytest.raises(Taken, match=said), RunLock(run) as other:
            other.take()
        assert lock.path.is_file()  # the one that was refused takes nothing away
    assert not run.parent.exists()  # as it was
    with RunLock(run) as lock:
        assert lock.take() == ""
        run.mkdir()
    assert [path.name for path in run.parent.iterdir()] == ["tiny"]


@pytest.mark.parametrize(
    "of", [lambda me: replace(me, pid=ended()), lambda me: replace(me, started=me.started - 1)]
)
def test_an_owner_that_is_gone_keeps_nobody_out(
    of: Callable[[Owner], Owner], tmp_path: Path
) -> None:
    """Nor does another process that has its number."""
    owner = of(Owner.here())
    lock_file(tmp_path / "tiny", owner)
    with RunLock(tmp_path / "tiny") as lock:
        assert lock.take() == f"the lock of {owner}, which is gone, was left behind"


@pytest.mark.parametrize("written", [True, False])
def test_an_owner_elsewhere_is_watched(written: bool, tmp_path: Path) -> None:
    """One that touches its lock lives; one that is silent is gone."""
    run = tmp_path / "tiny"
    path = lock_file(run, replace(Owner.here(), machine="another") if written else None)
    if written:
        threading.Timer(0.3, os.utime, [path]).start()
        with pytest.raises(Taken, match="is being trained by"), RunLock(run, patience=5) as lock:
            lock.take()
    with RunLock(run, patience=0.5) as lock:
        assert "which is gone, was left behind" in lock.take()


def test_an_owner_gives_signs_of_life(tmp_path: Path) -> None:
    with RunLock(tmp_path / "tiny", beat=0.05) as lock:
        lock.take()
        first = lock.path.stat().st_mtime_ns
        time.sleep(0.5)
        assert lock.path.stat().st_mtime_ns > first


def test_a_run_that_was_taken_over_ends(tmp_path: Path) -> None:
    """It was silent for too long, a machine that slept: two may not go on."""
    code = (
        "import sys, time; from pathlib import Path; from gardo.run_lock import RunLock\n"
        "lock = RunLock(Path(sys.argv[1]), beat=0.05); lock.take()\n"
        "lock.path.unlink(); time.sleep(0.5); print('lives on', flush=True)\n"
        "RunLock(Path(sys.argv[1])).take(); time.sleep(30)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "tiny"], capture_output=True, text=True, timeout=20,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "lives on\n")
    assert "has taken this run over" in done.stderr


def contend(run: Path, go: Any, over: Any, codes: Any) -> None:
    go.wait()
    try:
        with RunLock(run) as lock:
            lock.take()
            codes.put("won")
            over.wait(60)
    except Taken:
        codes.put("refused")


@pytest.mark.parametrize("left_behind", [False, True])
def test_of_many_that_start_at_once_one_wins(left_behind: bool, tmp_path: Path) -> None:
    """Also where all of them find the lock of one that is gone."""
    forks = multiprocessing.get_context("fork")
    for number in range(10):
        run, go, over, codes = tmp_path / f"{number}", forks.Event(), forks.Event(), forks.Queue()
        if left_behind:
            lock_file(run, replace(Owner.here(), pid=ended()))
        starts = [forks.Process(target=contend, args=(run, go, over, codes)) for _ in range(8)]
        for process in starts:
            process.start()
        go.set()
        said = [codes.get(timeout=60) for _ in starts]
        over.set()
        for process in starts:
            process.join(60)
        assert sorted(said) == ["refused"] * 7 + ["won"], (number, said)


def test_the_refusal_names_the_recipe(tmp_path: Path) -> None:
    ranks = Group(torch.device("cpu"))
    with RunLock(tmp_path / "tiny") as lock, RunLock(tmp_path / "tiny") as other:
        own_folder(lock, ranks, "my.yaml")
        with pytest.raises(RecipeError, match=r"^my\.yaml: run\.name: tiny: .* being trained"):
            own_folder(other, ranks, "my.yaml")


def test_when_a_process_started() -> None:
    mine = started(os.getpid())
    assert mine and mine == started(os.getpid())
    assert started(ended()) is None
    unasked = subprocess.Popen(["true"])  # ends, and its parent has not asked how
    end = time.monotonic() + 10
    while started(unasked.pid) is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert started(unasked.pid) is None and os.path.exists(f"/proc/{unasked.pid}")
    unasked.wait()
