"""What is said before anything runs: --set, --dry-run, plan --json, --help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from gardo.cli import app
from gardo.cli.common import spread
from tests import ROOT

TINY = ROOT / "recipes/tiny_flux_gardo.yaml"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--set a=1 b.c=2 r.yaml", "--set a=1 --set b.c=2 r.yaml"),
        ("r.yaml --set a=1 --gpus 2 b=3", "r.yaml --set a=1 --gpus 2 b=3"),
        ("--set a=1 --set b=2 c=3 --resume", "--set a=1 --set b=2 --set c=3 --resume"),
        ("--set a=1 ./x=y.yaml", "--set a=1 ./x=y.yaml"),
        ("--set a=[1,2] rewards.a-b.c=x=y", "--set a=[1,2] --set rewards.a-b.c=x=y"),
        ("--set", "--set"),
    ],
)
def test_set_takes_several(typed: str, meant: str) -> None:
    assert spread(typed.split()) == meant.split()


@given(st.lists(st.from_regex(r"[a-z_]+(\.[a-z]+)*=[^\x00]*", fullmatch=True), min_size=1))
def test_set_once_is_set_each_time(fields: list[str]) -> None:
    each = [word for field in fields for word in ("--set", field)]
    assert spread(["--set", *fields]) == spread(each) == each


def gardo(*typed: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command in a new process, where nothing of torch is loaded yet."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels"))
    env = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "gardo.cli", *map(str, typed)],
        cwd=folder, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_dry_run_starts_nothing(tmp_path: Path) -> None:
    sets = ["--set", f"run.folder={tmp_path}", "run.name=x", "train.micro_batch=36"]
    done = gardo("train", TINY, "--gpus", 2, "--dry-run", *sets)
    assert (done.returncode, done.stderr) == (0, "")
    run, command, *_, nothing = done.stdout.splitlines()
    assert run == f"run      {tmp_path}/x: new" and "nothing was started" in nothing
    assert "deepspeed.launcher.launch" in command and "--set run.name=x" in command
    assert not [*tmp_path.iterdir()]


def test_a_dry_run_refuses_what_a_run_refuses(tmp_path: Path) -> None:
    done = gardo("train", TINY, "--dry-run", "--set", "data.prompts_per_step=7", "--gpus", 2)
    assert done.returncode == 2 and "train.micro_batch: 72 does not divide" in done.stderr


def test_a_plan_as_data_says_what_the_page_says() -> None:
    said = CliRunner().invoke(app, ["plan", str(TINY), "--gpus", "2", "--json"])
    page = CliRunner().invoke(app, ["plan", str(TINY), "--gpus", "2"]).output
    plan = json.loads(said.stdout)
    assert said.exit_code == 0 and plan["fits"] and plan["advice"] == []
    assert f"peak {plan['peak_bytes'] / 1e9:.1f} GB of 80.0, in phase {plan['peak_phase']}" in page
    stays = sum(plan["stays"].values())
    assert plan["peak_bytes"] == max(phase["peak_bytes"] for phase in plan["phases"].values())
    assert 0 < stays < plan["peak_bytes"] < plan["gpu_bytes"] == 80_000_000_000
    batch = plan["images_a_gpu"], plan["updates"], plan["micro_batches"], plan["micro_batch"]
    assert "each GPU: {} images, {} updates of {} micro-batches of {} rows".format(*batch) in page


def test_what_does_not_fit_has_a_peak_above_its_room() -> None:
    said = CliRunner().invoke(app, ["plan", str(TINY), "--gpus", "1", "--json",
                                    "--gpu-memory", "0.9GB"])  # fmt: skip
    plan = json.loads(said.stdout)
    assert said.exit_code == 1 and not plan["fits"] and plan["peak_bytes"] > plan["gpu_bytes"]
    assert plan["advice"] == [] and plan["advice_peak_bytes"] is None, "CUDA alone takes more"


COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_quick(command: str | None) -> None:
    """Under half a second on a quiet machine (docs/reference/cli.md); torch would take seconds."""
    began = time.monotonic()
    done = gardo(*filter(None, [command]), "--help")
    assert done.returncode == 0 and "Usage:" in done.stdout and done.stderr == ""
    assert time.monotonic() - began < 5


def test_help_says_the_exit_codes_and_the_shell_completes_commands() -> None:
    said = CliRunner().invoke(app, ["--help"]).output
    for code in ("0: done", "124: a run hung", "128 + n"):
        assert code in " ".join(said.replace("│", " ").split())
    env = {"_TYPER_COMPLETE_ARGS": "gardo doct", "_GARDO_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", "from gardo.cli import app; app(prog_name='gardo')"],
        env={**os.environ, **env, "COMP_WORDS": "gardo doct", "COMP_CWORD": "1",
             "PYTHONPATH": f"{ROOT}/engine:{ROOT}/kernels"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["doctor"], done.stderr


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in {"rewards", "prompts"}])
def test_every_command_has_an_example(command: str) -> None:
    said = get_command(app).commands[command].help or ""  # type: ignore[attr-defined]
    assert f"\n    gardo {command}" in said or f"\ngardo {command}" in said
