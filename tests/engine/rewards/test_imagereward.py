"""ImageReward on a tiny random checkpoint, against its formula written out in float64."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from gardo import plugins
from gardo.algorithms.refl import ReFLSettings
from gardo.rewards import _pixels
from gardo.rewards.imagereward import ImageReward, ImageRewardSettings

CPU = torch.device("cpu")
SIZE, PATCH, VISION_WIDTH, VISION_BLOCKS = 32, 8, 128, 2
TEXT_WIDTH, TEXT_HEADS, TEXT_LAYERS = 48, 3, 2
MLP_WIDTHS = (TEXT_WIDTH, 20, 12, 8, 4, 1)
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["a", "red", "green", "blue", "cat", "dog", "on", "the", "moon"],
]
VOCABULARY = len(WORDS) + 2  # [DEC] and [ENC] are BLIP's own
MED = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT_WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 40,
    "model_type": "bert",
    "num_attention_heads": TEXT_HEADS,
    "num_hidden_layers": TEXT_LAYERS,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": VOCABULARY,
    "encoder_width": 768,
    "add_cross_attention": True,
}
PROMPTS = ["a red cat", "a green dog on the moon", "a red cat", "the moon"]
Weights = dict[str, Tensor]


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The names of the published file, at the tiny sizes."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    vision, text, width = "blip.visual_encoder", "blip.text_encoder", VISION_WIDTH
    shapes[f"{vision}.cls_token"] = (1, 1, width)
    shapes[f"{vision}.pos_embed"] = (1, 1 + (SIZE // PATCH) ** 2, width)
    shapes[f"{vision}.patch_embed.proj.weight"] = (width, 3, PATCH, PATCH)
    shapes[f"{vision}.patch_embed.proj.bias"] = (width,)
    for i in range(VISION_BLOCKS):
        block = f"{vision}.blocks.{i}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", 96, width)
        linear(f"{block}.mlp.fc2", width, 96)
    norm(f"{vision}.norm", width)
    shapes[f"{text}.embeddings.word_embeddings.weight"] = (VOCABULARY, TEXT_WIDTH)
    shapes[f"{text}.embeddings.position_embeddings.weight"] = (40, TEXT_WIDTH)
    norm(f"{text}.embeddings.LayerNorm", TEXT_WIDTH)
    for i in range(TEXT_LAYERS):
        layer = f"{text}.encoder.layer.{i}"
        for attention, into in (("attention", TEXT_WIDTH), ("crossattention", width)):
            linear(f"{layer}.{attention}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            linear(f"{layer}.{attention}.self.key", TEXT_WIDTH, into)
            linear(f"{layer}.{attention}.self.value", TEXT_WIDTH, into)
            linear(f"{layer}.{attention}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            norm(f"{layer}.{attention}.output.LayerNorm", TEXT_WIDTH)
        linear(f"{layer}.intermediate.dense", 64, TEXT_WIDTH)
        linear(f"{layer}.output.dense", TEXT_WIDTH, 64)
        norm(f"{layer}.output.LayerNorm", TEXT_WIDTH)
    linear("blip.vision_proj", 256, width)
    linear("blip.text_proj", 256, TEXT_WIDTH)
    for layer, into, out in zip((0, 2, 4, 6, 7), MLP_WIDTHS, MLP_WIDTHS[1:], strict=False):
        linear(f"mlp.layers.{layer}", out, into)
    return shapes


def random_weights() -> Weights:
    """Each layer keeps the size of what it is given, so that no part is drowned by another.

    The picture's tokens start small: there the norms' epsilon counts.
    """
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for name, shape in published_shapes().items():
        noise = torch.randn(shape, generator=generator)
        if ("norm" in name or "LayerNorm" in name) and name.endswith("weight"):
            weights[name] = 1 + 0.2 * noise
        elif name.endswith("bias"):
            weights[name] = 0.2 * noise
        else:
            fan_in = noise[0].numel() if "embed" not in name or "proj" in name else 1
            weights[name] = noise / fan_in**0.5
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"):
        weights[f"blip.visual_encoder.{name}"] *= 0.05
    return weights


def save(folder: Path, weights: Mapping[str, Any], name: str = "ImageReward.pt") -> str:
    (folder / "med_config.json").write_text(json.dumps(MED))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    if name.endswith(".pt"):
        torch.save(dict(weights), folder / name)
    else:
        save_file({n: w for n, w in weights.items() if isinstance(w, Tensor)}, folder / name)
    return str(folder)


def build(folder: str | Path, **settings: Any) -> ImageReward:
    plugin = plugins.resolve("gardo.rewards", "imagereward")
    settings = {"path": str(folder), "tokenizer": str(folder), **settings}
    return plugin(plugin.Settings(role="proxy", **settings), CPU)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


@pytest.fixture(scope="module")
def folder(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("imagereward"), weights)


@pytest.fixture(scope="module")
def reward(folder: str) -> ImageReward:
    return build(folder)


def pictures(count: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(6))


# ---- the formula, in float64 ---------------------------------------------------------------------


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """[B, L, D] each; the softmax is over all keys."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    weight = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weight @ v).transpose(1, 2).flatten(2)


def expected_output(weights: Weights, images: Tensor, prompt: str) -> Tensor:
    """y of ImageReward for images of the model's own size and a prompt without padding."""
    w = {name: weight.double() for name, weight in weights.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in _pixels.CLIP)
    vision = "blip.visual_encoder"
    proj = f"{vision}.patch_embed.proj"
    x = (images.double() - mean) / std
    x = F.conv2d(x, w[f"{proj}.weight"], w[f"{proj}.bias"], stride=PATCH).flatten(2).mT
    x = torch.cat([w[f"{vision}.cls_token"].expand(len(x), -1, -1), x], 1)
    x = x + w[f"{vision}.pos_embed"]
    for i in range(VISION_BLOCKS):
        block = f"{vision}.blocks.{i}"
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attend(*qkv, VISION_WIDTH // 64))
        inner = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
        x = x + linear(f"{block}.mlp.fc2", inner)
    picture = norm(f"{vision}.norm", x, 1e-6)

    text = "blip.text_encoder"
    tokens = torch.tensor([WORDS.index(t) for t in ("[CLS]", *prompt.split(), "[SEP]")])
    h = w[f"{text}.embeddings.word_embeddings.weight"][tokens]
    h = h + w[f"{text}.embeddings.position_embeddings.weight"][: len(tokens)]
    h = norm(f"{text}.embeddings.LayerNorm", h, 1e-12).expand(len(x), -1, -1)
    for i in range(TEXT_LAYERS):
        layer = f"{text}.encoder.layer.{i}"
        for kind in ("attention", "crossattention"):
            name = f"{layer}.{kind}"
            seen = h if kind == "attention" else picture
            found = attend(
                linear(f"{name}.self.query", h),
                linear(f"{name}.self.key", seen),
                linear(f"{name}.self.value", seen),
                TEXT_HEADS,
            )
            h = norm(f"{name}.output.LayerNorm", h + linear(f"{name}.output.dense", found), 1e-12)
        inner = F.gelu(linear(f"{layer}.intermediate.dense", h))
        h = norm(f"{layer}.output.LayerNorm", h + linear(f"{layer}.output.dense", inner), 1e-12)
    y = h[:, 0]
    for i in (0, 2, 4, 6, 7):
        y = linear(f"mlp.layers.{i}", y)
    return y[:, 0]


def expected_values(weights: Weights, images: Tensor, prompts: list[str]) -> Tensor:
    y = [expected_output(weights, i[None], p) for i, p in zip(images, prompts, strict=True)]
    return (torch.cat(y) - 0.1671736) / 1.0333395


# Float32 rounds by 2^-24 a step. The longest path has about 60 steps (products, norms, softmaxes)
# on values of size 1 to 8, and the errors add up like the square root of their number.
TOLERANCE = 8 * 60**0.5 * 2**-24


def test_score_is_the_published_formula(weights: Weights, reward: ImageReward) -> None:
    images = pictures(4)
    values = reward.score(images, PROMPTS)
    expected = expected_values(weights, images, PROMPTS)
    assert values.dtype == torch.float32 and values.shape == (4,)
    assert float(expected.std()) > 0.1  # pictures and prompts matter by far more than the tolerance
    assert float((values - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_do_not_change_the_score(batch: int, folder: str, reward: ImageReward) -> None:
    images = pictures(4)
    values = build(folder, batch=batch).score(images, PROMPTS)
    assert torch.allclose(values, reward.score(images, PROMPTS), atol=TOLERANCE, rtol=0)


def test_published_extras_are_left_aside(
    weights: Weights, reward: ImageReward, tmp_path: Path
) -> None:
    """Older files keep the position ids as a tensor; safetensors are read as well as a pickle."""
    ids = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    other = build(save(tmp_path, weights | ids, "ImageReward.safetensors"))
    images = pictures(4)
    assert torch.equal(other.score(images, PROMPTS), reward.score(images, PROMPTS))


def test_raw_is_what_refl_standardises(folder: str, reward: ImageReward) -> None:
    """ReFL's own mean and deviation on the raw output give the standardised value.

    Their seven digits differ from the published ones by 3e-8; float32 rounds by 6e-8.
    """
    images, refl = pictures(4), ReFLSettings()
    raw = build(folder, raw=True).score(images, PROMPTS)
    value = reward.score(images, PROMPTS)
    assert torch.allclose((raw - refl.reward_mean) / refl.reward_std, value, atol=1e-6, rtol=0)
    assert not torch.allclose(raw, value, atol=1e-2)


def test_gradient_is_the_formulas(weights: Weights, reward: ImageReward) -> None:
    images = pictures(2).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, PROMPTS[:2]).sum(), images)
    value = expected_values(weights, images, PROMPTS[:2]).sum()
    (expected,) = torch.autograd.grad(value, images)
    # the same count of roundings as forward, relative to the largest entry
    assert float((gradient - expected).abs().max() / expected.abs().max()) < 10 * TOLERANCE
    assert not any(p.requires_grad for m in (reward.vision, reward.text) for p in m.parameters())


def test_gradient_passes_the_resizing(reward: ImageReward) -> None:
    images = pictures(1, 48, 80).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.score(images, ["a cat"]).sum(), images)
    inside = gradient[..., 20:60].abs().amax((0, 1))
    assert bool((inside > 0).all())
    assert not gradient[..., :10].any() and not gradient[..., -10:].any()  # cut off


def test_prompts_are_cut_at_35_tokens(reward: ImageReward) -> None:
    """[CLS], 33 words and [SEP] count."""
    long, images = ["cat"] * 33, pictures(1).expand(3, -1, -1, -1)
    texts = [[*long, "red"], [*long, "blue", "dog"], [*long[:-1], "red"]]
    values = reward.score(images, [" ".join(words) for words in texts])
    assert abs(float(values[0] - values[1])) < TOLERANCE
    assert abs(float(values[0] - values[2])) > 1e-3


def test_bfloat16_is_near(folder: str, reward: ImageReward) -> None:
    """It rounds by 2^-9 a step, the values being 1 on average."""
    half = build(folder, dtype="bfloat16")
    images = pictures(4)
    assert half.vision.dtype == half.text.dtype == torch.bfloat16
    near = half.score(images, PROMPTS) - reward.score(images, PROMPTS)
    assert 0 < float(near.abs().max()) < 60**0.5 * 2**-9


@pytest.mark.parametrize(("height", "width"), [(48, 80), (75, 50), (224, 224), (300, 300)])
def test_preprocessing_is_pillows(height: int, width: int) -> None:
    """Shorter side to 32, the middle square; Pillow rounds to 8 bits after each direction."""
    bytes_HW3 = (pictures(1, height, width)[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
    new_width, new_height = (
        32 * width // min(height, width),
        32 * height // min(height, width),
    )
    resized = Image.fromarray(bytes_HW3.numpy()).resize(
        (new_width, new_height), Image.Resampling.BICUBIC
    )
    left, top = round((new_width - 32) / 2), round((new_height - 32) / 2)
    cropped = resized.crop((left, top, left + 32, top + 32))
    expected = torch.tensor(list(cropped.tobytes())).view(32, 32, 3) / 255
    out = _pixels.for_clip(bytes_HW3.permute(2, 0, 1)[None] / 255, 32)[0].permute(1, 2, 0)
    mean, std = (torch.tensor(values) for values in _pixels.CLIP)
    out = out * std + mean
    assert float((out - expected).abs().mean()) < 1 / 255


# ---- bad input -----------------------------------------------------------------------------------


def settings_error(**settings: Any) -> str:
    with pytest.raises(ValidationError) as error:
        ImageRewardSettings(role="proxy", **settings)
    return str(error.value)


def test_folders_are_checked_with_the_settings(folder: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    wanted = "no folder with ImageReward.safetensors or ImageReward.pt and med_config.json: "
    assert wanted in settings_error(path=missing)
    (tmp_path / "ImageReward.pt").touch()
    assert wanted in settings_error(path=str(tmp_path))
    (tmp_path / "med_config.json").touch()
    assert ImageRewardSettings(role="proxy", path=str(tmp_path), tokenizer=folder)
    message = settings_error(path=folder, tokenizer=missing)
    assert "tokenizer\n" in message and "no folder with vocab.txt or tokenizer.json: " in message
    assert ImageRewardSettings(role="proxy").path == "THUDM/ImageReward"


def without(name: str) -> Callable[[Weights], Mapping[str, Any]]:
    return lambda weights: {n: w for n, w in weights.items() if n != name}


QKV = "blip.visual_encoder.blocks.1.attn.qkv.weight"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: {"path": Path("x")}, "cannot be read as tensors"),  # a pickle with code
        (lambda w: {"vision_model.embeddings.class_embedding": w[QKV]}, "is not ImageReward's"),
        (without(QKV), "encoder.layers.1.self_attn.qkv.weight"),
        (without("mlp.layers.6.bias"), "look at layers.6.bias"),
        (lambda w: w | {QKV: w[QKV][:-1]}, "another shape of encoder.layers.1.self_attn.qkv"),
    ],
)
def test_other_files_are_refused(
    change: Callable[[Weights], Mapping[str, Any]],
    complaint: str,
    weights: Weights,
    tmp_path: Path,
) -> None:
    other = save(tmp_path, change(weights))
    with pytest.raises(ValueError, match="ImageReward") as error:
        build(other)
    assert complaint in str(error.value) and other in str(error.value)


@pytest.mark.parametrize("name", ["ImageReward.pt", "ImageReward.safetensors"])
def test_a_torn_file_is_refused(name: str, weights: Weights, tmp_path: Path) -> None:
    save(tmp_path, weights, name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{name} cannot be read as tensors"):
        build(tmp_path)


def test_another_models_tokenizer_is_refused(folder: str, tmp_path: Path) -> None:
    more = [*WORDS, *(str(n) for n in range(3))]
    (tmp_path / "vocab.txt").write_text("\n".join(more))
    with pytest.raises(ValueError, match="it needs bert-base-uncased's"):
        build(folder, tokenizer=str(tmp_path))
