"""GenEval: the grammar, the rules on boxes, the reward on tiny random models of real classes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Mask2FormerConfig,
    Mask2FormerModel,
    SwinConfig,
)

from gardo import plugins
from gardo.rewards.geneval import Geneval, GenevalSettings
from gardo.rewards.geneval_prompts import (
    CLASSES,
    COLOURS,
    NUMBERS,
    RELATIONS,
    TASKS,
    Asked,
    Request,
    parse,
    prompts,
    text,
)
from gardo.rewards.geneval_rules import MOST, Found, fraction, keep, relations, strict, verdicts
from gardo.rewards.geneval_vision import InstanceSegmenter, Sighting, bounds, cut_out
from gardo.settings import model_path

CPU = torch.device("cpu")

# ---- the grammar ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "request_"),
    [
        ("a photo of a bench", Request("single_object", (Asked("bench"),))),
        ("a photo of an orange", Request("single_object", (Asked("orange"),))),
        ("a photo of a bowl and an apple", Request("two_object", (Asked("bowl"), Asked("apple")))),
        ("a photo of three benchs", Request("counting", (Asked("bench", 3),))),
        ("a photo of two buses", Request("counting", (Asked("bus", 2),))),
        ("a photo of eleven skises", Request("counting", (Asked("skis", 11),))),
        ("a photo of an orange cup", Request("colors", (Asked("cup", colour="orange"),))),
        ("a photo of an orange orange", Request("colors", (Asked("orange", colour="orange"),))),
        ("a photo of a cow right of a laptop",
         Request("position", (Asked("cow"), Asked("laptop")), "right of")),
        ("a photo of a purple wine glass and a black apple",
         Request("color_attr", (Asked("wine glass", colour="purple"),
                                Asked("apple", colour="black")))),
    ],
)  # fmt: skip
def test_prompts_are_read(prompt: str, request_: Request) -> None:
    assert parse(prompt) == request_
    assert text(request_) == prompt


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("a picture of a dog", "does not open with 'a photo of'"),
        ("a photo of a dgo", "did you mean 'dog'"),
        ("a photo of dog", "opens with neither"),
        ("a photo of an dog", "GenEval writes 'a dog'"),
        ("a photo of a mauve dog", "is not one of GenEval's 80 classes"),
        ("a photo of two dog", "is not the plural"),
        ("a photo of sixteen dogs", "opens with neither"),
        ("a photo of a dog and a dog", "asked for twice"),
        ("a photo of a red dog and a cat", "one object has a colour and the other none"),
        ("a photo of a red dog above a cat", "a colour beside 'above'"),
    ],
)
def test_other_prompts_are_refused(prompt: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        Geneval.check_prompt(prompt)
    assert repr(prompt) in str(error.value)


@given(task=st.sampled_from(TASKS), seed=st.integers(0, 10**6))
def test_drawn_prompts_are_read_back(task: str, seed: int) -> None:
    drawn = prompts(task, 20, seed, numbers=list(NUMBERS))  # type: ignore[arg-type]
    assert len(set(drawn)) == 20 and drawn == prompts(task, 20, seed, numbers=list(NUMBERS))  # type: ignore[arg-type]
    for prompt in drawn:
        request = parse(prompt)
        assert request.task == task and text(request) == prompt
        assert all(a.count == 1 or 2 <= a.count <= 15 for a in request.objects)


def test_all_that_a_task_can_ask_is_drawn_once() -> None:
    two = ["dog", "cat"]
    assert set(prompts("position", 8, 0, two)) == {
        f"a photo of a {a} {relation} a {b}"
        for (a, b), relation in itertools.product([("dog", "cat"), ("cat", "dog")], RELATIONS)
    }
    with pytest.raises(ValueError, match="position can ask 8 things of these classes, not 9"):
        prompts("position", 9, 0, two)
    with pytest.raises(ValueError, match="not all 2 to 15"):
        prompts("counting", 1, 0, numbers=[1])
    assert not any("person" in p for p in prompts("colors", 100, 1))
    assert len(CLASSES) == len(set(CLASSES)) == 80


# ---- the rules -----------------------------------------------------------------------------------


def box(x: float, y: float, size: float = 10) -> tuple[float, float, float, float]:
    return x, y, x + size, y + size


def found(name: str, score: float = 0.9, at: tuple[float, ...] = (0, 0), **more: Any) -> Found:
    return Found(name, score, box(*at), **more)


@pytest.mark.parametrize(
    ("offset", "holds"),
    [
        ((30, 0), {"right of"}),
        ((-30, 0), {"left of"}),
        ((0, 30), {"below"}),  # y grows downwards
        ((0, -30), {"above"}),
        ((30, 30), {"right of", "below"}),
        ((-30, -30), {"left of", "above"}),
        ((0, 0), set()),
        ((2, 0), set()),  # within the margin: a tenth of both widths
        ((2.01, 0), set()),  # past it, but the offset beyond is small against the distance
        ((5, 0), {"right of"}),  # (5 - 2) / 5
        ((3.99, 0), set()),  # (3.99 - 2) / 3.99 < 1 / 2
        ((30, 10), {"right of"}),
    ],
)
def test_relations_of_two_boxes(offset: tuple[float, float], holds: set[str]) -> None:
    assert relations(box(100 + offset[0], 100 + offset[1]), box(100, 100)) == holds


@given(x=st.floats(-200, 200), y=st.floats(-200, 200), w=st.floats(1, 100), h=st.floats(1, 100))
def test_relations_turn_round_with_the_boxes(x: float, y: float, w: float, h: float) -> None:
    a, b = (x, y, x + w, y + h), box(0, 0)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(b, a) == {opposite[r] for r in relations(a, b)}
    assert len(relations(a, b)) <= 2


def test_what_is_kept() -> None:
    """Surer than the task's threshold, at most 16 of a class, the surest first."""
    things = [found("dog", s / 100) for s in (30, 31, 90, 91, 95)] + [found("cat", 0.5)]
    assert [t.score for t in keep(things, "counting")] == [0.95, 0.91]
    assert [t.score for t in keep(things, "colors")] == [0.95, 0.91, 0.9, 0.5, 0.31]
    many = [found("dog", 0.9 + i / 1000) for i in range(1, 30)] + [found("cat", 0.91)]
    kept = keep(many, "counting")
    assert sum(t.name == "dog" for t in kept) == MOST and kept[-1].name in ("dog", "cat")
    assert kept[0].score == 0.9 + 29 / 1000
    first, second = found("dog", 0.8, (0, 0)), found("dog", 0.8, (5, 5))
    assert keep([first, second], "colors") == [first, second]  # equally sure: the earlier
    assert keep([], "counting") == []


@pytest.mark.parametrize("there", range(6))
@pytest.mark.parametrize("asked", [2, 3, 4])
def test_counting_is_exact(asked: int, there: int) -> None:
    request = Request("counting", (Asked("dog", asked),))
    kept = [found("dog")] * there + [found("cat")]
    assert verdicts(request, kept) == [there == asked]


def test_every_rule_of_every_task() -> None:
    dog, cat = found("dog", at=(50, 0), colour="red"), found("cat", at=(0, 0), colour="black")
    single = Request("single_object", (Asked("dog"),))
    assert verdicts(single, [dog]) == verdicts(single, [cat, dog, dog]) == [True]
    assert verdicts(single, [cat]) == verdicts(single, []) == [False]
    two = Request("two_object", (Asked("dog"), Asked("cat")))
    assert verdicts(two, [dog, cat]) == [True, True] and verdicts(two, [cat]) == [False, True]
    colour = Request("colors", (Asked("dog", colour="red"),))
    assert verdicts(colour, [dog]) == [True, True]
    assert verdicts(colour, [replace(dog, colour="blue")]) == [True, False]
    assert verdicts(colour, []) == [False, False]
    # the surest one is looked at, not a less sure one of the right colour
    assert verdicts(colour, [replace(dog, colour="blue"), dog]) == [True, False]
    both = Request("color_attr", (Asked("dog", colour="red"), Asked("cat", colour="white")))
    assert verdicts(both, [dog, cat]) == [True, True, True, False]
    for relation in RELATIONS:
        place = Request("position", (Asked("dog"), Asked("cat")), relation)
        assert verdicts(place, [dog, cat]) == [True, True, relation == "right of"]
        assert verdicts(place, [dog]) == [True, False, False]


def test_scorings() -> None:
    assert strict([True, True]) == fraction([True, True]) == 1.0
    assert strict([True, False]) == 0.0 and fraction([True, True, False]) == pytest.approx(2 / 3)
    assert strict([False]) == fraction([False]) == 0.0


# ---- the reward ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Mask2Former with COCO's labels and a tiny CLIP, random weights."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("geneval")
    labels = {i: name.replace("computer ", "").replace("tv remote", "remote")
              for i, name in enumerate(CLASSES)}  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_feedforward_dim=16,
        dim_feedforward=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        num_queries=12, id2label=labels, label2id={v: k for k, v in labels.items()},
    )  # fmt: skip
    detector = InstanceSegmenter(config)
    with torch.no_grad():
        detector.class_predictor.weight.mul_(60)  # sure of something
    detector.save_pretrained(root / "mask2former")
    clip = root / "clip"
    tokenizer = CLIPTokenizer.from_pretrained(model_path("builtin:flux/tokenizer"))
    tokenizer.save_pretrained(clip)
    CLIPModel(
        CLIPConfig(
            text_config=CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=77, projection_dim=8,
            ).to_dict(),
            vision_config=CLIPVisionConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                image_size=32, patch_size=8, projection_dim=8,
            ).to_dict(),
            projection_dim=8,
        )
    ).save_pretrained(clip)  # fmt: skip
    return root / "mask2former", clip


def reward(folders: tuple[Path, Path], **more: Any) -> Geneval:
    detector, clip = folders
    plugin = plugins.resolve("gardo.rewards", "geneval")
    given_ = {"role": "proxy", "path": str(detector), "clip": str(clip), "size": 64, "batch": 2}
    return plugin(GenevalSettings(**(given_ | more)), CPU)


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_the_detector_is_transformers_mask2former(folders: tuple[Path, Path]) -> None:
    """Class and mask logits of the very parts, and scores by the formula."""
    detector = reward(folders).detector
    pixels = detector.preprocess(pictures(1))
    with torch.no_grad():
        classes, masks = detector.model(pixels)
        inner: Mask2FormerModel = detector.model.model
        seen = inner(pixels, output_hidden_states=True)
    hidden = seen.transformer_decoder_last_hidden_state
    hidden = hidden if hidden.shape[0] == 1 else hidden.transpose(0, 1)
    # logits of a few tens, from sums in another order: 2^-20 of them
    torch.testing.assert_close(
        classes, detector.model.class_predictor(hidden), rtol=1e-5, atol=2e-4
    )
    torch.testing.assert_close(masks, seen.masks_queries_logits[-1])
    assert classes.shape == (1, 12, 81)
    (sightings,) = detector(pictures(1), [set(CLASSES)])
    assert sightings
    for sighting in sightings:
        assert 0.3 < sighting.found.score <= 1 and sighting.mask_HW.any()
        assert sighting.found.box == bounds(sighting.mask_HW)


def test_scores_follow_the_rules_of_what_was_seen(folders: tuple[Path, Path]) -> None:
    """The whole way, with prompts made of what the random detector happens to see."""
    judge = reward(folders)
    (sightings,) = judge.detector(pictures(1), [set(CLASSES)])
    seen = {s.found.name for s in sightings}
    name = sorted(seen)[0]
    absent = next(n for n in CLASSES if n not in seen and n != "person")
    asked = [text(Request("single_object", (Asked(n),))) for n in (name, absent)]
    value, mask = judge.score(pictures(1).repeat(2, 1, 1, 1), asked)
    assert value.tolist() == [1.0, 0.0] and mask.all()
    colours = [text(Request("colors", (Asked(name, colour=c),))) for c in COLOURS]
    value, mask = judge.score(pictures(1).repeat(10, 1, 1, 1), colours)
    assert mask.all() and sorted(value.tolist()) == [0.5] * 9 + [1.0]  # exactly one colour is right
    exact, _ = reward(folders, scoring="strict").score(pictures(1).repeat(10, 1, 1, 1), colours)
    assert exact.tolist() == [float(v == 1) for v in value.tolist()]
    alone, _ = judge.score(pictures(1), [colours[int(value.argmax())]])
    assert alone.tolist() == [1.0]


def test_a_picture_that_a_model_fails_on_is_masked(folders: tuple[Path, Path]) -> None:
    images = pictures(3)
    images[1] = torch.nan
    value, mask = reward(folders).score(images, ["a photo of a dog"] * 3)
    assert mask.tolist() == [True, False, True] and value.isfinite().all()


def test_an_object_is_cut_out_on_grey() -> None:
    image = torch.zeros(3, 4, 5)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2] = mask[2, 3] = True
    crop = cut_out(image, Sighting(Found("dog", 1.0, bounds(mask)), mask))
    assert crop.shape == (3, 2, 2)
    torch.testing.assert_close(crop[0], torch.tensor([[0, 0.6], [0.6, 0]]))


def test_other_folders_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    detector, clip = folders
    with pytest.raises(ValueError, match="no model folder"):
        reward(folders, path=str(tmp_path))
    with pytest.raises(ValueError, match="is a clip model, not mask2former"):
        reward(folders, path=str(clip))
    with pytest.raises(ValueError, match="is a mask2former model, not clip"):
        reward(folders, clip=str(detector))
