"""Files of pairs: what they say, what is wrong with them, which of them are held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gardo.fitting import pairs as of_pairs
from gardo.fitting.pairs import Pair, load_pairs, split
from tests.engine.fitting import drawn


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return drawn.write(tmp_path, 24, 6)


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rewrite(file: Path, lines: list[Any]) -> None:
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))


def test_a_file_is_read(file: Path):
    lines = lines_of(file)
    lines[0] |= {"preferred": "tie", "rater": "ann"}
    lines[1] |= {"preferred": 0.25, "margin": 2}
    lines[2] |= {"preferred": 0.5, "first": str(file.parent / "4.png")}
    rewrite(file, ["", *lines, ""])
    found, sizes = load_pairs(file)
    assert [p.line for p in found] == list(range(2, 26))
    assert [(p.preferred, p.tied, p.margin) for p in found[:3]] == [
        (0.5, True, None), (0.25, False, 2), (0.5, False, None)
    ]  # fmt: skip
    assert found[2].first == file.parent / "4.png" and found[3].prompt == "prompt 3"
    assert len(sizes) == 48 and set(sizes.values()) == {(32, 32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preferred": "left"}, 'preferred: "left"; write first, second, tie, or a number'),
        ({"preferred": 1.5}, "preferred: 1.5; write first"),
        ({"preferred": True}, "preferred: true; write first"),
        ({"preferred": None}, "preferred: null; write first"),
        ({"first": 3}, "first: 3; write the path of a picture"),
        ({"second": ""}, 'second: ""; write the path of a picture'),
        ({"first": "gone.png"}, "first: no such file: '.*gone.png'"),
        ({"first": "pairs.jsonl"}, "first: '.*pairs.jsonl' is no picture"),
        ({"first": "empty.png"}, "first: '.*empty.png' is no picture"),
        ({"second": "2.png"}, "second: '2.png' is the first; a pair is two pictures"),
        ({"margin": -1}, "margin: -1; write a number of log-odds from 0 on"),
        ({"margin": "big"}, 'margin: "big"; write a number'),
        ({"prompt": " "}, '"prompt" is " "; it must be the text to draw'),
        ("{", "is not JSON"),
        ("[]", "is no JSON object"),
        ('{"prompt": "x", "prompt": "y"}', '"prompt" stands twice'),
    ],
)
def test_what_is_wrong_is_named_with_its_line(file: Path, change: Any, message: str):
    (file.parent / "empty.png").touch()
    lines: list[Any] = lines_of(file)
    lines[1] = change if isinstance(change, str) else lines[1] | change
    rewrite(file, lines)
    with pytest.raises(ValueError, match=f"^'.*pairs.jsonl', line 2: .*{message}"):
        load_pairs(file)


@pytest.mark.parametrize("field", ["prompt", "first", "second", "preferred"])
def test_what_is_missing_is_named(file: Path, field: str):
    lines = lines_of(file)
    del lines[4][field]
    rewrite(file, lines)
    with pytest.raises(ValueError, match=rf"line 5: .*({field}: missing|no \"prompt\")"):
        load_pairs(file)


def test_a_file_that_is_not_there_too_short_or_undecided(file: Path):
    with pytest.raises(ValueError, match=r"^no such file: 'none.jsonl'; give one JSON object"):
        load_pairs(Path("none.jsonl"))
    lines = lines_of(file)
    rewrite(file, lines[:3])
    with pytest.raises(ValueError, match="has 3 pairs; give at least 20"):
        load_pairs(file)
    rewrite(file, [line | {"preferred": "tie"} for line in lines])
    with pytest.raises(ValueError, match="prefers nothing: every pair is a tie"):
        load_pairs(file)


def test_a_picture_that_is_too_large_is_refused_by_its_header(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(of_pairs, "LONGEST", 31)
    with pytest.raises(ValueError, match=r"line 1: first: .* 32 x 32 pixels; at most 31 a side"):
        load_pairs(file)


# ---- the split -----------------------------------------------------------------------------------


def made(prompts: list[str]) -> list[Pair]:
    return [
        Pair(text, Path(f"{i}.a"), Path(f"{i}.b"), 1.0, False, None, i)
        for i, text in enumerate(prompts)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_is_on_one_side(seed: int):
    pairs = made([f"p{i % 17}" for i in range(200)])
    found = split(pairs, 0.25, seed)
    train, held_out = ({pairs[i].prompt for i in part} for part in (found.train, found.held_out))
    assert not train & held_out and len(train | held_out) == 17 and found.by == "prompt"
    assert sorted(found.train + found.held_out) == list(range(200))
    assert 50 <= len(found.held_out) <= 62


def test_the_split_is_of_the_seed_and_the_texts_not_of_the_order():
    pairs = made([f"p{i}" for i in range(50)])
    held = {pairs[i].prompt for i in split(pairs, 0.2, 3).held_out}
    turned = pairs[::-1]
    assert {turned[i].prompt for i in split(turned, 0.2, 3).held_out} == held
    assert {pairs[i].prompt for i in split(pairs, 0.2, 4).held_out} != held


def test_one_prompt_is_divided_by_pair_and_says_so():
    found = split(made(["p"] * 40), 0.1, 0)
    assert found.by == "pair" and len(found.held_out) == 4 and len(found.train) == 36


def test_something_stays_to_train_on():
    found = split(made(["p"] * 30 + ["q"]), 0.99, 0)
    assert found.train and found.held_out
