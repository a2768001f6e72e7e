"""A disk that is full, and a standard output that nobody reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gardo.distributed.saved import committed
from gardo.report.metrics_log import read_metrics, step_records
from gardo.selftest.case import Case, must
from gardo.selftest.trial import Trial, bits

# The reward is asked by an evaluation, then once an iteration, and by the last evaluation.
EVALUATE = {"every": 2}
STEPS = 4


def changes(name: str, **told: Any) -> dict[str, Any]:
    rewards = {"bright": {"kind": "gardo.selftest.faults:NoRoom", "role": "proxy", **told}}
    return {
        "rewards": rewards,
        "run": {"name": name, "steps": STEPS},
        "evaluate": EVALUATE,
        "checkpoint": {"every": 1, "keep": 9},
    }


def undisturbed(trial: Trial) -> str:
    """The bits of a run whose disk has room."""
    ended = trial.train(trial.recipe("plain.yaml", **changes("plain")))
    must(ended.code == 0, ended.said)
    return bits(trial.run("plain"))


def full_for_a_while(trial: Trial) -> None:
    """From the second iteration's reward to the end of the evaluation after it."""
    ended = trial.train(trial.recipe(**changes("tiny", full_at=[3, 4])))
    must(ended.code == 0, ended.said)
    must("all lines are written" in ended.said, ended.said)  # what was said before had no room
    must([r["step"] for r in step_records(trial.run())] == [1, 2, 3, 4], "steps are missing")
    pictures = [r["images"] for r in read_metrics(trial.run() / "metrics.jsonl")
                if r["kind"] == "evaluation"]  # fmt: skip
    must(pictures[1] is None and pictures[0] and pictures[2], pictures)
    saved = [folder.name for folder in committed(trial.run() / "checkpoints")]
    must("step-000002" not in saved and "step-000004" in saved, saved)
    must(bits(trial.run()) == undisturbed(trial), "the weights are others")


def full_at_the_end(trial: Trial) -> None:
    full = trial.recipe(**changes("tiny", full_at=[5, 6, 7, 8, 9]))
    ended = trial.type("train", str(full))  # into a pipe, which is never full
    must(ended.code == 1 and "Traceback" not in ended.said, ended.said)
    must("the weights of step 4 could not be saved" in ended.said, ended.said)
    saved = [folder.name for folder in committed(trial.run() / "checkpoints")]
    must(saved[0] == "step-000002" or saved[0] == "step-000003", saved)
    again = trial.train(trial.recipe("room.yaml", **changes("tiny")), "--resume")
    must(again.code == 0 and "resumed after step" in again.said, again.said)
    must([r["step"] for r in step_records(trial.run())] == [1, 2, 3, 4], "steps are missing")
    must(bits(trial.run()) == undisturbed(trial), "the weights are others")


def nobody_reads(trial: Trial) -> None:
    ended = trial.train(trial.recipe(**changes("tiny", hang_up_at=3)))
    must(ended.code == 0, ended)
    must([r["step"] for r in step_records(trial.run())] == [1, 2, 3, 4], "steps are missing")
    must((trial.run() / "report.html").is_file(), "there is no report")
    must(bits(trial.run()) == undisturbed(trial), "the weights are others")


def all_at_once(trial: Trial) -> None:
    def recipe(name: str, **told: Any) -> Path:
        base = {"name": "flow_grpo", "clip_range": 1.0e-3, "beta": 0.1}
        flawed = {"name": "gardo.selftest.faults:Flawed", "base": base, "at": [2, 5]}
        run = {"name": name, "steps": 8}
        return trial.recipe(f"{name}.yaml", **{**changes(name, **told), "run": run,
                                               "algorithm": flawed})  # fmt: skip

    disturbed = recipe("tiny", full_at=[3, 4, 8], hang_up_at=6)
    first = trial.start(disturbed)
    trial.until(lambda: (trial.run() / "metrics.jsonl").is_file(), first)
    second = trial.train(disturbed)
    must(second.code == 2 and "is being trained by" in second.said, second.said)
    (ended,) = first.ended()
    must(ended.code == 0, ended.said)
    must([r["step"] for r in step_records(trial.run())] == [*range(1, 9)], "steps are missing")
    plain = trial.train(recipe("plain"))
    must(plain.code == 0 and bits(trial.run()) == bits(trial.run("plain")), "other weights")


CASES = [
    Case("disk-full-for-a-while", "a full disk during an iteration and the evaluation after it",
         "training goes on; lines wait in memory, the picture and the checkpoint are left out with "
         "a word; the run ends in the bits of one that had room", full_for_a_while),
    Case("disk-full-at-the-end", "the disk is full from the third iteration on",
         "exit 1 with a message; the checkpoints from before are whole, and --resume ends in the "
         "bits of a run that had room", full_at_the_end, quick=False),
    Case("stdout-closed", "whoever read standard output goes away",
         "training goes on in silence to the same bits, report and export", nobody_reads),
    Case("all-at-once", "two bad updates, a full disk twice, a closed standard output and a second "
         "start of the same name",
         "the run ends in the bits of one that had nothing but the bad updates", all_at_once,
         quick=False),
]  # fmt: skip
