"""What ranks compare before they join. That two of them do is in the self-test of reliability."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from gardo.config import load
from gardo.meeting import meeting, refuse, running
from gardo.recipe_errors import RecipeError
from tests.engine.config.recipe import written


def test_files_are_compared_by_what_is_in_them(tmp_path: Path) -> None:
    """Machines may have them in other places."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    path = written(here)
    shutil.copytree(here, there)
    mine, theirs = running(load(path)), running(load(there / "recipe.yaml"))
    assert mine == theirs and mine["data.prompts"].startswith("a file with SHA-256 ")
    with open(there / "prompts.txt", "a") as file:
        file.write("\none red circle\n")
    theirs = running(load(there / "recipe.yaml"))
    assert {name for name in mine if mine[name] != theirs[name]} == {"data.prompts"}


def test_every_field_and_every_version_is_compared(tmp_path: Path) -> None:
    mine = running(load(written(tmp_path)))
    theirs = running(load(tmp_path / "recipe.yaml", ["train.optimizer.betas=[0.8, 0.9]"]))
    assert {name for name in mine if mine[name] != theirs[name]} == {"train.optimizer.betas"}
    packages = {"gardo", "python", "torch", "deepspeed", "diffusers", "transformers", "peft"}
    assert all(mine[name][0].isdigit() for name in packages)


def test_one_process_meets_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with meeting(load(written(tmp_path)), "recipe.yaml"):
        assert "MASTER_PORT" not in os.environ  # which a place to meet at would have
    refuse(RecipeError("nobody waits"))
