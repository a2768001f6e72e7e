"""recipes/prompts: what its README says made the files makes the same bytes again."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gardo.cli import app
from gardo.data import load_prompts
from gardo.rewards.geneval_metadata import request_of
from gardo.rewards.ocr import target_of
from tests import ROOT
from tests.docs.shell import blocks

FOLDER = ROOT / "recipes/prompts"
FILES = sorted(FOLDER.glob("*.jsonl"))
COMMANDS = [command for block in blocks(FOLDER / "README.md") for command in block.commands]


def test_the_files_are_what_their_commands_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for program, *words in COMMANDS:
        assert program == "gardo"
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
    assert [path.name for path in sorted(tmp_path.iterdir())] == [path.name for path in FILES]
    for path in FILES:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_what_is_held_out_is_not_trained_on(path: Path) -> None:
    prompts = load_prompts(path)
    assert len(prompts) == len(set(prompts)) in (200, 2000)
    if not path.stem.endswith("_held_out"):
        held_out = load_prompts(path.with_stem(f"{path.stem}_held_out"))
        assert not {*map(str.lower, prompts)} & {*map(str.lower, held_out)}


@pytest.mark.parametrize("name", ["ocr", "ocr_held_out"])
def test_every_text_can_be_looked_for(name: str) -> None:
    for prompt in load_prompts(FOLDER / f"{name}.jsonl"):
        assert prompt.metadata["text"] in prompt and target_of(prompt)


@pytest.mark.parametrize("name", ["geneval", "geneval_held_out"])
def test_every_task_can_be_judged(name: str) -> None:
    for prompt in load_prompts(FOLDER / f"{name}.jsonl"):
        assert request_of(prompt).task == prompt.metadata["tag"]
