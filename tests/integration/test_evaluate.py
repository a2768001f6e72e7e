"""`gardo eval` on two ranks: the numbers of one, also where one rank begins and two go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gardo.evaluate import main
from tests.engine.evaluation.test_evaluate import PAGES, PROMPTS, SUITE
from tests.integration.launch import Launched


def evaluate_here(arguments: list[str]) -> int:
    return main(arguments)


def launched(ranks: int, *arguments: object) -> None:
    Launched(ranks, evaluate_here, [str(argument) for argument in arguments]).wait()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "suite.yaml").write_text(SUITE)
    launched(0, "builtin:flux", "--suite", folder / "suite.yaml", "--out", folder / "one")
    return folder


def values(folder: Path) -> dict[str, Any]:
    result = json.loads((folder / "result.json").read_text())
    return {name: one["by_image"] for name, one in result["rewards"].items()}


def test_two_ranks_give_the_numbers_of_one(place: Path) -> None:
    """To the bit: batches are the suite's, and every rank has as many threads."""
    launched(2, "builtin:flux", "--suite", place / "suite.yaml", "--out", place / "two")
    assert values(place / "two") == values(place / "one")
    for name in PAGES:
        assert (place / "two" / name).read_bytes() == (place / "one" / name).read_bytes(), name


def test_two_ranks_go_on_where_one_was_cut(place: Path) -> None:
    """Three batches: the first is there, one of the second is, so two are drawn."""
    cut = place / "cut"
    cut.mkdir()
    lines = (place / "one" / "images.jsonl").read_text().splitlines(keepends=True)
    (cut / "images.jsonl").write_text("".join(lines[: 1 + 5 + 1]))
    # pictures of the first batch, as the cut process had left them
    (cut / "images").mkdir()
    for picture in sorted((place / "one" / "images").iterdir()):
        if int(picture.stem) < 5:
            (cut / "images" / picture.name).write_bytes(picture.read_bytes())
    launched(2, "builtin:flux", "--suite", place / "suite.yaml", "--out", cut)
    for name in PAGES:
        assert (cut / name).read_bytes() == (place / "one" / name).read_bytes(), name


def test_a_refusal_of_the_first_rank_ends_all(place: Path) -> None:
    """The folder has another evaluation, which only the first rank looks into."""
    arguments = ["builtin:flux", "--suite", str(place / "suite.yaml"), "--out", str(place / "one")]
    ends = Launched(2, evaluate_here, [*arguments, "--set", "seed=9"]).ended()
    assert [end.code for end in ends] == [2, 2]
    assert "give another --out, or remove it" in ends[0].said


def test_a_reward_that_one_rank_cannot_load_ends_all(place: Path) -> None:
    """The others would wait for it; the first rank, which speaks for all, says which it was."""
    reward = "rewards.odd={kind: 'tests.engine.evaluation.measured:Uneven', role: held_out}"
    arguments = ["builtin:flux", "--suite", str(place / "suite.yaml"), "--set", reward]
    ends = Launched(2, evaluate_here, [*arguments, "--out", str(place / "odd")]).ended()
    assert [end.code for end in ends] == [2, 2]
    assert "rank 1: rewards.odd: path: no file is here" in ends[0].said
