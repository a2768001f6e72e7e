"""The eyes of the GenEval reward, against transformers' own processors and classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil,
)

from gardo.rewards import _pixels
from gardo.rewards.geneval_prompts import CLASSES, COLOURS
from gardo.rewards.geneval_rules import Found
from gardo.rewards.geneval_vision import (
    GREY,
    ColourJudge,
    Detector,
    Sighting,
    bounds,
    cut_out,
)
from tests.engine.rewards.geneval_models import (
    SIZE,
    as_pil,
    detector_config,
    names,
    pictures,
    segmenter,
    source,
)

# ---- the detector --------------------------------------------------------------------------------


def test_the_detector_is_the_published_class(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="transformers builds the training loss only with scipy")
    from transformers import Mask2FormerForUniversalSegmentation

    torch.manual_seed(2)
    published = Mask2FormerForUniversalSegmentation(detector_config()).eval()
    published.requires_grad_(False)  # torch's attention takes another path with gradients
    published.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        classes, masks = Detector(source(tmp_path), 64).model(pixels)
        expected = published(pixels)
    assert torch.equal(classes, expected.class_queries_logits)
    assert torch.equal(masks, expected.masks_queries_logits)


def test_classes_are_read_off_the_last_layer() -> None:
    model = segmenter()
    pixels = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        classes, masks = model(pixels)
        seen = model.model(pixels)
        norm = model.model.transformer_module.decoder.layernorm
        last = norm(seen.transformer_decoder_last_hidden_state)
    assert torch.equal(classes, model.class_predictor(last))
    assert torch.equal(masks, seen.masks_queries_logits[-1])


@pytest.mark.parametrize(
    ("height", "width", "size"), [(64, 64, 64), (50, 80, 64), (90, 61, 64), (40, 900, 96)]
)
def test_pictures_are_resized_as_by_the_models_processor(
    geneval_folder: Path, height: int, width: int, size: int
) -> None:
    images = pictures(1, height, width)
    processor = Mask2FormerImageProcessorPil(
        size={"shortest_edge": size, "longest_edge": 1333}, size_divisor=32
    )
    expected = processor(as_pil(images[0]), return_tensors="pt")["pixel_values"]
    pixels = Detector(source(geneval_folder / "detector"), size).preprocess(images)
    assert pixels.shape == expected.shape
    # Pillow rounds to 8 bits after each of the two passes: half a step each, over the least std
    assert (pixels - expected).abs().max() <= (1 / 255) / 0.224 * 1.05


def test_objects_are_those_of_the_models_post_processing(geneval_folder: Path) -> None:
    images = pictures()
    detector = Detector(source(geneval_folder / "detector"), SIZE)
    with torch.no_grad():
        seen = detector(images, [CLASSES] * len(images))
        classes, masks = detector.model(detector.preprocess(images))
    expected = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks),
        threshold=0.3,
        return_binary_maps=True,
        target_sizes=[(SIZE, SIZE)] * len(images),
    )
    for found, theirs in zip(seen, expected, strict=True):
        mine = [thing for thing in found or [] if thing.score >= 0.3]
        assert len(mine) == len(theirs["segments_info"]) > 5
        rows = sorted(zip(theirs["segments_info"], theirs["segmentation"], strict=True), key=score)
        for thing, (info, mask_HW) in zip(sorted(mine, key=score), rows, strict=True):
            assert CLASSES.index(thing.name) == info["label_id"]
            assert thing.score == pytest.approx(info["score"], abs=2e-6)  # theirs has 6 digits
            assert torch.equal(thing.mask_HW, mask_HW.bool())
            y, x = np.nonzero(mask_HW.numpy())
            assert thing.box == (x.min(), y.min(), x.max() + 1, y.max() + 1)


def score(thing: Any) -> float:
    return thing.score if isinstance(thing, Found) else thing[0]["score"]


def test_only_the_asked_classes_are_reported(geneval_folder: Path) -> None:
    images = pictures(2)
    detector = Detector(source(geneval_folder / "detector"), 64)
    with torch.no_grad():
        everything = detector(images, [CLASSES] * 2)
        first = everything[0][0].name
        some = detector(images, [{first}, set()])
    assert len({thing.name for thing in everything[0]}) > 2
    assert [t.box for t in some[0]] == [t.box for t in everything[0] if t.name == first]
    assert some[1] == []


def test_masks_lie_in_the_picture_whatever_its_shape(geneval_folder: Path) -> None:
    images = pictures(1, 70, 131)
    with torch.no_grad():
        (seen,) = Detector(source(geneval_folder / "detector"), 64)(images, [CLASSES])
    assert seen
    for thing in seen:
        assert thing.mask_HW.shape == (70, 131)
        left, top, right, bottom = thing.box
        assert 0 <= left < right <= 131 and 0 <= top < bottom <= 70


def test_other_spellings_of_the_classes_are_understood(
    tmp_path: Path, geneval_folder: Path
) -> None:
    """Label files of COCO models spell some classes as Pascal VOC does."""
    spelt = {
        "motorcycle": "motorbike",
        "airplane": "aeroplane",
        "couch": "sofa",
        "potted plant": "pottedplant",
        "dining table": "diningtable",
        "tv": "tvmonitor",
        "computer mouse": "mouse",
        "tv remote": "remote",
        "computer keyboard": "keyboard",
        "teddy bear": "Teddy Bear",
    }
    assert set(spelt) <= set(CLASSES)
    labels = [spelt.get(name, name) for name in CLASSES]
    segmenter(**names(labels[::-1])).save_pretrained(tmp_path)
    assert Detector(source(tmp_path), 64).label == {n: 79 - i for i, n in enumerate(CLASSES)}


def test_bounds_and_the_cut_out_by_hand() -> None:
    mask = torch.zeros(5, 6, dtype=torch.bool)
    mask[1, 2] = mask[3, 4] = True
    assert bounds(mask) == (2, 1, 5, 4)
    image = torch.arange(90.0).view(3, 5, 6)
    crop = cut_out(image, Sighting(name="dog", score=1.0, box=bounds(mask), mask_HW=mask))
    expected = torch.full((3, 3, 3), GREY)
    expected[:, 0, 0] = image[:, 1, 2]
    expected[:, 2, 2] = image[:, 3, 4]
    assert torch.equal(crop, expected)
    assert round(GREY * 255) == 0x99


# ---- the colours ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(32, 32), (90, 50), (40, 41), (21, 77), (10, 12)])
def test_crops_are_resized_as_by_clips_processor(
    geneval_folder: Path, height: int, width: int
) -> None:
    image = pictures(1, height, width)[0]
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    expected = processor(as_pil(image), return_tensors="pt")["pixel_values"][0]
    pixels = ColourJudge(source(geneval_folder / "clip"), 4).preprocess(image)
    # two roundings to 8 bits; the second pass weighs the first's by at most 1.25 in all (bicubic)
    assert (pixels - expected).abs().max() <= (1.2 / 255) / min(_pixels.CLIP[1])


def test_a_stripe_is_seen_in_its_middle(geneval_folder: Path) -> None:
    """Cutting the far ends off first changes nothing: the middle square is all that is seen."""
    judge = ColourJudge(source(geneval_folder / "clip"), 4)
    stripe = pictures(1, 4, 1000)[0]
    middle = judge.preprocess(stripe[:, :, 484:516])
    assert torch.allclose(judge.preprocess(stripe), middle, atol=1e-5)
    assert torch.allclose(judge.preprocess(stripe.mT), middle.mT, atol=1e-5)


def test_colours_are_clips_zero_shot_classes(geneval_folder: Path) -> None:
    images = pictures(24, 20, 28)
    kinds = ["dog", "wine glass", "cup"] * 8
    judge = ColourJudge(source(geneval_folder / "clip"), 5)
    with torch.no_grad():
        got = judge(list(images), kinds)
    model = CLIPModel.from_pretrained(geneval_folder / "clip").double()
    tokenizer = CLIPTokenizer.from_pretrained(geneval_folder / "clip")
    for image, kind, colour in zip(images, kinds, got, strict=True):
        cosines = {}
        for c in COLOURS:
            forms = [f"a photo of a {c} {kind}", f"a photo of a {c}-colored {kind}"]
            tokens = tokenizer(
                [*forms, f"a photo of a {c} object"], padding="max_length", return_tensors="pt"
            )
            with torch.no_grad():
                out = model(pixel_values=judge.preprocess(image).double()[None], **tokens)
            direction = out.text_embeds.mean(0)
            cosines[c] = float(out.image_embeds[0] @ direction / direction.norm())
        assert max(cosines.values()) - cosines[colour] < 1e-6  # fp32 rounding of numbers below 1
    assert len(set(got)) > 2
    assert judge([], []) == []


def test_a_class_is_encoded_once(geneval_folder: Path) -> None:
    judge = ColourJudge(source(geneval_folder / "clip"), 4)
    with torch.no_grad():
        assert judge.texts("dog") is judge.texts("dog")
        assert not torch.equal(judge.texts("dog"), judge.texts("cat"))
