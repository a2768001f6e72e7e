"""What a run goes on from: other settings, lost and damaged files, folders with other names."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from gardo.distributed.saved import committed
from gardo.report.metrics_log import step_records
from gardo.selftest.case import Case, must
from gardo.selftest.trial import Trial, bits

GARDO: dict[str, Any] = {
    "name": "gardo",
    "base": {"name": "flow_grpo", "clip_range": 1.0e-3, "beta": 0.1},
}
REWARDS = {"tiny_shape": {"role": "proxy"}, "tiny_purity": {"role": "auxiliary"}}


def run(trial: Trial, **changes: Any) -> Path:
    """Two iterations; their folder."""
    ended = trial.train(trial.recipe(run={"steps": 2}, **changes))
    must(ended.code == 0, ended.said)
    return trial.run()


def resumed(trial: Trial, *said: str, **changes: Any) -> str:
    """Two more; all of `said` is in what they print, which is given back."""
    steps = {"steps": 4}
    ended = trial.train(trial.recipe("more.yaml", run=steps, **changes), "--resume")
    must(ended.code == 0, ended.said)
    for text in said:
        must(text in ended.said, f"{text!r} is not in: {ended.said}")
    return ended.said


def other_evaluation(trial: Trial) -> None:
    run(trial)
    said = "evaluations are not those of before: changes count from the next one on"
    resumed(trial, said, evaluate={"prompt_count": 3})


def gate_added(trial: Trial) -> None:
    run(trial, algorithm=GARDO, rewards=REWARDS)
    gate = {"fraction": 0.5, "limits": [0.1, 0.5]}
    resumed(trial, "algorithm.gate", algorithm={**GARDO, "gate": gate}, rewards=REWARDS)


def damaged_line(trial: Trial) -> None:
    log = run(trial) / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([lines[0], b"\0" * 40 + b"\n", *lines[2:]]))
    resumed(trial, "left out: line 2", "nothing of step 1")
    must([r["step"] for r in step_records(trial.run())] == [2, 3, 4], "other lines were lost")
    (trial.run() / "report.html").unlink()
    ended = trial.type("report", str(trial.run()))
    must(ended.code == 0 and "left out: line 2" in ended.said, ended.said)


def lost_files(trial: Trial) -> None:
    folder = run(trial)
    log = folder / "metrics.jsonl"
    log.write_bytes(log.read_bytes().splitlines(keepends=True)[0])
    (folder / "recipe.yaml").unlink()
    resumed(trial, f"{log}: nothing of step 1-2", "recipe.yaml is not there")
    must((folder / "recipe.yaml").is_file(), "recipe.yaml is not there again")


def renamed(trial: Trial) -> None:
    folder = run(trial) / "checkpoints"
    (folder / "step-000001").rename(folder / "step-000009")
    resumed(trial, "this is step-000001; rename it", "resumed after step 2")
    names = sorted(path.name for path in folder.iterdir())
    must(not any("broken" in name for name in names), names)
    must(any(name.startswith("step-000009.misnamed-") for name in names), names)


def exported_while_it_runs(trial: Trial) -> None:
    recipe = trial.recipe(run={"steps": 400}, checkpoint={"every": 1, "keep": 1})
    running = trial.start(recipe)
    try:
        while not committed(trial.run() / "checkpoints"):
            must(running.processes[0].is_alive(), running.said())
            time.sleep(0.2)
        for attempt in range(3):
            ended = trial.type("export", str(trial.run()), "--out", str(trial.folder / "out"))
            must(ended.code == 0, f"export {attempt + 1}: {ended.said}")
        must(running.processes[0].is_alive(), "the run ended too early to tell")
    finally:
        running.kill()
        running.ended()
    must(not list(trial.run().glob(".export-*")), "links were left behind")


def killed(trial: Trial) -> None:
    """By SIGKILL, once in each of its first three iterations."""
    recipe = trial.recipe(run={"steps": 4})
    for step in (1, 2, 3):
        running = trial.start(recipe, "--resume")
        while f"step {step}/4" not in running.said():
            must(running.processes[0].is_alive(), running.said())
            time.sleep(0.02)
        running.kill(signal.SIGKILL)
        running.ended()
    ended = trial.train(recipe, "--resume")
    must(ended.code == 0 and "resumed after step" in ended.said, ended.said)
    plain = trial.train(trial.recipe("plain.yaml", run={"name": "plain", "steps": 4}))
    must(plain.code == 0 and bits(trial.run()) == bits(trial.run("plain")), "other bits")


CASES = [
    Case("killed", "SIGKILL in each of the first three iterations, --resume after each",
         "the run ends in the bits of one that was left alone", killed),
    Case("other-evaluation", "--resume with another evaluate.prompt_count",
         "training goes on; changes are counted anew, and that is said", other_evaluation),
    Case("gate-added", "--resume with a gate that was not there",
         "the gate begins; the change is logged", gate_added),
    Case("damaged-log", "a line of metrics.jsonl is damaged",
         "--resume and report leave it out, say so, and keep all others", damaged_line),
    Case("lost-files", "lines of metrics.jsonl and recipe.yaml are gone",
         "--resume says so and goes on", lost_files),
    Case("renamed-checkpoint", "a checkpoint's folder gets another step's name",
         "it is passed over and set aside by name; no other one is called broken", renamed),
    Case("export-while-running", "gardo export of a run that keeps one checkpoint and goes on",
         "every export succeeds, and leaves nothing in the run's folder", exported_while_it_runs,
         quick=False),
]  # fmt: skip
