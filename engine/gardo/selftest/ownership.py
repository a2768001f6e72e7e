"""Two runs of one name: at once, one after another, one's checkpoints in the other's folder."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from gardo.distributed.saved import committed
from gardo.selftest.case import Case, must
from gardo.selftest.forked import Launched
from gardo.selftest.trial import Trial, listing

LONG = {"name": "tiny", "folder": "runs", "steps": 100_000, "seed": 7}
SELDOM = {"every": 100_000, "keep": 2, "background": False}


def started(trial: Trial, recipe: Path, *arguments: str, ranks: int = 0) -> Launched:
    """A run that has done an iteration and will not end by itself."""
    one = trial.start(recipe, *arguments, ranks=ranks)
    trial.until(lambda: "/100000" in one.said(), one)
    return one


def second_start(trial: Trial) -> None:
    recipe = trial.recipe(run=LONG, checkpoint=SELDOM)
    first = started(trial, recipe)
    try:
        before = listing(trial.run())
        second = trial.train(recipe, timeout=30)
        must(second.code == 2, f"the second start ended with {second.code}: {second.said}")
        for part in (f"process {first.processes[0].pid} ", "run.name", "is being trained"):
            must(part in second.said, second.said)
        must(listing(trial.run()) == before, "the second start wrote into the folder of the first")
        must(not trial.run("tiny.1").exists(), "the folder of a run that trains was moved aside")
        first.kill(signal.SIGTERM)
        (ended,) = first.ended()
        must(ended.code == 0 and bool(committed(trial.run() / "checkpoints")), ended.said)
    finally:
        first.kill()


def starts_at_once(trial: Trial) -> None:
    recipe = trial.recipe(run=LONG, checkpoint=SELDOM)
    starts = [trial.start(recipe) for _ in range(5)]
    try:
        trial.until(lambda: sum(one.processes[0].exitcode is not None for one in starts) >= 4)
        alive = [one for one in starts if one.processes[0].exitcode is None]
        codes = [one.processes[0].exitcode for one in starts if one not in alive]
        must(codes == [2] * 4, f"{codes}: {[one.said() for one in starts]}")
        must(len(alive) == 1 and not trial.run("tiny.1").exists(), listing(trial.folder))
    finally:
        for one in starts:
            one.kill()


def resume_of_a_live_run(trial: Trial) -> None:
    must(trial.train(trial.recipe()).code == 0, "")
    recipe = trial.recipe(run=LONG, checkpoint=SELDOM)
    first = started(trial, recipe, "--resume")
    try:
        begun = trial.run() / "checkpoints" / "step-000009.tmp-abcd"
        begun.mkdir()
        second = trial.train(trial.recipe(run={"name": "tiny", "steps": 4}), "--resume", timeout=30)
        must(second.code == 2 and "is being trained" in second.said, second.said)
        must(begun.is_dir(), "what the first run was writing is gone")
        Launched(0, exported, trial.run(), trial.folder / "export").wait()
    finally:
        first.kill()


def exported(run: Path, out: Path) -> int:
    from gardo.export import export_run
    from gardo.report.html import write_report

    return int(not (export_run(run, out=out).is_file() and write_report(run).is_file()))


def killed(trial: Trial) -> None:
    recipe = trial.recipe(run=LONG)
    first = started(trial, recipe)
    trial.until(lambda: bool(committed(trial.run() / "checkpoints")), first)
    first.kill()
    first.ended()
    steps = int(committed(trial.run() / "checkpoints")[0].name[5:]) + 1
    resumed = trial.train(trial.recipe(run={"name": "tiny", "steps": steps}), "--resume")
    must(resumed.code == 0 and "was left behind" in resumed.said, resumed.said)
    anew = trial.train(trial.recipe(run={"name": "tiny", "steps": 1}))
    must(anew.code == 0 and "left behind" not in anew.said, anew.said)
    must(trial.run("tiny.1").is_dir(), listing(trial.folder))
    must(not list(trial.run().parent.glob(".*.lock")), listing(trial.folder))


def foreign_checkpoint(trial: Trial) -> None:
    for name, steps in (("tiny", 2), ("other", 3)):
        recipe = trial.recipe(f"{name}.yaml", run={"name": name, "steps": steps})
        must(trial.train(recipe).code == 0, "")
    step = "checkpoints/step-000003"
    shutil.copytree(trial.run("other") / step, trial.run() / step)
    before = listing(trial.run())
    refused = trial.train(trial.recipe(run={"name": "tiny", "steps": 5}), "--resume")
    must(refused.code == 2 and "step-000003 is of another run" in refused.said, refused.said)
    must(listing(trial.run()) == before, "the refusal changed the run's folder")
    shutil.copytree(trial.run("other"), trial.run("copy"))
    copied = trial.train(trial.recipe(run={"name": "copy", "steps": 4}), "--resume")
    must(copied.code == 0 and "resumed after step 3" in copied.said, copied.said)


CASES = [
    Case("second-start", "a run is started under the name of one that trains",
         "it is refused with the other's process and machine, exit code 2; the first goes on and "
         "nothing of it is moved", second_start),
    Case("starts-at-once", "five runs of one name are started at the same instant",
         "one trains, four are refused", starts_at_once),
    Case("resume-of-a-live-run", "`--resume` of a run that trains",
         "it is refused, and sweeps nothing that the other is writing; export and report work",
         resume_of_a_live_run),
    Case("killed-owner", "a run is killed with SIGKILL, resumed, and started anew",
         "its lock keeps nobody out and is gone afterwards; the old folder is moved aside", killed),
    Case("foreign-checkpoint", "a checkpoint of another run is copied into a run's folder",
         "`--resume` refuses it by name and changes nothing; a copied run as a whole goes on",
         foreign_checkpoint),
]  # fmt: skip
