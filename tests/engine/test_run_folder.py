"""A run's id: made once, kept in its folder, gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gardo.recipe_errors import RecipeError
from gardo.run_folder import keep_id, run_id


def test_a_run_keeps_its_id(tmp_path: Path) -> None:
    assert run_id(tmp_path) is None
    made = keep_id(tmp_path, None)
    assert run_id(tmp_path) == made != keep_id(tmp_path, None)  # a new run in an old one's place
    file = tmp_path / "run.json"
    before = file.read_bytes()
    assert keep_id(tmp_path, run_id(tmp_path)) == json.loads(before)["id"]
    assert file.read_bytes() == before  # also when it started
    file.unlink()
    assert keep_id(tmp_path, "of its checkpoints") == run_id(tmp_path) == "of its checkpoints"


@pytest.mark.parametrize("text", ["", "[]", '{"started": "now"}', "null"])
def test_an_id_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RecipeError, match=r"run\.json: the run's id cannot be read .*; remove the"):
        run_id(tmp_path)
