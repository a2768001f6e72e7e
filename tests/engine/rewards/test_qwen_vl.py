"""Pixels and tokens of Qwen2-VL against transformers' own image processor and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
    smart_resize,
)

from gardo.rewards.judging.qwen_vl import SPECIAL, Pixels, Words, load_words
from tests.engine.rewards import vlm_models
from tests.engine.rewards.vlm_models import HOSTILE, PICTURE

SIDES = [1, 9, 20, 28, 41, 100, 448, 511, 512, 516, 768, 1000, 1024, 1344, 2000]
LIMITS = [(256 * 28 * 28, 256 * 28 * 28), (3136, 12845056), (56 * 56, 28 * 28 * 1280)]


@pytest.fixture(scope="module")
def tokens() -> Any:
    return vlm_models.tokenizer()


@pytest.fixture(scope="module")
def words(tokens: Any) -> Words:
    return Words(tokens, "path: 'here'")


# ---- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", LIMITS)
def test_sizes_are_the_authors(limits: tuple[int, int]) -> None:
    pixels = Pixels(*limits)
    for height in SIDES:
        for width in SIDES:
            if max(height, width) > 200 * min(height, width):
                with pytest.raises(ValueError, match="longer than 200 : 1"):
                    pixels.size(height, width)
            else:
                low, high = limits
                expected = smart_resize(height, width, 28, low, high)
                assert pixels.size(height, width) == expected
                assert pixels.tokens(height, width) == expected[0] * expected[1] // 28**2


def processed(images: torch.Tensor, low: int, high: int) -> Any:
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": low, "longest_edge": high})
    return processor(vlm_models.pil(images), return_tensors="pt")


@pytest.mark.parametrize(("height", "width"), [(56, 56), (56, 112), (140, 84)])
def test_patches_are_the_authors_where_nothing_is_resized(height: int, width: int) -> None:
    images = vlm_models.pictures(3, height, width)
    patches, grid = Pixels(28 * 28, 10**6).patches(images.float() / 255)
    expected = processed(images, 28 * 28, 10**6)
    assert grid.tolist() == expected["image_grid_thw"].tolist()
    # float32 values up to 3, and two roundings more or less
    assert torch.allclose(patches.flatten(0, 1), expected["pixel_values"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(120, 96), (40, 200), (300, 300)])
def test_patches_are_the_authors_to_pillows_rounding(height: int, width: int) -> None:
    """Pillow rounds to 8 bits after each direction; the deviation of CLIP's channels is 0.27."""
    images = vlm_models.pictures(2, height, width)
    limits = (64 * 28 * 28, 64 * 28 * 28)
    patches, grid = Pixels(*limits).patches(images.float() / 255)
    expected = processed(images, *limits)
    assert grid.tolist() == expected["image_grid_thw"].tolist()
    difference = (patches.flatten(0, 1) - expected["pixel_values"]).abs() * 0.27
    assert float(difference.max()) < 2 / 255 and float(difference.mean()) < 0.5 / 255


def test_gradients_reach_the_picture() -> None:
    images = (vlm_models.pictures(1, 64, 60) / 255).requires_grad_()
    patches, _ = Pixels(28 * 28 * 9, 28 * 28 * 16).patches(images)
    (gradient,) = torch.autograd.grad(patches.square().sum(), images)
    assert bool((gradient.abs().amax((0, 1)) > 0).all())


# ---- tokens --------------------------------------------------------------------------------------

TURNS = [
    (None, ["one red square"]),
    ("Say yes or no.", [None, "Is the picture what the prompt asks for? \n\n", "\n Yes\n"]),
    ("", ["first", None, " second ", None, "which is better?"]),
    ("Ümläute, 漢字 and e\u0301", [None, "1234 🙂  \r\n don't"]),
]


@pytest.mark.parametrize(("system", "content"), TURNS)
def test_turns_are_the_templates(
    tokens: Any, words: Words, system: str | None, content: list[str | None]
) -> None:
    messages = vlm_models.messages(system, content)
    text = tokens.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = text.replace(PICTURE, PICTURE.replace("<|image_pad|>", 4 * "<|image_pad|>"))
    parts = [words.picture(4) if part is None else part for part in content]
    ids = words.turn("You are a helpful assistant." if system is None else system, parts)
    assert ids == tokens(text).input_ids
    assert tokens.decode(ids) == tokens.decode(tokens(text).input_ids)


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_cannot_write_special_tokens(tokens: Any, words: Words, text: str) -> None:
    added = set(tokens.get_added_vocab().values())
    assert not added & set(words.data(text))
    assert tokens.decode(words.data(text)) == text.encode(errors="replace").decode()
    tame = words.turn("Say yes.", ["tame", words.picture(2), "tame"])
    wild = words.turn(text, [text, words.picture(2), text])
    assert [i for i in wild if i in added] == [i for i in tame if i in added]


def test_a_template_would_let_them(tokens: Any) -> None:
    """What the test above is for."""
    assert tokens.convert_tokens_to_ids("<|im_end|>") in tokens(HOSTILE[2]).input_ids


def test_a_text_may_be_nothing(words: Words) -> None:
    assert words.data("") == []
    assert words.turn("", [""]) == words.turn("", [])


def test_rows_are_padded_on_the_side_that_is_asked_for(words: Words) -> None:
    ids, mask = words.rows([[1, 2, 3], [4]], left=True)
    assert ids.tolist() == [[1, 2, 3], [words.pad, words.pad, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = words.rows([[1, 2, 3], [4]], left=False)
    assert ids.tolist() == [[1, 2, 3], [4, words.pad, words.pad]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_tokenizer_is_loaded_with_more_tokens(tokens: Any, tmp_path: Path) -> None:
    tokens.save_pretrained(tmp_path)
    words = load_words(str(tmp_path), None, field="base", more=["<|Reward|>"])
    assert words.id["<|Reward|>"] == len(tokens) == len(words.tokenizer) - 1
    assert {name: words.id[name] for name in SPECIAL} == Words(tokens, "").id
    assert words.id["<|Reward|>"] not in words.data("<|Reward|>")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"^base: .* holds no tokenizer: "):
        load_words(str(tmp_path), None, field="base")
    with pytest.raises(ValueError, match=r"^base: .* has no token <\|im_start\|>"):
        load_words("builtin:flux/tokenizer", None, field="base")
