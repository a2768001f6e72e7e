"""Recipes that are wrong, hostile, or differ between ranks."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from gardo.selftest.case import Case, must
from gardo.selftest.forked import Ended, Launched
from gardo.selftest.trial import Trial, listing

ZERO = {"engine": "zero", "stage": 1, "threads": 1}


def refused(trial: Trial, ended: Ended, *said: str) -> None:
    """Exit code 2, one message with all that must be `said`, no traceback, nothing written."""
    must(ended.code == 2, f"exit code {ended.code}: {ended.said}")
    must("Traceback" not in ended.said, ended.said)
    must(all(text in ended.said for text in said), f"{said} are not in: {ended.said}")
    written = [name for name in listing(trial.folder) if "/runs/" in name]
    must(not written, f"written: {written}")


def _of_its_own(recipes: list[str]) -> int:
    from gardo.train import main

    return main([recipes[int(os.environ["RANK"])]])


def each(trial: Trial, *recipes: Path, timeout: float = 60.0) -> list[Ended]:
    """One rank for each recipe, all in one launch."""
    return Launched(len(recipes), _of_its_own, [str(r) for r in recipes]).ended(timeout)


# ---- ranks that differ ---------------------------------------------------------------------------


def other_seed(trial: Trial) -> None:
    one = trial.recipe("one.yaml", distributed=ZERO)
    other = trial.recipe("other.yaml", distributed=ZERO, run={"seed": 8})
    first, second = each(trial, one, other)
    must(second.code == 2, f"exit code {second.code}: {second.said}")
    refused(trial, first, "run.seed: 7 on rank 0, 8 on rank 1")


def other_prompts(trial: Trial) -> None:
    (trial.folder / "there").mkdir()
    (trial.folder / "there" / "prompts.txt").write_text("one blue circle\n", encoding="utf-8")
    one = trial.recipe("one.yaml", distributed=ZERO)
    other = trial.recipe("there/one.yaml", distributed=ZERO)
    first, second = each(trial, one, other)
    must(second.code == 2, f"exit code {second.code}: {second.said}")
    refused(trial, first, "data.prompts: 'a file with SHA-256", "on rank 1")


def one_refused(trial: Trial) -> None:
    good = trial.recipe("good.yaml", distributed=ZERO)
    bad = trial.recipe("bad.yaml", distributed=ZERO, run={"steps": 0})
    for recipes, who in (((good, bad), 1), ((bad, good), 0)):
        everyone = each(trial, *recipes)
        must([one.code for one in everyone] == [2, 2], everyone)
        refused(trial, everyone[0], "run.steps: 0: input should be greater")
        must(who == 0 or "rank 1 cannot run" in everyone[0].said, everyone[0].said)


def taken_port(trial: Trial) -> None:
    recipe = trial.recipe(distributed=ZERO)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        first = Launched(2, _at_port, port, str(recipe))
        try:
            first.processes[0].join(60)
            said, code = first.said(0), first.processes[0].exitcode
        finally:
            first.kill()
    refused(trial, Ended(-99 if code is None else code, said), f"127.0.0.1:{port}", "MASTER_PORT")


def _at_port(port: str, recipe: str) -> int:
    from gardo.train import main

    os.environ["MASTER_PORT"] = port
    return main([recipe])


CASES = [
    Case(
        "another-seed-on-a-rank",
        "two ranks start with recipes that differ in a seed",
        "both end with 2 before a model loads, and name the field and both values",
        other_seed,
    ),
    Case(
        "other-prompts-on-a-rank",
        "two ranks find files of the same name with other prompts in them",
        "both end with 2 before a model loads, and name the file's field",
        other_prompts,
    ),
    Case(
        "one-rank-refused",
        "the recipe of one of two ranks is refused",
        "the other one hears of it and ends with 2 as well, instead of waiting for it",
        one_refused,
    ),
    Case(
        "a-port-that-is-taken",
        "another program listens at MASTER_PORT",
        "the first rank ends with 2 before a model loads, and names the port",
        taken_port,
    ),
]
