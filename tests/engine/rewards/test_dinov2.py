"""DINOv2's features, by a tiny random model of the class that holds the published weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model

from gardo.planner.scorers import scorer
from gardo.rewards import _pixels
from gardo.rewards.dinov2 import Dinov2, Dinov2Settings
from gardo.settings import PUBLISHED
from tests.engine.rewards.tiny_pictures import CPU, build, clean

SIDE, PATCH, WIDTH = 28, 14, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, initializer_range=0.3,
    )  # fmt: skip
    model = Dinov2Model(config)
    for parameter in model.parameters():  # norms and biases too: leaving one out must show
        parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("size", [28, 42])
def test_feature_is_the_mean_patch_token_after_the_norm(folder: Path, size: int) -> None:
    """By the model's own blocks; at 42 pixels its position embeddings are resized."""
    images, prompts = clean(3, 33)
    values = build("dinov2", "features", path=str(folder), size=size).score(images, prompts)
    pixels = F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(v)[:, None, None] for v in _pixels.IMAGENET)
    model = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model.embeddings((pixels - mean) / std)
        for layer in model.encoder.layer:
            hidden = layer(hidden)
        tokens = model.layernorm(hidden)
    assert tokens.shape == (3, 1 + (size // PATCH) ** 2, WIDTH)
    assert torch.allclose(values, tokens[:, 1:].mean(1), atol=1e-5)
    assert not torch.allclose(values, tokens.mean(1), atol=1e-3)  # nor with the class token
    assert not torch.allclose(values, hidden[:, 1:].mean(1), atol=1e-2)  # nor before the norm


def test_features_of_a_broken_image_alone_are_none(folder: Path) -> None:
    reward = build("dinov2", "features", path=str(folder), size=SIDE, batch=2)
    images, prompts = clean(5, 37)
    images[2, 0, 3, 3] = torch.nan
    values = reward.score(images, prompts)
    assert values.shape == (5, WIDTH) and values.dtype == torch.float32
    assert values.isfinite().all(1).tolist() == [True, True, False, True, True]


def test_a_size_that_patches_do_not_fill_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^size: 32: is no multiple .* patches of 14 .* use 28"):
        build("dinov2", "features", path=str(folder), size=32)
    with pytest.raises(ValueError, match=r"^size: 30: is no multiple .* use 28"):
        build("dinov3", "features", path="builtin:dinov3", size=30)


def test_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"path: .* of type 'dinov3_vit'; it must be dinov2"):
        build("dinov2", "features", path="builtin:dinov3", size=SIDE)
    with pytest.raises(ValueError, match=r"path: .* of type 'dinov2'; it must be dinov3_vit"):
        build("dinov3", "features", path=str(folder), size=SIDE)


def test_the_planner_counts_it(folder: Path) -> None:
    settings = Dinov2Settings(role="features", path=str(folder), size=SIDE)
    found = scorer(settings)
    assert found
    weights = sum(p.numel() for p in Dinov2(settings, CPU).model.parameters())
    assert found.weights == 4 * weights and found.activations > 0


def test_the_published_one_has_its_parameters() -> None:
    """304 M, as its model card says; size 224 is 16 patches of 14."""
    config = Dinov2Config.from_pretrained(PUBLISHED / "facebook--dinov2-large")
    with torch.device("meta"):
        count = sum(p.numel() for p in Dinov2Model(config).parameters())
    assert round(count / 1e6) == 304
    assert Dinov2Settings(role="features").size % config.patch_size == 0
