"""How runs end: a signal to a rank, a closed terminal, a killed launcher, a rank that hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from gardo.distributed.saved import committed
from gardo.ending import HUNG
from gardo.report.metrics_log import read_metrics
from gardo.selftest.case import Case, must
from gardo.selftest.forked import on_cpu
from gardo.selftest.ownership import LONG, SELDOM, started
from gardo.selftest.trial import Trial, bits

ZERO = {"engine": "zero", "stage": 3, "threads": 1}


def disturbing(**settings: Any) -> dict[str, Any]:
    kind = "gardo.selftest.faults:Disturbing"
    return {"disturbing": {"kind": kind, "role": "proxy", **settings}}


def logged(run: Path) -> list[Any]:
    """What a run's log says that does not depend on the clock."""
    return [(r["kind"], r["step"], r["rewards"], r.get("metrics"), r.get("change"))
            for r in read_metrics(run / "metrics.jsonl")]  # fmt: skip


def seconds_to_end(run: Any, number: int, rank: int = 0) -> float:
    """Sends a signal to a rank, and waits for the end of all."""
    began = time.monotonic()
    os.kill(run.processes[rank].pid, number)
    for process in run.processes:
        process.join(60)
    return time.monotonic() - began


def signal_to_a_rank(trial: Trial) -> None:
    long = trial.recipe(run=LONG, checkpoint=SELDOM, distributed=ZERO)
    run = started(trial, long, ranks=2)
    seconds = seconds_to_end(run, signal.SIGTERM, rank=1)
    ended = run.ended()
    must([one.code for one in ended] == [0, 0], ended)
    must("ended by SIGTERM, not finished: step" in ended[0].said, ended[0].said)
    (saved,) = committed(trial.run() / "checkpoints")
    steps = int(saved.name[5:]) + 2
    print(f"          {seconds:.1f} s from the signal to the exit", flush=True)
    for name, options in (("tiny", ["--resume"]), ("uncut", [])):
        whole = trial.recipe(f"{name}.yaml", run={"name": name, "steps": steps}, distributed=ZERO)
        done = trial.train(whole, *options, ranks=2)
        must(done.code == 0, done.said)
    must(bits(trial.run()) == bits(trial.run("uncut")), "another end than that of the uncut run")


def asked_in_evaluation(trial: Trial) -> None:
    each = {"every": 1, "prompt_count": 2, "images_per_prompt": 1, "steps": 1, "batch": 1}

    def run(file: str, name: str, *options: str, at: Sequence[int] = ()) -> str:
        recipe = trial.recipe(
            file, run={"name": name}, rewards=disturbing(at=[*at], signal=15), evaluate=each,
            checkpoint=SELDOM,
        )  # fmt: skip
        ended = trial.train(recipe, *options)
        must(ended.code == 0, ended.said)
        return ended.said

    run("uncut.yaml", "uncut")
    # two calls before the first iteration, one in it: this is the first of two in its evaluation
    must("step 1 of 3 is saved" in run("cut.yaml", "tiny", at=[4]), "it was not cut there")
    run("again.yaml", "tiny", "--resume")
    must(bits(trial.run()) == bits(trial.run("uncut")), "other bits than those of the uncut run")
    must(logged(trial.run()) == logged(trial.run("uncut")), "another log than the uncut run's")


def nothing_saved(trial: Trial) -> None:
    recipe = trial.recipe(rewards=disturbing(at=[1], signal=15), checkpoint=SELDOM)
    ended = trial.train(recipe)
    must(ended.code == 128 + signal.SIGTERM and "nothing is saved" in ended.said, ended)
    must(not list(trial.run().parent.glob(".*.lock")), "the lock was left behind")


def asked_twice(trial: Trial) -> None:
    run = trial.start(trial.recipe(rewards=disturbing(at=[3]), run=LONG, checkpoint=SELDOM))
    trial.until(lambda: "step 1/" in run.said(), run)
    time.sleep(0.5)
    os.kill(run.processes[0].pid, signal.SIGINT)
    time.sleep(1.2)
    must(run.processes[0].is_alive(), "the first signal ended it at once")
    seconds = seconds_to_end(run, signal.SIGINT)
    (ended,) = run.ended()
    must(ended.code == 128 + signal.SIGINT and seconds < 5, (seconds, ended))


def hung_rank(trial: Trial) -> None:
    recipe = trial.recipe(
        rewards=disturbing(at=[3], rank=1), distributed=ZERO,
        run={**LONG, "watchdog": 3}, checkpoint=SELDOM,
    )  # fmt: skip
    ended = trial.start(recipe, ranks=2).ended(60)
    must([one.code for one in ended] == [HUNG, HUNG], ended)
    for rank, where in ((0, "all_gather"), (1, "in score")):
        text = (trial.run() / f"hung-rank-{rank}.txt").read_text()
        for part in (f"rank {rank}: no progress in phase 'reward' for 3 s", where):
            must(part in text and part in ended[rank].said, text)


class Typed:
    """`gardo train` in a process and a session of its own, with all processes that it starts."""

    def __init__(self, trial: Trial, *arguments: str) -> None:
        self.file = trial.folder / "said.txt"
        with open(self.file, "w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gardo.cli", "train", *arguments], cwd=trial.folder,
                env=on_cpu(), stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.seen: dict[int, psutil.Process] = {}

    def below(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            found = psutil.Process(self.process.pid).children(recursive=True)
            self.seen.update({one.pid: one for one in found})
        return list(self.seen.values())

    def left(self, seconds: float) -> list[psutil.Process]:
        """Those of all processes that still run after so long."""
        return psutil.wait_procs(self.below(), timeout=seconds)[1]

    def until_said(self, text: str) -> None:
        end = time.monotonic() + 120
        while text not in self.file.read_text():
            must(self.process.poll() is None and time.monotonic() < end, self.file.read_text())
            self.below()
            time.sleep(0.1)

    def kill(self) -> None:
        for one in self.below():
            with suppress(psutil.Error):
                one.kill()
        self.process.kill()
        self.process.wait()


def typed(trial: Trial, wait_for: str = "step 1/") -> Typed:
    recipe = trial.recipe(run=LONG, checkpoint=SELDOM, distributed=ZERO)
    one = Typed(trial, str(recipe), "--gpus", "2")
    if wait_for:
        one.until_said(wait_for)
    return one


def closed_terminal(trial: Trial) -> None:
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        one = typed(trial)
        try:
            began = time.monotonic()
            one.process.send_signal(number)
            code = one.process.wait(60)
            print(f"          {time.monotonic() - began:.1f} s from {signal.Signals(number).name} "
                  "to the exit", flush=True)  # fmt: skip
            said = one.file.read_text()
            must(code == 0 and "recipe.yaml --resume --gpus 2" in said, f"exit code {code}: {said}")
            must(not one.left(1), f"{one.left(0)} still run")
            must(bool(committed(trial.run() / "checkpoints")), said)
        finally:
            one.kill()


def killed_from_outside(trial: Trial, whom: str, code: int) -> None:
    one = typed(trial)
    try:
        victim = one.process if whom == "gardo" else _launcher(one)
        victim.kill()
        ended = one.process.wait(30)
        must(ended == code, f"exit code {ended}")
        must(not one.left(10), f"{one.left(0)} still run")
    finally:
        one.kill()


def killed_rank(trial: Trial) -> None:
    kind = disturbing()["disturbing"]
    rewards = {
        "a": {**kind, "at": [3], "rank": 0},
        "b": {**kind, "at": [3], "rank": 1, "signal": 9},
    }
    recipe = trial.recipe(run=LONG, checkpoint=SELDOM, distributed=ZERO, rewards=rewards)
    run = Typed(trial, str(recipe), "--gpus", "2")
    try:
        run.until_said("step 1/")
        began = time.monotonic()
        code = run.process.wait(60)
        seconds = time.monotonic() - began
        must(code == 128 + signal.SIGKILL and seconds < 15, f"exit code {code}, {seconds:.0f} s")
        must(not run.left(1), f"{run.left(0)} still run")
    finally:
        run.kill()


def _launcher(one: Typed) -> psutil.Process:
    return psutil.Process(one.process.pid).children()[0]


def killed_command(trial: Trial) -> None:
    killed_from_outside(trial, "gardo", -signal.SIGKILL)


def killed_launcher(trial: Trial) -> None:
    killed_from_outside(trial, "launcher", 128 + signal.SIGKILL)


def asked_while_loading(trial: Trial) -> None:
    one = typed(trial, wait_for="")
    try:
        end = time.monotonic() + 60
        while len([p for p in one.below() if "--local_rank=0" in _command(p)]) < 1:
            must(time.monotonic() < end, one.file.read_text())
            time.sleep(0.05)
        time.sleep(1)
        one.process.terminate()
        code = one.process.wait(30)
        must(code == 128 + signal.SIGTERM, f"exit code {code}: {one.file.read_text()}")
        must(not one.left(5), f"{one.left(0)} still run")
    finally:
        one.kill()


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


CASES = [
    Case("signal-to-a-rank", "one of two ranks is sent SIGTERM",
         "both save the last finished iteration and end with 0; resumed, the run ends in the bits "
         "of one that was not cut", signal_to_a_rank),
    Case("asked-in-evaluation", "SIGTERM comes in the middle of an evaluation",
         "it is made up for: the resumed run has the log and the bits of one that was not cut",
         asked_in_evaluation),
    Case("nothing-to-save", "SIGTERM comes before the first iteration is finished",
         "exit code 143, and the run's lock is given back", nothing_saved),
    Case("asked-twice", "Ctrl-C twice, while a reward hangs",
         "the second ends the rank at once, exit code 130", asked_twice),
    Case("hung-rank", "a reward of one of two ranks never returns",
         "both write the stacks of all threads, with rank and phase, to standard error and a file, "
         f"and end with {HUNG}", hung_rank),
    Case("closed-terminal", "`gardo train` on two ranks is sent SIGHUP, SIGTERM, SIGINT",
         "each time the ranks save and end, the launcher after them; exit code 0", closed_terminal,
         quick=False),
    Case("killed-command", "`gardo train` on two ranks is killed with SIGKILL",
         "no process of it is left", killed_command, quick=False),
    Case("killed-launcher", "the deepspeed launcher below it is killed with SIGKILL",
         "exit code 137, and no process is left", killed_launcher, quick=False),
    Case("killed-rank", "a rank is killed with SIGKILL, while the other does not listen",
         "exit code 137 within seconds, and no process is left", killed_rank, quick=False),
    Case("asked-while-loading", "SIGTERM comes while the ranks load",
         "exit code 143, and no process is left", asked_while_loading, quick=False),
]  # fmt: skip
