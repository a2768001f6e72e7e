"""Prompt files and what is wrong with them; which prompts a step uses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gardo.data import load_prompts, step_prompts


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
