"""DINOv3's features: what they are, and a model that is not whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from gardo.rewards import _dino, _pixels, dinov3
from gardo.settings import model_path
from gardo.tiny import world
from tests.engine.rewards.tiny_pictures import build, clean


def test_preprocessing_without_resizing_normalises() -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(31))
    out = _dino.preprocess(images, 32)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        assert torch.allclose(out[:, channel], (images[:, channel] - mean) / std, atol=1e-6)


@pytest.mark.parametrize(("before", "after"), [(32, 48), (64, 32)])
def test_resizing_is_pillows_antialiased_bicubic(before: int, after: int) -> None:
    bytes_HW3 = torch.randint(
        256, (before, before, 3), generator=torch.Generator().manual_seed(32), dtype=torch.uint8
    )
    resized = Image.fromarray(bytes_HW3.numpy()).resize((after, after), Image.Resampling.BICUBIC)
    expected = torch.tensor(list(resized.tobytes())).view(after, after, 3) / 255
    out = _dino.preprocess(bytes_HW3.permute(2, 0, 1)[None] / 255, after)[0].permute(1, 2, 0)
    mean, std = (torch.tensor(values) for values in _pixels.IMAGENET)
    out = out * std + mean
    assert out.shape == (after, after, 3)
    assert float((out - expected).abs().mean()) < 0.004
    assert float(out.min()) >= -1e-6 and float(out.max()) <= 1 + 1e-6


def test_feature_is_the_mean_patch_token_after_the_norm(features: dinov3.Dinov3) -> None:
    images, prompts = clean(3, 33)
    normed: list[Tensor] = []
    handle = features.model.norm.register_forward_hook(lambda *_: normed.append(_[2]))
    values = features.score(images, prompts)
    handle.remove()
    tokens = normed[-1]
    assert tokens.shape == (3, 2 + 64, 48)  # class token, register, 8 x 8 patches
    assert values.shape == (3, 48)
    assert torch.allclose(values, tokens[:, -64:].mean(1), atol=1e-6)
    assert not torch.allclose(values, tokens[:, 0], atol=1e-2)
    assert not torch.allclose(values, tokens[:, 1:].mean(1), atol=1e-4)


def test_features_place_layouts_together(features: dinov3.Dinov3) -> None:
    """Same objects: a picture is nearer to itself moved by a pixel than to another layout."""
    scene = world.sample_scenes(200, torch.Generator().manual_seed(34))
    other = world.sample_scenes(200, torch.Generator().manual_seed(34))
    generator = torch.Generator().manual_seed(35)
    shift = torch.randint(-1, 2, (200, 1, 2), generator=generator).float()
    moved = world.draw(
        world.Scene(**{**vars(scene), "centre_BK2": (scene.centre_BK2 + shift).clamp(4, 28)})
    )
    elsewhere = world._place(other.radius_BK, other.count_B, generator)
    replaced = world.draw(world.Scene(**{**vars(other), "centre_BK2": elsewhere}))
    a, near, far = (
        torch.nn.functional.normalize(features.score(x, []), dim=-1)
        for x in (world.draw(scene), moved, replaced)
    )
    closer = (a * near).sum(-1) > (a * far).sum(-1)
    assert float(closer.float().mean()) > 0.9


def altered(folder: Path, changes: dict[str, Tensor | None]) -> str:
    """The built-in DINOv3 with weights of another value, or without those that are None."""
    source = Path(model_path("builtin:dinov3"))
    shutil.copy(source / "config.json", folder)
    state = load_file(source / "model.safetensors") | changes
    kept = {name: weight for name, weight in state.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, "lacks norm.weight; is it a whole DINOv3ViTModel of this size"),
        ({"norm.bias": None, "norm.weight": None}, "lacks norm.bias and 1 more;"),
        ({"norm.weight": torch.ones(3)}, "has another shape of norm.weight;"),
        ({"head.weight": torch.ones(3)}, "also has head.weight;"),
    ],
)
def test_a_dinov3_that_is_not_whole_is_refused(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"path: .*{message}"):
        build("dinov3", "features", path=altered(tmp_path, changes), size=32)


def test_another_model_is_refused(clip_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"path: .* of type 'clip'; it must be dinov3_vit"):
        build("dinov3", "features", path=str(clip_folder))
    with pytest.raises(
        ValueError, match=r"no folder with config.json: './none'; give one, or a hu"
    ):
        build("dinov3", "features", path="./none")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_features_of_a_smaller_type_are_float32(features: dinov3.Dinov3, dtype: str) -> None:
    """Tokens are rounded to 8 bits (bf16); their mean is taken in fp32, and is nearer."""
    small = build("dinov3", "features", path="builtin:dinov3", size=32, dtype=dtype)
    assert {p.dtype for p in small.model.parameters()} == {getattr(torch, dtype)}
    images, prompts = clean(6, 36)
    values = small.score(images, prompts)
    exact = features.score(images, prompts)
    assert values.dtype == exact.dtype == torch.float32
    assert float((values - exact).norm(dim=-1).max()) < 2**-6 * float(exact.norm(dim=-1).min())


@pytest.mark.parametrize("batch", [1, 4])
def test_features_do_not_depend_on_the_batch(features: dinov3.Dinov3, batch: int) -> None:
    """Sums of a matmul of other height may round differently: fp32 over two layers, 1e-6."""
    small = build("dinov3", "features", path="builtin:dinov3", size=32, batch=batch)
    images, prompts = clean(6, 37)
    images[2, 0, 3, 3] = torch.nan
    values, whole = small.score(images, prompts), features.score(images, prompts)
    assert torch.allclose(values, whole, atol=2e-6, equal_nan=True)
    assert values.isfinite().all(1).tolist() == [True, True, False, True, True, True]
