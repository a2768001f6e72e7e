"""The acceptance of several GPUs, rehearsed on CPU ranks over gloo."""

from __future__ import annotations

import csv
import os
import subprocess
from pathlib import Path

import pytest

from cluster.acceptance import main, run_all
from cluster.cases import RECIPE, Case, Plan, cases
from gardo.config import load
from gardo.planner import geometry
from gpu_campaign import FACTS
from tests import ROOT
from tests.integration.launch import environment

MODELS = (None, "black-forest-labs/FLUX.1-dev")


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("model", MODELS)
def test_every_case_is_a_recipe_that_fits(
    gpus: int, model: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    plan, every = Plan(gpus, model), cases(gpus)
    assert len({case.name for case in every}) == len(every)
    for case in every:
        assert case.gpus <= gpus
        recipe = load(RECIPE, [*plan.sets, *case.sets])
        geometry(recipe, rank=0, world=case.gpus)
        assert recipe.model.path == (model or "builtin:flux")


def rehearsed(folder: Path, *only: str) -> dict[str, dict[str, str]]:
    """The rows of cluster.csv for these cases, by the script as its user types it."""
    paths = os.pathsep.join(["engine", "kernels", "benchmarks"])
    env = {**environment(), "PYTHON": "python", "PYTHONPATH": paths}
    script = ROOT / "benchmarks" / "cluster_acceptance.sh"
    done = subprocess.run(
        [str(script), "--gpus", "2", "--quick", "--out", str(folder), "--only", *only],
        env=env, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == str(folder / "cluster.csv")
    with (folder / "cluster.csv").open(newline="") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def test_collectives_are_timed(tmp_path: Path) -> None:
    (row,) = rehearsed(tmp_path, "bandwidth").values()
    assert row["result"] == "passed" and row["gpus"] == "2" and "deepspeed" in row["versions"]
    assert row["detail"].startswith("all-gather ") and row["detail"].endswith("GB/s, gloo")


@pytest.mark.full
def test_training_and_resumes_of_runs_that_were_cut(tmp_path: Path) -> None:
    cut = ("resume", "asked")
    rows = rehearsed(tmp_path, "gpus-2", *cut, "gradients", "hpz-2", "overlap-false")
    assert {row["result"] for row in rows.values()} == {"passed"} and len(rows) == 6
    stage, error, *_ = rows["gradients"]["detail"].split()
    assert stage == "stage-3-overlap:" and float(error) < 1e-5
    for row in (rows[name] for name in rows if name != "gradients"):
        seconds, rate = float(row["seconds_per_iteration"]), float(row["images_per_second"])
        assert seconds > 0 and rate == pytest.approx(8 / seconds, rel=0.01)
    for name in cut:
        assert rows[name]["detail"].endswith("of 2: all 8 files have the same bits")


def test_a_case_that_fails_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    wrong = Case("wrong", "a test's", 1, ("run.stepz=1",))
    facts = {**dict.fromkeys(FACTS, "x"), "gpu": ""}
    rows = run_all(
        [wrong, wrong, cases(1)[0]], Plan(1, quick=True), tmp_path, limit=300, again=False,
        facts=facts,
    )  # fmt: skip
    assert [row["result"] for row in rows] == ["failed", "failed", "passed"]
    assert "unknown field. Did you mean run.steps?" in rows[0]["detail"]
    assert "seconds_per_iteration" not in rows[0]
    assert (tmp_path / "cluster.csv").read_text().count("\n") == 4
    assert (tmp_path / "wrong" / "log.txt").read_text().count("stepz") == 1, "it was tried again"


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--gpus", "8", "--list"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("\n") == len(cases(8)) and "gpus-8               8 GPUs" in listed
    for arguments, message in (
        (["--gpus", "0"], "set DS_ACCELERATOR=cpu and give --gpus 2"),
        (["--gpus", "1", "--only", "gpus-2"], "--only: gpus-2: none of bandwidth, gpus-1"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
