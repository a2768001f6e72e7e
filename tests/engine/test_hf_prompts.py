"""Prompts out of data sets of the library `datasets`, in folders; and what is refused without."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from gardo import hf_prompts
from gardo.config import load
from gardo.hf_prompts import dataset_prompts, is_dataset
from gardo.meeting import running
from gardo.settings import FieldError
from tests.engine.config.recipe import refusal, written

ROWS: list[dict[str, Any]] = [
    {"caption": " one red circle ", "weight": 3, "about": {"tag": "counting", "n": [1, 2]}},
    {"caption": "two blue squares", "weight": 1, "about": {"tag": "colors", "n": []}},
    {"caption": "one green triangle", "weight": 1, "about": {"tag": "colors", "n": [4]}},
]


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library; nothing of it is kept beyond the test."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset_prompts.cache_clear()
    return library


def lines(folder: Path, rows: list[dict[str, Any]], name: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_column_is_the_prompts_and_json_columns_their_metadata(
    datasets: Any, tmp_path: Path
) -> None:
    rows = [
        {**row, "when": datetime.datetime(2026, 1, 1), "raw": b"\0", "share": 0.5} for row in ROWS
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    prompts = dataset_prompts(f"hf:{tmp_path / 'set'}", "train", "caption", None)
    assert prompts == tuple(row["caption"].strip() for row in ROWS)
    assert [dict(p.metadata) for p in prompts] == [
        {"weight": row["weight"], "about": row["about"], "share": 0.5} for row in ROWS
    ]


@pytest.mark.parametrize("saved", ["one", "splits", "lines"])
def test_every_way_to_save_one(datasets: Any, tmp_path: Path, saved: str) -> None:
    folder = tmp_path / "set"
    whole = datasets.Dataset.from_list(ROWS)
    if saved == "one":
        whole.save_to_disk(folder)
    elif saved == "splits":
        splits = {"train": whole.select([0]), "test": whole.select([1, 2])}
        datasets.DatasetDict(splits).save_to_disk(folder)
    else:
        lines(lines(folder, ROWS[:1]), ROWS[1:], "test")
    split = "train" if saved == "one" else "test"
    prompts = dataset_prompts(f"hf:{folder}", split, "caption", None)
    assert list(prompts) == [
        row["caption"].strip() for row in (ROWS if saved == "one" else ROWS[1:])
    ]
    if saved != "one":
        with pytest.raises(FieldError, match=r"^data\.split: 'none' of .*split"):
            dataset_prompts(f"hf:{folder}", "none", "caption", None)


def test_what_is_no_prompt_is_named(datasets: Any, tmp_path: Path) -> None:
    folder = lines(tmp_path / "set", [*ROWS, {**ROWS[0], "caption": None}])
    with pytest.raises(FieldError, match=r"^data\.column: 'prompt' is no column of .*caption, wei"):
        dataset_prompts(f"hf:{folder}", "train", "prompt", None)
    with pytest.raises(ValueError, match=r'^row 4 of .*set\': "caption" is null; it must be the'):
        dataset_prompts(f"hf:{folder}", "train", "caption", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FieldError, match=r"^data\.prompts: the data set .*empty' cannot be loaded"):
        dataset_prompts(f"hf:{tmp_path / 'empty'}", "train", "caption", None)


def test_a_recipe_of_a_data_set(datasets: Any, tmp_path: Path) -> None:
    """Beside the recipe, with its weights; ranks compare what is in it."""
    lines(tmp_path / "set", ROWS)
    recipe = load(written(tmp_path, "data: {prompts: 'hf:set', column: caption}"))
    assert recipe.data.prompts == f"hf:{tmp_path / 'set'}"
    assert [(str(p), p.weight) for p in recipe.prompts()] == [
        ("one red circle", 3), ("two blue squares", 1), ("one green triangle", 1)
    ]  # fmt: skip
    before = running(recipe)["data.prompts"]
    lines(tmp_path / "set", ROWS[:2])
    dataset_prompts.cache_clear()
    after = running(load(tmp_path / "recipe.yaml"))["data.prompts"]
    assert before.startswith("prompts with SHA-256 ") and before != after


# ---- without the library -------------------------------------------------------------------------


def test_only_the_mark_makes_a_data_set() -> None:
    assert is_dataset("hf:owner/name") and not is_dataset("owner/name") and not is_dataset(None)


def test_the_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FieldError, match=r"^data\.prompts: needs datasets, which is not here; pip"):
        hf_prompts.dataset_prompts(f"hf:{tmp_path}", "train", "prompt", "asked")


@pytest.mark.parametrize(
    ("fragment", "problem"),
    [
        ("data: {split: test}", "data.split: 'test': is of a data set, and data.prompts is a file"),
        ("data: {column: text}", "data.column: 'text': is of a data set"),
        ("data: {revision: main}", "data.revision: 'main': is of a data set"),
        (
            "evaluate: {prompts: 'hf:owner/name'}",
            "evaluate.prompts: 'hf:owner/name': a data set is for data.prompts; write held_out",
        ),
    ],
)
def test_settings_of_a_data_set_that_is_none(tmp_path: Path, fragment: str, problem: str) -> None:
    path = written(tmp_path, fragment)
    assert refusal(path).startswith(f"{path}: {problem}")


def test_a_hub_id_is_no_path(tmp_path: Path) -> None:
    """A recipe can be planned where the data set is not."""
    recipe = load(written(tmp_path, "data: {prompts: 'hf:owner/name'}"), prompts=False)
    assert recipe.data.prompts == "hf:owner/name"
    pytest.importorskip("datasets")
    path = written(tmp_path, "data: {prompts: 'hf:nowhere'}")
    message = f"{path}: data.prompts: no such folder: '{Path.cwd() / 'nowhere'}'; give a data set's"
    assert refusal(path).startswith(message)


def test_what_a_row_lacks_is_not_there(datasets: Any, tmp_path: Path) -> None:
    """`datasets` gives every row the fields of all: as in a .jsonl file they are absent."""
    rows: list[dict[str, Any]] = [
        {"caption": "a bench", "weight": 2, "include": [{"class": "bench", "count": 1}]},
        {"caption": "a red bench", "include": [{"class": "bench", "color": "red"}], "text": "A"},
    ]
    prompts = dataset_prompts(f"hf:{lines(tmp_path / 'set', rows)}", "train", "caption", None)
    assert [{"caption": str(p), **p.metadata} for p in prompts] == rows
