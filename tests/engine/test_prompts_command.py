"""`gardo prompts`: files that the rewards can read, the same ones for the same arguments."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gardo.cli import app
from gardo.data import load_prompts
from gardo.rewards import caption_prompts, geneval_prompts, ocr_prompts
from gardo.rewards.geneval_metadata import request_of
from gardo.rewards.ocr import target_of
from gardo.rewards.ocr_prompts import plain
from gardo.types import Prompt


def written(folder: Path, *arguments: str) -> list[Prompt]:
    out = folder / "out.jsonl"
    done = CliRunner().invoke(app, ["prompts", *arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert f"{out}: " in done.output.replace("\n", "")
    return load_prompts(out)


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["prompts", *arguments])
    assert done.exit_code == 2
    return done.stderr.strip()


@pytest.mark.parametrize("kind", ["ocr", "geneval", "captions"])
def test_files_are_the_same_for_the_same_seed(tmp_path: Path, kind: str) -> None:
    held_out = tmp_path / "kept.jsonl"
    kept = ("--held-out", str(held_out))
    first = written(tmp_path, kind, "--count", "80", *kept)
    assert len(first) == len(set(first)) == 80
    others = load_prompts(held_out)
    assert len(set(others)) == 8 and not set(others) & set(first)
    assert written(tmp_path, kind, "--count", "80", *kept) == first
    assert load_prompts(held_out) == others
    assert set(written(tmp_path, kind, "--count", "80", "--seed", "1")) != set(first)
    written(tmp_path, kind, "--count", "5", *kept, "--held-out-count", "7")
    assert len(load_prompts(held_out)) == 7


# ---- ocr -----------------------------------------------------------------------------------------


def test_the_reward_reads_what_the_text_says(tmp_path: Path) -> None:
    """From the quotes and from the metadata alike."""
    held_out = tmp_path / "kept.jsonl"
    prompts = written(tmp_path, "ocr", "--count", "400", "--held-out", str(held_out))
    every = prompts + load_prompts(held_out)
    targets = [target_of(prompt) for prompt in every]
    assert [target_of(Prompt(str(prompt))) for prompt in every] == targets
    assert len(set(targets)) == len(every), "no text comes twice, in the other file neither"
    assert {str(p).replace(p.metadata["text"], "{text}") for p in prompts} == set(
        ocr_prompts.TEMPLATES
    )


def test_texts_are_of_all_kinds() -> None:
    texts = ocr_prompts.texts(600, 7)
    shares = {
        "several words": sum(text.count(" ") > 1 for text in texts),
        "digits": sum(any(c.isdigit() for c in text) for text in texts),
        "mixed case": sum(
            " " not in text and text not in (text.upper(), text.lower(), text.capitalize())
            for text in texts
        ),
        "one word": sum(plain(text) in ocr_prompts.WORDS for text in texts),
    }
    assert all(60 <= share <= 300 for share in shares.values()), shares
    assert all(text == " ".join(text.split()) and '"' not in text for text in texts)


def test_words_run_out_and_texts_do_not() -> None:
    texts = ocr_prompts.texts(20_000, 1)
    assert len({plain(text) for text in texts}) == 20_000
    assert sum(plain(text) in ocr_prompts.WORDS for text in texts) <= len(ocr_prompts.WORDS)
    assert len(set(ocr_prompts.WORDS)) == len(ocr_prompts.WORDS)


# ---- geneval -------------------------------------------------------------------------------------


def test_tasks_have_equal_shares_as_far_as_they_can(tmp_path: Path) -> None:
    def tags(*arguments: str) -> dict[str, int]:
        prompts = written(tmp_path, "geneval", *arguments)
        assert all(request_of(p).task == p.metadata["tag"] for p in prompts)
        found = [p.metadata["tag"] for p in prompts]
        return {tag: found.count(tag) for tag in sorted(set(found))}

    assert tags("--count", "120") == dict.fromkeys(sorted(geneval_prompts.TASKS), 20)
    # single_object has 80 classes and counting three numbers of them; the others share the rest
    many = tags("--count", "1800")
    assert (many["single_object"], many["counting"]) == (80, 240)
    assert sum(many.values()) == 1800 and set(many.values()) == {80, 240, 370}
    two = ("--task", "colors", "--task", "position")
    assert tags("--count", "9", *two) == {"colors": 5, "position": 4}
    numbers = written(tmp_path, "geneval", "--count", "60", "--task", "counting", "--number", "7")
    assert {request_of(prompt).objects[0].count for prompt in numbers} == {7}


def test_the_first_of_a_file_are_of_all_tasks(tmp_path: Path) -> None:
    """An evaluation takes the first so many."""
    held_out = tmp_path / "kept.jsonl"
    written(tmp_path, "geneval", "--count", "900", "--held-out", str(held_out))
    first = [prompt.metadata["tag"] for prompt in load_prompts(held_out)[:64]]
    assert len(set(first)) >= 5 and max(map(first.count, first)) < 32


# ---- captions ------------------------------------------------------------------------------------


def expansions(rule: str) -> int:
    """How many texts a rule of the grammar can become, if words might come twice."""
    return sum(
        math.prod(expansions(name) for name in caption_prompts.RULE.findall(one) if name != "it")
        for one in caption_prompts.grammar()[rule]
    )


def test_the_grammar_is_whole() -> None:
    """Every rule that is named is there, none is never named, and none has an alternative twice."""
    rules = caption_prompts.grammar()
    named = {name for every in rules.values() for one in every for name in
             caption_prompts.RULE.findall(one)}  # fmt: skip
    assert (named - {"it"}) | {*caption_prompts.SHOWN, *caption_prompts.SHOWN.values()} == {*rules}
    assert all(len(set(every)) == len(every) > 1 and all(every) for every in rules.values())
    share = caption_prompts.MOST / len(caption_prompts.KINDS)
    assert min(expansions(kind) for kind in caption_prompts.KINDS) > 10 * share


def test_captions_are_of_all_kinds_in_plain_english(tmp_path: Path) -> None:
    prompts = written(tmp_path, "captions", "--count", "1100", "--seed", "3")
    tags = [prompt.metadata["tag"] for prompt in prompts]
    assert {tag: tags.count(tag) for tag in set(tags)} == dict.fromkeys(caption_prompts.KINDS, 100)
    for prompt in prompts:
        assert re.fullmatch(r"[A-Za-z0-9 ,'-]+", prompt), prompt
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |\b(\w+) \1\b| ,", prompt), prompt
        assert 3 < len(prompt.split()) < 50


def test_no_two_captions_show_the_same_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the medium, the light and the camera they still differ, in both files."""
    plain = dict.fromkeys(caption_prompts.KINDS, "it")
    monkeypatch.setattr(caption_prompts, "SHOWN", plain)
    trained, held_out = caption_prompts.prompts(3000, 5, 300)
    assert len({one["prompt"] for one in trained + held_out}) == 3300


# ---- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_written(tmp_path: Path) -> None:
    out = str(tmp_path / "out.jsonl")
    few = ("ocr", "--count", "3", "--out")
    assert refused(*few, "prompts.txt") == (
        "--out prompts.txt: it holds JSON lines; call it prompts.jsonl"
    )
    assert refused(*few, out, "--held-out", out) == (
        f"--held-out {out}: that is --out; give another file"
    )
    assert refused(*few, out, "--held-out-count", "3").startswith("--held-out-count 3: give --held")
    nowhere = str(tmp_path / "none" / "out.jsonl")
    assert refused(*few, nowhere) == f"--out {nowhere}: No such file or directory; give another"
    assert refused("ocr", "--count", "1000001", "--out", out) == (
        "count: 1000001 prompts; at most 1000000"
    )
    assert refused("captions", "--count", "20000", "--out", out, "--held-out", out + "l.jsonl") == (
        "count: 22000 prompts; at most 20000"
    )
    assert refused("geneval", "--count", "241", "--task", "counting", "--out", out) == (
        "count: counting can ask 240 things, not 241"
    )
    assert refused("geneval", "--count", "3", "--task", "colours", "--out", out) == (
        "'colours' is not a task of GenEval's; did you mean 'colors'?"
    )
    assert refused("geneval", "--count", "3", "--number", "16", "--out", out).startswith(
        "numbers: ["
    )
    assert not list(tmp_path.iterdir())


def test_lines_are_json(tmp_path: Path) -> None:
    written(tmp_path, "ocr", "--count", "3")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [sorted(json.loads(line)) for line in lines] == [["prompt", "text"]] * 3
