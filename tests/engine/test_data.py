"""Prompt files and what is wrong with them; which prompts a step uses."""

import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gardo.data import (
    MAX_BYTES,
    MAX_PROMPTS,
    digest_of,
    divided,
    load_prompts,
    run_prompts,
    step_prompts,
    weighed,
)
from gardo.settings import FieldError
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


# ---- weights -------------------------------------------------------------------------------------


def with_weights(*weights):
    return [Prompt(f"prompt {i}", weight=weight) for i, weight in enumerate(weights)]


def drawn(prompts, steps, count, seed):
    return [p for step in range(steps) for p in step_prompts(prompts, step, count, seed)]


def test_weights_come_from_a_field_of_the_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "weight": 2, "often": 0.5}\n{"prompt": "b"}\n')
    prompts = load_prompts(path)
    assert [p.weight for p in prompts] == [1, 1]
    assert [p.weight for p in weighed(prompts, "weight")] == [2, 1]
    assert [p.weight for p in weighed(prompts, "often")] == [0.5, 1]
    assert [p.weight for p in weighed(prompts, None)] == [1, 1]
    again = pickle.loads(pickle.dumps(weighed(prompts, "weight")))
    assert [(p, p.weight, p.metadata) for p in again] == [
        ("a", 2, {"weight": 2, "often": 0.5}), ("b", 1, {})
    ]  # fmt: skip


@pytest.mark.parametrize("weight", ["high", True, 0, -1, 2e9, 10**400, None, [1]])
def test_what_is_no_weight_is_named(weight):
    prompts = [Prompt("a"), Prompt("b", {"weight": weight})]
    with pytest.raises(ValueError, match=r"^prompt 2, 'b': \"weight\" is .*a number above 0, at"):
        weighed(prompts, "weight")


def test_a_field_that_no_prompt_has_is_a_slip():
    with pytest.raises(FieldError, match=r"^data\.weights: 'wieght' is a field of no prompt"):
        weighed([Prompt("a", {"weight": 2})], "wieght")
    assert weighed([Prompt("a")], "weight") == ["a"]


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 12), count=st.integers(1, 7), weight=st.floats(0.1, 9))
def test_equal_weights_change_nothing(size, count, weight):
    alike = with_weights(*[weight] * size)
    assert drawn(alike, 9, count, 3) == drawn([f"prompt {i}" for i in range(size)], 9, count, 3)


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 20), min_size=2, max_size=9),
    count=st.integers(1, 7),
    seed=st.integers(0, 2**64 - 1),
)
def test_in_an_epoch_a_prompt_comes_as_often_as_its_weight_says(weights, count, seed):
    size, prompts = len(weights), with_weights(*weights)
    epochs = drawn(prompts, -(-3 * size // count), count, seed)[: 3 * size]
    for epoch in range(3):
        times = [epochs[epoch * size : (epoch + 1) * size].count(p) for p in prompts]
        expected = [size * weight / sum(weights) for weight in weights]
        # the number rounded down or up; 1e-6 for sums of floats that miss a whole number
        assert all(abs(n - e) < 1 + 1e-6 for n, e in zip(times, expected, strict=True))


def test_over_many_epochs_the_shares_are_the_weights():
    """Points of the golden ratio: the largest discrepancy of an interval is of order log E."""
    weights = [0.1, 0.5, 1, 1, 3.3, 7]
    prompts, epochs = with_weights(*weights), 100
    seen = drawn(prompts, epochs, len(weights), 5)
    for prompt in prompts:
        expected = epochs * len(weights) * prompt.weight / sum(weights)
        assert abs(seen.count(prompt) - expected) < 5


def test_weighted_steps_depend_on_seed_and_step_alone():
    prompts = with_weights(*[1, 2, 3] * 10)
    straight = [step_prompts(prompts, step, 7, 3) for step in range(20)]
    assert [step_prompts(prompts, step, 7, 3) for step in reversed(range(20))][::-1] == straight
    assert [step_prompts(prompts, step, 7, 4) for step in range(20)] != straight
    assert step_prompts(prompts, 0, 30, 3) != step_prompts(prompts, 1, 30, 3)
    used = run_prompts(prompts, 4, 7, 3)
    assert set(used) == {p for step in straight[:4] for p in step} and len(set(used)) == len(used)


# ---- held out ------------------------------------------------------------------------------------

TEXTS = [f"a picture of number {i}" for i in range(1000)]


def test_a_share_is_held_out_by_the_texts():
    prompts = [Prompt(text, {"line": i}) for i, text in enumerate([*TEXTS, *TEXTS])]
    trained, held_out = divided(prompts, 0.2)
    assert sorted(p.metadata["line"] for p in trained + held_out) == list(range(2000))
    assert not set(trained) & set(held_out), "prompts of one text stay together"
    # 1000 texts: a binomial's deviation is 13, five of them
    assert abs(len(set(held_out)) - 200) < 65
    lines = [p.metadata["line"] for p in held_out]
    assert lines == sorted(lines), "in their order"


def test_what_is_held_out_stays_so():
    """Whatever is added to the file, and for a larger share."""
    held_out = set(divided(list(map(Prompt, TEXTS[:500])), 0.1)[1])
    more = set(divided(list(map(Prompt, ["new", *TEXTS])), 0.1)[1])
    larger = set(divided(list(map(Prompt, TEXTS[:500])), 0.3)[1])
    assert held_out == more & set(TEXTS[:500]) and held_out < larger


def test_too_few_to_hold_out_or_to_train_on():
    with pytest.raises(
        FieldError, match=r"^data\.held_out: 1e-09 of 3 prompts is no prompt; use a l"
    ):
        divided(list(map(Prompt, TEXTS[:3])), 1e-9)
    with pytest.raises(
        FieldError, match=r"0\.9999 of 3 prompts is every prompt; use a smaller sha"
    ):
        divided(list(map(Prompt, TEXTS[:3])), 0.9999)


def test_a_digest_is_of_texts_metadata_and_weights():
    same = [[Prompt("a", {"x": 1, "y": 2})], [Prompt("a", {"y": 2, "x": 1})]]
    assert len({digest_of(p) for p in same}) == 1
    others = [[Prompt("a")], [Prompt("b", {"x": 1, "y": 2})], [Prompt("a", {"x": 1, "y": 2}, 2.0)]]
    assert len({digest_of(p) for p in [*others, same[0], same[0] * 2]}) == 5
