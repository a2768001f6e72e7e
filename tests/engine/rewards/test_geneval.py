"""The GenEval reward on tiny random Mask2Former and CLIP models of the real classes."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.mask2former.image_processing_pil_mask2former import (
    Mask2FormerImageProcessorPil,
)

from gardo import plugins
from gardo.rewards.geneval import Geneval, GenevalSettings
from gardo.rewards.geneval_prompts import CLASSES, COLOURS, RELATIONS, Asked, Request, parse, text
from gardo.rewards.geneval_rules import Found, fraction, keep, strict, verdicts
from gardo.types import Prompt
from tests.engine.rewards.geneval_models import (
    CPU,
    SIZE,
    names,
    pictures,
    segmenter,
)

# ---- the reward ----------------------------------------------------------------------------------


def build(geneval_folder: Path, **changes: Any) -> Geneval:
    plugin = plugins.resolve("gardo.rewards", "geneval")
    paths = {"path": str(geneval_folder / "detector"), "clip": str(geneval_folder / "clip")}
    options: dict[str, Any] = {"role": "proxy", "size": SIZE, **paths, **changes}
    return plugin(plugin.Settings(**options), CPU)


def things_by_hand(reward: Geneval, image_3HW: Tensor) -> list[Found]:
    """All objects, with transformers' post-processing and one crop at a time."""
    with torch.no_grad():
        logits = reward.detector.model(reward.detector.preprocess(image_3HW[None]))
    (seen,) = Mask2FormerImageProcessorPil().post_process_instance_segmentation(
        SimpleNamespace(class_queries_logits=logits[0], masks_queries_logits=logits[1]),
        threshold=0.3,
        return_binary_maps=True,
        target_sizes=[(SIZE, SIZE)],
    )
    things = []
    for info, mask_HW in zip(seen["segments_info"], seen["segmentation"], strict=True):
        y, x = np.nonzero(mask_HW.numpy())
        box = (x.min(), y.min(), x.max() + 1, y.max() + 1)
        name = CLASSES[info["label_id"]]
        grey = torch.where(mask_HW.bool(), image_3HW, torch.tensor(0x99 / 255))
        with torch.no_grad():
            (colour,) = reward.colours([grey[:, box[1] : box[3], box[0] : box[2]]], [name])
        things.append(Found(name, info["score"], box, colour))
    return things


def asked_of(things: list[Found]) -> list[str]:
    """Prompts of all tasks about what is in a picture, and about what is not."""
    kept = keep(things, "colors")
    a, b = list(dict.fromkeys(thing.name for thing in kept))[:2]
    absent = next(name for name in CLASSES if name not in [thing.name for thing in kept])
    requests = [
        *(Request("single_object", (Asked(name),)) for name in (a, absent)),
        *(Request("two_object", (Asked(a), Asked(name))) for name in (b, absent)),
        *(Request("counting", (Asked(t.name, n),)) for t in kept for n in (2, 3, 4)),
        *(Request("colors", (Asked(t.name, colour=t.colour),)) for t in kept[:3]),
        Request("colors", (Asked(absent, colour="red"),)),
        *(
            Request("position", (Asked(one), Asked(other)), relation)
            for one, other in itertools.permutations(dict.fromkeys(t.name for t in kept), 2)
            for relation in RELATIONS
        ),
        *(
            Request("color_attr", (Asked(a, colour=first), Asked(b, colour=second)))
            for first, second in itertools.product({kept[0].colour, "red"}, COLOURS)
        ),
    ]
    return [text(request) for request in requests]


def test_the_score_is_that_of_the_rules(geneval_folder: Path) -> None:
    image = pictures(2)[1]
    rewards = {
        scoring: build(geneval_folder, scoring=scoring) for scoring in ("fraction", "strict")
    }
    things = things_by_hand(rewards["strict"], image)
    asked = asked_of(things)
    expected = [verdicts(parse(p), keep(things, parse(p).task)) for p in asked]
    # a draw of the prompts, with for each task one that is fulfilled and one that is not
    rows = {
        (parse(p).task, all(rules)): i
        for i, (p, rules) in enumerate(zip(asked, expected, strict=True))
    }
    assert len(rows) == 12
    prompts = [Prompt(asked[i]) for i in rows.values()]
    for scoring, score_of in (("fraction", fraction), ("strict", strict)):
        values = rewards[scoring].score(image.expand(12, -1, -1, -1), prompts)
        assert values.dtype == torch.float32
        assert (
            values.tolist() == torch.tensor([score_of(expected[i]) for i in rows.values()]).tolist()
        )


MIXED = [
    Prompt("a photo of a cow"),
    Prompt("a photo of a white dog"),
    Prompt("a photo of a white cow and a red dog"),
]


def test_the_batch_does_not_matter(geneval_folder: Path) -> None:
    images, prompts = pictures(5), [*MIXED, *MIXED[:2]]
    alone = build(geneval_folder, batch=1).score(images, prompts)
    for batch in (4, 5):
        assert torch.equal(build(geneval_folder, batch=batch).score(images, prompts), alone)
    assert len(set(alone.tolist())) > 1


def test_a_failed_picture_has_no_value(geneval_folder: Path) -> None:
    images = pictures()
    prompts = [Prompt(f"a photo of a {thing}") for thing in ("dog", "red dog", "cat")]
    reward = build(geneval_folder, size=64)
    fine = reward.score(images, prompts)
    images[1, 0, 3, 3] = torch.nan
    values = reward.score(images, prompts)
    assert values.isfinite().tolist() == [True, False, True]
    assert values[0] == fine[0] and values[2] == fine[2]


def test_a_colour_that_clip_cannot_name_is_a_failure(geneval_folder: Path) -> None:
    reward = build(geneval_folder)
    images = pictures()
    assert reward.score(images, MIXED).isfinite().tolist() == [True, True, True]
    reward.colours.model.visual_projection.weight.fill_(torch.inf)
    assert reward.score(images, MIXED).isfinite().tolist() == [True, False, False]


def test_half_precision_runs_and_agrees(geneval_folder: Path) -> None:
    images = pictures()
    half, full = build(geneval_folder, dtype="bfloat16"), build(geneval_folder)
    assert half.score(images, MIXED).isfinite().all()
    pixels = full.detector.preprocess(images)
    with torch.no_grad():
        logits = half.detector.model(pixels.bfloat16())[0].float()
        expected = full.detector.model(pixels)[0]
    # bf16 keeps 2^-8; some 30 roundings in a row add up to 2^-8 sqrt(30) = 0.02; twice that
    assert (logits - expected).square().mean().sqrt() < 0.04 * expected.square().mean().sqrt()


def test_no_gradient_and_no_weights_to_train(geneval_folder: Path) -> None:
    reward = build(geneval_folder, size=64)
    values = reward.score(pictures(1).requires_grad_(), MIXED[:1])
    assert not values.requires_grad and not reward.differentiable
    for model in (reward.detector.model, reward.colours.model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())


# ---- bad input -----------------------------------------------------------------------------------


def test_a_prompt_out_of_the_grammar_is_refused_at_load() -> None:
    Geneval.check_prompt(Prompt("a photo of a red dog"))
    with pytest.raises(ValueError, match="'a red dog' is no GenEval prompt"):
        Geneval.check_prompt(Prompt("a red dog"))


@pytest.mark.parametrize("field", ["path", "clip"])
def test_a_folder_that_is_not_there(field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{field}\n.*no folder with config.json"):
        GenevalSettings(role="proxy", **{field: str(tmp_path / "none")})
    GenevalSettings(role="proxy")  # the hub ids, which nothing is asked about yet


def test_models_of_another_kind(geneval_folder: Path) -> None:
    detector, clip = str(geneval_folder / "detector"), str(geneval_folder / "clip")
    with pytest.raises(ValueError, match=f"path: {clip!r} .* type 'clip'; it must be mask2former"):
        build(geneval_folder, path=clip)
    with pytest.raises(ValueError, match=f"clip: {detector!r} .* 'mask2former'; it must be clip"):
        build(geneval_folder, clip=detector)


def test_a_detector_for_other_classes(geneval_folder: Path, tmp_path: Path) -> None:
    labels = [*CLASSES[:40], *(f"{name}-other" for name in CLASSES[40:])]
    segmenter(**names(labels)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not know 40 of COCO's 80 classes, 'wine glass'"):
        build(geneval_folder, path=str(tmp_path))


def test_folders_with_parts_missing(geneval_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(geneval_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "clip" / "tokenizer.json").unlink()
    (tmp_path / "clip" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"clip: .*clip' holds no tokenizer"):
        build(tmp_path)
    (tmp_path / "detector" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"path: .*detector' holds no weights"):
        build(tmp_path)
    (tmp_path / "detector" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"detector/config\.json' cannot be read"):
        build(tmp_path)


def test_weights_that_do_not_fill_the_model(geneval_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(geneval_folder, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "detector" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "encoder_layers": values["encoder_layers"] + 1}))
    with pytest.raises(ValueError, match=r"detector' lacks model.* and 15 more; is it a whole"):
        build(tmp_path)
