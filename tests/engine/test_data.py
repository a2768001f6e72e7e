"""Prompt files and what is wrong with them; which prompts a step uses."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gardo.data import MAX_BYTES, MAX_PROMPTS, load_prompts, step_prompts
from gardo.types import Prompt


@pytest.mark.parametrize(
    "content",
    [
        b"a red circle\ntwo blue squares\n",
        b"a red circle\r\ntwo blue squares",
        b"\n  a red circle \n\n\t\ntwo blue squares\n\n",
        b"\xef\xbb\xbfa red circle\ntwo blue squares\n",  # the mark that Windows editors put first
    ],
)
def test_lines_are_prompts(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert load_prompts(path) == ["a red circle", "two blue squares"]


def test_any_script_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("ein großes Haus\n一只猫\nnaïve ☕\n", encoding="utf-8")
    assert load_prompts(path) == ["ein großes Haus", "一只猫", "naïve ☕"]


def test_missing_file(tmp_path):
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(ValueError, match=r"no such file.*one prompt a line") as caught:
            load_prompts(path)
        assert path.name in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n\t\r\n"])
def test_empty_file(tmp_path, content):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"prompts\.txt.*is empty; write one prompt a line"):
        load_prompts(path)


def test_file_in_another_encoding(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt.*not UTF-8 \(byte 3\).*save it as UTF-8"):
        load_prompts(path)


def test_files_that_are_no_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\x7fELF\x02\x01\0\0")
    with pytest.raises(ValueError, match=r"prompts\.txt' is no text: it has a NUL in it"):
        load_prompts(path)
    path.write_bytes(b"\n" * (MAX_PROMPTS + 1))
    with pytest.raises(ValueError, match=r"prompts\.txt' has more than 1000000 lines; split it"):
        load_prompts(path)
    with open(path, "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(ValueError, match=r"prompts\.txt' is larger than 64 MiB; split it"):
        load_prompts(path)
    with pytest.raises(ValueError, match="no such file"):
        load_prompts(tmp_path / ("x" * 300))


# ---- one JSON object a line ----------------------------------------------------------------------

BENCHES = {"tag": "counting", "include": [{"class": "bench", "count": 3}]}


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.JSONL"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n \n"])
def test_objects_are_prompts_with_metadata(tmp_path, name, end):
    path = tmp_path / name
    lines = [
        json.dumps({**BENCHES, "prompt": "  three benchs "}),
        json.dumps({"prompt": "two\nlines ☕"}, ensure_ascii=False),
        # U+2028 ends no line in JSON, though Python's splitlines() thinks so
        json.dumps({"prompt": "a sign", "text": "up\u2028down"}, ensure_ascii=False),
    ]
    path.write_bytes(("\ufeff" + end.join(lines) + end).encode())
    prompts = load_prompts(path)
    assert prompts == ["three benchs", "two\nlines ☕", "a sign"]
    assert [p.metadata for p in prompts] == [BENCHES, {}, {"text": "up\u2028down"}]


def test_lines_of_text_have_no_metadata(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text('{"prompt": "a"}\n')
    (prompt,) = load_prompts(path)
    assert prompt == '{"prompt": "a"}' and prompt.metadata == {}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("two red circles", "two red circles is not JSON (column 1: Expecting value); write one"),
        ('{"prompt": "a"', '{"prompt": "a" is not JSON (column 15: Expecting \',\' delimiter)'),
        ('["a"]', '["a"] is no JSON object; write one object a line, such as {"prompt": '),
        ('"a"', '"a" is no JSON object'),
        ('{"text": "a"}', '{"text": "a"} has no "prompt"'),
        ('{"prompt": 3}', '"prompt" is 3; it must be the text to draw'),
        ('{"prompt": null}', '"prompt" is null'),
        ('{"prompt": " "}', '"prompt" is " "'),
        ('{"prompt": "a", "tag": 1, "tag": 2}', '"tag" stands twice; keep one'),
        ('{"prompt": "a", "x": {"y": 1, "y": 1}}', '"y" stands twice'),
        ('{"prompt": "a", "x": NaN}', "NaN is not JSON; write a number, or null"),
        ('{"prompt": "\\ud83d"}', '"prompt" is "\\ud83d": one \\u escape of a pair is missing'),
        ('{"prompt": ' + "[" * 99999, "is nested too deeply"),
        ("x" * 99, f"{'x' * 60}... is not JSON"),
    ],
)
def test_a_line_that_is_no_prompt_is_explained(tmp_path, line, problem):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a red circle"}}\n\n{line}\n')
    with pytest.raises(ValueError) as caught:
        load_prompts(path)
    start = f"{str(path)!r}, line 3: "
    assert str(caught.value).startswith(start)
    assert problem in str(caught.value) and len(str(caught.value)) < len(start) + 250


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_of_objects(tmp_path, content):
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"prompts\.jsonl' is empty"):
        load_prompts(tmp_path / "prompts.jsonl")


def test_a_json_file_is_not_taken_for_text(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"prompt": "a red circle"}], indent=2))
    with pytest.raises(ValueError, match=r"one object a line, .* call the file prompts\.jsonl"):
        load_prompts(path)


def test_a_prompt_is_its_text_with_metadata_that_stays():
    said = {"text": "OPEN"}
    prompt = Prompt("a sign", said)
    said["text"] = "SHUT"
    assert prompt == "a sign" and hash(prompt) == hash("a sign") and f"{prompt}" == "a sign"
    assert prompt == Prompt("a sign", {"text": "SHUT"})  # a text is encoded once
    assert prompt.metadata["text"] == "OPEN"
    with pytest.raises(TypeError):
        prompt.metadata["text"] = "SHUT"
    again = pickle.loads(pickle.dumps(prompt))  # to a process that judges
    assert type(again) is Prompt and again == prompt and again.metadata == prompt.metadata


# ---- which prompts a step uses -------------------------------------------------------------------


def test_metadata_comes_with_the_prompts_of_a_step():
    prompts = [Prompt("same", {"line": line}) for line in range(5)]
    drawn = step_prompts(prompts, 0, 5, 3) + step_prompts(prompts, 1, 5, 3)
    assert [p.metadata["line"] for p in drawn[:5]] != [p.metadata["line"] for p in drawn[5:]]
    assert sorted(p.metadata["line"] for p in drawn) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 12), count=st.integers(1, 7), seed=st.integers(0, 2**64 - 1))
def test_each_epoch_is_a_permutation(size, count, seed):
    prompts = [f"prompt {i}" for i in range(size)]
    steps = -(-3 * size // count)
    drawn = [p for step in range(steps) for p in step_prompts(prompts, step, count, seed)]
    assert len(drawn) == steps * count
    for epoch in range(3):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == sorted(prompts)


def test_a_step_depends_on_seed_and_step_alone():
    prompts = [f"prompt {i}" for i in range(50)]
    straight = [step_prompts(prompts, step, 7, 3) for step in range(20)]
    torch.manual_seed(99)
    backwards = [step_prompts(prompts, step, 7, 3) for step in reversed(range(20))]
    assert backwards[::-1] == straight
    before = torch.get_rng_state()
    assert step_prompts(prompts, 5, 7, 3) == straight[5]
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
    assert step_prompts(prompts, 5, 7, 4) != straight[5]


def test_epochs_and_seeds_are_shuffled_anew():
    prompts = [f"prompt {i}" for i in range(30)]
    orders = [tuple(step_prompts(prompts, epoch, 30, seed)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({*orders, tuple(prompts)}) == 5
