"""The rewards on CLIP: scores, gradients, prompts; against the models' own forward in float64."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gardo.rewards import _clip, _pixels
from gardo.rewards.base import Reward
from tests.engine.rewards.clip_models import (
    END,
    LENGTH,
    PROMPTS,
    SIZE,
    build,
    head_state,
    pictures,
    pil,
)

KINDS = ["pickscore", "clipscore", "hpsv2", "aesthetic"]


@pytest.fixture(scope="module")
def rewards(clip_folder: Path) -> dict[str, Reward]:
    return {kind: build(kind, clip_folder) for kind in KINDS}


def expected(kind: str, clip_folder: Path, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
    """The score in float64, by the model's own forward on pixels that are ready."""
    model = CLIPModel.from_pretrained(clip_folder, dtype=torch.float64).eval()
    inputs = CLIPTokenizer.from_pretrained(clip_folder)(
        list(prompts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(pixel_values=pixels, **inputs)
    cosine = (out.image_embeds * out.text_embeds).sum(-1)
    if kind == "aesthetic":
        hidden = out.image_embeds
        state = {name: tensor.double() for name, tensor in head_state().items()}
        for n in (0, 2, 4, 6, 7):
            hidden = F.linear(hidden, state[f"layers.{n}.weight"], state[f"layers.{n}.bias"])
        return hidden[:, 0]
    logit = out.logits_per_image.diagonal()
    return {"pickscore": logit / 26, "clipscore": cosine * 100 / 30, "hpsv2": cosine}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_that_of_the_models_own_forward(
    kind: str, clip_folder: Path, rewards: dict[str, Reward]
) -> None:
    """Through transformers' image processor too; float32 rounding over 2 layers is ~1e-6 of 4."""
    images = pictures(3)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)(
        pil(images), return_tensors="pt"
    ).pixel_values
    value = rewards[kind].score(images, PROMPTS)
    assert value.dtype == torch.float32 and value.shape == (3,)
    wanted = expected(kind, clip_folder, pixels.double(), PROMPTS)
    assert torch.allclose(value.double(), wanted, atol=2e-5, rtol=0)
    assert float(wanted.std()) > 1e-3  # or any constant would pass


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_pixels(
    kind: str, clip_folder: Path, rewards: dict[str, Reward]
) -> None:
    """float32 gradients through the resize, against central differences in float64."""
    images, fit = pictures(2, 40, 36), "pad" if kind == "hpsv2" else "crop"
    images.requires_grad_()
    value = rewards[kind].score(images, PROMPTS[:2])
    (gradient,) = torch.autograd.grad(value.sum(), images)
    assert rewards[kind].differentiable

    def total(at: Tensor) -> float:
        pixels = _pixels.for_clip(at, SIZE, fit)  # type: ignore[arg-type]
        return float(expected(kind, clip_folder, pixels, PROMPTS[:2]).sum())

    step = 1e-4  # third derivatives leave about step^2, rounding 1e-15 / step
    for place in [(0, 0, 20, 18), (1, 2, 7, 30), (1, 1, 33, 5)]:
        nudge = torch.zeros(images.shape, dtype=torch.float64)
        nudge[place] = step
        at = images.detach().double()
        slope = (total(at + nudge) - total(at - nudge)) / (2 * step)
        scale = float(gradient.abs().mean())
        assert abs(float(gradient[place]) - slope) < 1e-3 * max(scale, abs(slope))
        assert slope != 0


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_company_do_not_matter(
    kind: str, clip_folder: Path, rewards: dict[str, Reward]
) -> None:
    images, prompts = pictures(5), [*PROMPTS, "two", "one green triangle"]
    whole = build(kind, clip_folder, batch=8).score(images, prompts)
    split = build(kind, clip_folder, batch=2).score(images, prompts)
    alone = [
        rewards[kind].score(image[None], [prompt])
        for image, prompt in zip(images, prompts, strict=True)
    ]
    assert torch.allclose(whole, split, atol=2e-5)
    assert torch.allclose(whole, torch.cat(alone), atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_image_has_no_value(kind: str, rewards: dict[str, Reward]) -> None:
    images = pictures(3)
    images[1, 0, 5, 5] = torch.nan
    assert rewards[kind].score(images, PROMPTS).isfinite().tolist() == [True, False, True]


def encoded(reward: Any) -> list[int]:
    """Rows of each call of the text tower from now on."""
    rows: list[int] = []
    reward.clip.model.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    return rows


def test_a_prompt_is_encoded_once(clip_folder: Path) -> None:
    reward = build("pickscore", clip_folder)
    rows = encoded(reward)
    first = reward.score(pictures(6), PROMPTS * 2)
    assert rows == [1, 1]
    assert torch.equal(reward.score(pictures(6), PROMPTS * 2), first)
    reward.score(pictures(2), ["two", PROMPTS[0]])
    assert rows == [1, 1, 1]


def test_a_text_has_the_same_features_whatever_was_asked(clip_folder: Path) -> None:
    """Bit by bit: a run that goes on from a checkpoint knows no text."""
    known, new = (build("clipscore", clip_folder).clip for _ in range(2))
    texts = ["one red square", "two", "a blue circle above three green triangles"]
    alone = torch.cat([known.text_features([text]) for text in texts])
    assert torch.equal(new.text_features(texts[::-1]).flip(0), alone)
    assert torch.equal(new.text_features(texts), alone)


def test_only_the_last_texts_are_kept(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_clip, "TEXTS", 2)
    reward = build("clipscore", clip_folder)
    rows = encoded(reward)
    for text in ("one", "two", "one", "three", "one", "two"):  # "one" was asked for, "two" goes
        reward.clip.text_features([text])
    assert len(rows) == 4
    assert reward.clip.text_features(["one", "two", "three", "red"]).shape == (4, 16)
    assert len(reward.clip._known) == 2


def test_a_long_prompt_is_cut_and_keeps_its_end(clip_folder: Path, rewards: dict[str, Any]) -> None:
    prompt = "one two red blue green square circle triangle squares circles"
    ids = CLIPTokenizer.from_pretrained(clip_folder)(prompt).input_ids
    assert len(ids) > LENGTH
    cut = torch.tensor([[*ids[: LENGTH - 1], END]])
    clip = rewards["clipscore"].clip
    with torch.no_grad():
        wanted = F.normalize(clip.model.get_text_features(cut).pooler_output, dim=-1)
    assert torch.allclose(clip.text_features([prompt]), wanted, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_encoders_give_float32_scores(
    kind: str, clip_folder: Path, rewards: dict[str, Reward]
) -> None:
    images = pictures(3)
    exact = rewards[kind].score(images, PROMPTS)
    near = build(kind, clip_folder, dtype="bfloat16").score(images, PROMPTS)
    assert near.dtype == torch.float32
    # Features of relative error 2^-6 at most (8 bits, a few roundings): cosines to 2^-5 at worst.
    scale = {"pickscore": 97 / 26, "clipscore": 100 / 30, "hpsv2": 1.0, "aesthetic": 1.0}[kind]
    assert torch.allclose(near, exact, atol=scale / 32)


def test_logit_scale_is_not_rounded(clip_folder: Path) -> None:
    reward = build("pickscore", clip_folder, dtype="bfloat16")
    assert reward.clip.scale == pytest.approx(97, rel=1e-6)
