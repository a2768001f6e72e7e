"""HPSv3 on a tiny random checkpoint with the published names, against a plain call of transformers
with the published positions, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gardo.planner.scorers import scorer
from gardo.rewards import hpsv3
from gardo.rewards.hpsv3 import AFTER, BEFORE, END, PIXELS, REWARD, Hpsv3, Hpsv3Settings
from gardo.settings import PUBLISHED
from gardo.types import Prompt
from tests.engine.rewards import vlm_models
from tests.engine.rewards.vlm_models import CPU, HOSTILE, PICTURE

PROMPTS = [Prompt(text) for text in ("one red square", "two", "one red square, two blue circles")]
SMALL = 4 * 28 * 28  # pixels, where the size does not matter: 4 tokens
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-VL folder; it has the checkpoint, too."""
    folder = tmp_path_factory.mktemp("hpsv3")
    vlm_models.save(folder, "qwen2_vl")
    save_file(vlm_models.hpsv3_weights(folder), folder / hpsv3.FILE)
    return folder


@pytest.fixture(scope="module")
def weights(base: Path) -> Weights:
    return load_file(base / hpsv3.FILE)


def build(folder: Path, **fields: Any) -> Hpsv3:
    fields = {"path": str(folder), "base": str(folder), "dtype": "float32", **fields}
    return Hpsv3(Hpsv3Settings(role="proxy", **fields), CPU)


@pytest.fixture(scope="module")
def reward(base: Path) -> Hpsv3:
    return build(base)


@pytest.fixture(scope="module")
def small(base: Path) -> Hpsv3:
    return smaller(build(base))


def smaller(reward: Hpsv3) -> Hpsv3:
    reward.pixels = dataclasses.replace(reward.pixels, min_pixels=SMALL, max_pixels=SMALL)
    return reward


def pictures(count: int, height: int = 56, width: int = 56) -> Tensor:
    return vlm_models.pictures(count, height, width).float() / 255


# ---- the formula, in float64 ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(base: Path, weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The class of the authors' wrapper, loaded by transformers itself."""
    folder = tmp_path_factory.mktemp("plain")
    save_file(
        {name: w for name, w in weights.items() if not name.startswith("rm_head.")},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = len(weights["lm_head.weight"])
    config.save_pretrained(folder)
    model = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    return model.eval().requires_grad_(False)


def template_ids(prompt: str, tokens: int) -> list[int]:
    """What the authors' processor makes of it."""
    tokenizer = vlm_models.tokenizer()
    tokenizer.add_tokens([REWARD], special_tokens=True)
    said = f"{BEFORE}{prompt}{AFTER}{REWARD}{END}"
    text: str = tokenizer.apply_chat_template(
        vlm_models.messages(None, [None, said]), tokenize=False, add_generation_prompt=True
    )
    ids: list[int] = tokenizer(
        text.replace(PICTURE, PICTURE.replace("<|image_pad|>", tokens * "<|image_pad|>"))
    ).input_ids
    return ids


def expected(
    plain: Any, weights: Weights, patches: Tensor, grid: Tensor, prompt: str, flat: bool = True
) -> Tensor:
    """mu of one picture; positions 0, 1, 2, ... if `flat`, else those that transformers finds."""
    ids = torch.tensor([template_ids(prompt, int(grid.prod()) // 4)])
    positions = {"position_ids": torch.arange(ids.shape[1]).expand(3, 1, -1)}
    if not flat:
        positions = {"mm_token_type_ids": (ids == plain.config.image_token_id).int()}
    hidden = plain.model(
        input_ids=ids,
        pixel_values=patches.double(),
        image_grid_thw=grid,
        **positions,
    ).last_hidden_state
    x = hidden[ids == len(vlm_models.tokenizer())]
    for number in (0, 3, 5):
        linear = (weights[f"rm_head.{number}.{leaf}"].double() for leaf in ("weight", "bias"))
        x = F.linear(x if number == 0 else x.relu(), *linear)
    return x[:, 0]


# Float32 rounds by 2^-24 a step. About 100 steps (products, norms, softmaxes of 2 + 2 layers and
# the head) on values of size 1 to 30, whose errors add up like the square root of their number.
TOLERANCE = 30 * 100**0.5 * 2**-24


def test_score_is_the_published_formula(reward: Hpsv3, plain: Any, weights: Weights) -> None:
    """On pictures of the published size, which nothing resizes, in the authors' own patches."""
    images = vlm_models.pictures(3, 448, 448)
    images[1] //= 2
    seen = Qwen2VLImageProcessorPil(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})(
        vlm_models.pil(images), return_tensors="pt"
    )
    patches = seen["pixel_values"].unflatten(0, (3, 1024))
    values = reward.score(images.float() / 255, PROMPTS)
    each = [
        expected(plain, weights, p, g[None], prompt)
        for p, g, prompt in zip(patches, seen["image_grid_thw"], PROMPTS, strict=True)
    ]
    wanted = torch.cat(each)
    assert values.dtype == torch.float32 and values.shape == (3,)
    assert float(wanted.std()) > 0.01  # far more than the tolerance
    assert float((values - wanted).abs().max()) < TOLERANCE


def test_positions_are_flat_and_not_qwens_own(small: Hpsv3, plain: Any, weights: Weights) -> None:
    images = pictures(1)
    patches, grid = small.pixels.patches(images)
    flat = expected(plain, weights, patches[0], grid, PROMPTS[0])
    own = expected(plain, weights, patches[0], grid, PROMPTS[0], flat=False)
    value = small.score(images, PROMPTS[:1])
    assert float((value - flat).abs()) < TOLERANCE < 1e-3 < float((value - own).abs())


def test_pictures_are_resized_to_the_published_size(reward: Hpsv3) -> None:
    assert reward.pixels.size(1024, 1024) == (448, 448)
    assert reward.pixels.size(64, 64) == (448, 448)
    assert reward.pixels.tokens(720, 1280) == 12 * 21
    value = reward.score(pictures(1, 200, 320), PROMPTS[:1])
    assert bool(value.isfinite().all())


def test_a_value_does_not_depend_on_its_neighbours(small: Hpsv3, base: Path) -> None:
    images = pictures(4)
    prompts = [*PROMPTS, Prompt("square " * 40)]
    together = small.score(images, prompts)
    alone = [small.score(image[None], [p]) for image, p in zip(images, prompts, strict=True)]
    assert float((together - torch.cat(alone)).abs().max()) < 1e-5
    by_three = smaller(build(base, batch=3)).score(images, prompts)
    assert float((together - by_three).abs().max()) < 1e-5


def test_gradient_is_the_formulas(small: Hpsv3, plain: Any, weights: Weights) -> None:
    images = pictures(1, 64, 48).requires_grad_()
    (gradient,) = torch.autograd.grad(small.score(images, PROMPTS[:1]).sum(), images)
    patches, grid = small.pixels.patches(images.double())
    value = expected(plain, weights, patches[0], grid, PROMPTS[0])
    (wanted,) = torch.autograd.grad(value.sum(), images)
    assert float(wanted.abs().max()) > 1e-5
    # the same roundings as forward, relative to the largest entry
    assert float((gradient - wanted).abs().max() / wanted.abs().max()) < 100 * TOLERANCE
    parts = (small.model, small.head)
    assert not any(p.requires_grad for module in parts for p in module.parameters())


# ---- the turn ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "one red square", " 漢字\n\n{text_prompt} {}  "])
def test_the_turn_is_the_authors(reward: Hpsv3, prompt: str) -> None:
    assert reward.turn(prompt, 9) == template_ids(prompt, 9)


@pytest.mark.parametrize("prompt", HOSTILE)
def test_a_prompt_cannot_write_special_tokens(small: Hpsv3, prompt: str) -> None:
    added = set(small.words.tokenizer.get_added_vocab().values())
    tame, wild = (
        [token for token in small.turn(text, 4) if token in added] for text in ("tame", prompt)
    )
    assert wild == tame and wild.count(small.words.id[REWARD]) == 1
    value = small.score(pictures(2), [Prompt(prompt), PROMPTS[0]])
    assert bool(value.isfinite().all())
    assert torch.allclose(value[1:], small.score(pictures(2)[1:], PROMPTS[:1]), atol=1e-5, rtol=0)


def test_the_text_keeps_its_spaces_at_the_ends_of_lines() -> None:
    assert (
        BEFORE.startswith("\nYou are tasked") and "the best. \n\n**Visual Quality:**  \n" in BEFORE
    )
    assert "be the lowest possible. \n\n**Text Alignment:**  \n" in BEFORE
    assert BEFORE.endswith("description.\nTextual prompt - ") and len(BEFORE) == 2507


# ---- files ---------------------------------------------------------------------------------------


def test_bfloat16_is_the_default_and_near(small: Hpsv3, base: Path) -> None:
    """It rounds by 2^-9 a step; the head and what it gives are float32."""
    assert Hpsv3Settings(role="proxy").dtype == "bfloat16"
    half = smaller(build(base, dtype="bfloat16"))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.head.parameters()} == {torch.float32}
    near = half.score(pictures(3), PROMPTS)
    assert near.dtype == torch.float32
    assert 0 < float((near - small.score(pictures(3), PROMPTS)).abs().max()) < 100**0.5 * 2**-6


def test_names_of_a_later_transformers_do_as_well(
    small: Hpsv3, base: Path, weights: Weights, tmp_path: Path
) -> None:
    renamed = {}
    for name, weight in weights.items():
        later = f"model.{name}" if name.startswith("visual.") else name
        if name.startswith("model."):
            later = name.replace("model.", "model.language_model.", 1)
        renamed[later] = weight
    del renamed["lm_head.weight"]
    save_file(renamed, tmp_path / hpsv3.FILE)
    other = smaller(build(base, path=str(tmp_path)))
    assert torch.equal(other.score(pictures(3), PROMPTS), small.score(pictures(3), PROMPTS))


def without(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: {n: w for n, w in weights.items() if n != name}


QKV = "visual.blocks.1.attn.qkv.weight"
LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without("model.embed_tokens.weight"), "is not HPSv3's: no tensor model.embed_tokens"),
        (without(QKV), "lacks visual.blocks.1.attn.qkv.weight"),
        (without(LAYER), "lacks language_model.layers.1.mlp.up_proj.weight"),
        (lambda w: w | {LAYER: w[LAYER][:-1]}, "has another shape of language_model.layers.1.mlp"),
        (lambda w: w | {"visual.blocks.2.x": torch.ones(2)}, "also has visual.blocks.2.x"),
        (without("rm_head.3.bias"), "rm_head.3.bias is not the head's"),
        (lambda w: w | {"rm_head.7.bias": torch.ones(2)}, "rm_head.7.bias is not the head's"),
        (lambda w: w | {"rm_head.5.weight": torch.ones(4, 16)}, "rm_head.5.weight is not the"),
    ],
)
def test_a_checkpoint_is_read_whole_or_not_at_all(
    change: Callable[[Weights], Weights],
    complaint: str,
    base: Path,
    weights: Weights,
    tmp_path: Path,
) -> None:
    save_file({n: w.contiguous() for n, w in change(weights).items()}, tmp_path / hpsv3.FILE)
    with pytest.raises(ValueError, match=r"^path: HPSv3.safetensors of ") as error:
        build(base, path=str(tmp_path))
    assert complaint in str(error.value)


def test_another_base_is_refused(base: Path, tmp_path: Path, weights: Weights) -> None:
    with pytest.raises(ValidationError, match=r"base\n.*no folder with config.json"):
        build(base, base=str(tmp_path))
    other = tmp_path / "other"
    vlm_models.save(other, "qwen2_5_vl")
    with pytest.raises(ValueError, match=r"^base: .* type 'qwen2_5_vl'; it must be qwen2_vl"):
        build(base, base=str(other))
    rows = {n: weights[n][:-3].clone() for n in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(weights | rows, tmp_path / hpsv3.FILE)
    with pytest.raises(ValueError, match=r"^base: .* has 363 tokens with <\|Reward\|>, .* 360"):
        build(base, path=str(tmp_path))


# ---- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_planner_counts_it(base: Path, dtype: str) -> None:
    """Less the head, and with the base's rows of the embeddings: 4 more than the checkpoint's."""
    fields: dict[str, Any] = {"path": str(base), "base": str(base), "dtype": dtype, "batch": 2}
    found, double = (
        scorer(Hpsv3Settings(role="proxy", **fields | {"batch": batch}), 1) for batch in (2, 4)
    )
    assert found and double
    built = build(base, **fields)
    count = sum(p.numel() for p in built.model.parameters()) + 4 * 32
    assert found.weights == count * {"float32": 4, "bfloat16": 2}[dtype]
    assert found.graph > found.activations / 2 > 0
    assert 1.9 < double.activations / found.activations < 2.1


def test_the_published_one_has_its_parameters() -> None:
    """8.29 B as the model card of Qwen2-VL-7B says, less the 0.54 B of `lm_head`."""
    config = Qwen2VLConfig.from_pretrained(PUBLISHED / "Qwen--Qwen2-VL-7B-Instruct")
    with torch.device("meta"):
        model = Qwen2VLModel(config)
    count = sum(p.numel() for p in model.parameters())
    assert count == 7_746_378_240
    assert round((count + config.text_config.vocab_size * 3584) / 1e7) == 829
    assert sum(p.numel() for p in model.visual.parameters()) == 675_759_104
