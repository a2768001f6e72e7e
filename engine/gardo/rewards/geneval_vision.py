"""GenEval's eyes: Mask2Former finds the objects, CLIP names their colours.

    score of an object = softmax(class logits) x mean sigmoid of the mask logits inside the mask
    mask = mask logits, resized to the image, > 0        box = the mask's bounds
    colour = argmax over ten colours c of cos(image, mean of three texts that name c)

The texts: "a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object".
CLIP sees the object's box with everything outside its mask painted grey (#999).

Both steps follow evaluate_images.py of djghosh13/geneval; it ran mmdet and open_clip, this runs the
same models of transformers. Pictures are resized on tensors: for Mask2Former (bilinear,
antialiased) to `size` pixels on the shorter side, at most 1333 on the longer, both rounded up to
multiples of 32; for CLIP (bicubic, antialiased) the shorter side to the model's size, then the
middle is cut out.

Shapes: B images of H x W pixels, Q queries, C classes, N crops, D the width of CLIP's embedding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPModel,
    Mask2FormerModel,
    Mask2FormerPreTrainedModel,
)
from transformers.image_transforms import get_size_with_aspect_ratio

from gardo.rewards._loading import frozen, load_model
from gardo.rewards._pixels import IMAGENET, for_clip, normalised, resized
from gardo.rewards.geneval_prompts import CLASSES, COLOURS
from gardo.rewards.geneval_rules import THRESHOLD, Found
from gardo.settings import model_path

GREY = 0x99 / 255
LONGEST = 1333
MULTIPLE = 32
TEXTS = ("a photo of a {c} {name}", "a photo of a {c}-colored {name}", "a photo of a {c} object")

# What checkpoints call a class, without spaces, where GenEval has another name
SPELLINGS = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "tvmonitor": "tv",
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
} | {name.replace(" ", ""): name for name in CLASSES}


@dataclass(frozen=True)
class Source:
    """Where a model comes from and how it runs; `field` is the setting that names it."""

    field: str
    path: str
    revision: str | None
    dtype: str
    device: torch.device

    def load(self, model_class: Any) -> Any:
        model = load_model(model_class, self.path, self.revision, field=self.field)
        return frozen(model, self.dtype, self.device, (self.path, self.revision))

    def tokenizer(self) -> Any:
        try:
            return AutoTokenizer.from_pretrained(model_path(self.path), revision=self.revision)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self} holds no tokenizer: {error}") from error

    def __str__(self) -> str:
        return f"{self.field}: {self.path!r}"


class InstanceSegmenter(Mask2FormerPreTrainedModel):
    """Mask2FormerForUniversalSegmentation without its training loss, which alone needs scipy."""

    _keys_to_ignore_on_load_unexpected = [r"^criterion\."]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits [B, Q, C + 1], the last of them "nothing", and mask logits [B, Q, h, w]."""
        seen = self.model(pixel_values, output_hidden_states=True)
        queries = seen.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(queries), seen.masks_queries_logits[-1]


@dataclass(frozen=True, kw_only=True)
class Sighting(Found):
    """A found object with its mask, bool [H, W]."""

    mask_HW: Tensor


class Detector:
    """Mask2Former trained on the instances of COCO."""

    def __init__(self, source: Source, size: int) -> None:
        self.source, self.size = source, size
        self.model = source.load(InstanceSegmenter)
        self.label = {
            name: label
            for label, spelling in self.model.config.id2label.items()
            if (name := SPELLINGS.get(spelling.lower().replace(" ", "")))
        }
        if missing := [name for name in CLASSES if name not in self.label]:
            raise ValueError(
                f"{source} does not know {len(missing)} of COCO's 80 classes, "
                f"{missing[0]!r} first; the detector must be one for COCO's instances"
            )

    def preprocess(self, images_B3HW: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> normalised [B, 3, h, w], h and w multiples of 32."""
        shape = get_size_with_aspect_ratio(tuple(images_B3HW.shape[-2:]), self.size, LONGEST)
        height, width = (math.ceil(side / MULTIPLE) * MULTIPLE for side in shape)
        return normalised(resized(images_B3HW, height, width, "bilinear"), IMAGENET)

    def __call__(
        self, images_B3HW: Tensor, names: Sequence[Collection[str]]
    ) -> list[list[Sighting] | None]:
        """For each image its objects of those classes, in no order; unsure ones may be left out.

        None where the model's output is not finite.
        """
        pixels = self.preprocess(images_B3HW).to(self.model.dtype)
        classes_BQC, masks_BQhw = (logits.float() for logits in self.model(pixels))
        finite_B = classes_BQC.isfinite().all((1, 2)) & masks_BQhw.isfinite().all((1, 2, 3))
        return [
            self._sightings(classes_BQC[i], masks_BQhw[i], tuple(images_B3HW.shape[-2:]), names[i])
            if finite
            else None
            for i, finite in enumerate(finite_B.tolist())
        ]

    def _sightings(
        self,
        classes_QC: Tensor,
        masks_Qhw: Tensor,
        shape: tuple[int, ...],
        names: Collection[str],
    ) -> list[Sighting]:
        """The Q surest pairs of query and class are candidates, as in Mask2Former's release."""
        scores_QC = classes_QC.softmax(-1)[:, :-1]
        surest = scores_QC.flatten().topk(len(scores_QC))
        wanted = {self.label[name]: name for name in names}
        # the mask's factor is at most 1, so a pair below the threshold stays below
        candidates = [
            (*divmod(index, scores_QC.shape[1]), score)
            for score, index in zip(surest.values.tolist(), surest.indices.tolist(), strict=True)
            if score > THRESHOLD and index % scores_QC.shape[1] in wanted
        ]
        found = []
        for query, label, score in candidates:
            logits_HW = F.interpolate(masks_Qhw[None, query, None], shape, mode="bilinear")[0, 0]
            mask_HW = logits_HW > 0
            area = mask_HW.sum().item()
            if not area:
                continue
            score *= (logits_HW.sigmoid() * mask_HW).sum().item() / (area + 1e-6)
            box = bounds(mask_HW)
            found.append(Sighting(name=wanted[label], score=score, box=box, mask_HW=mask_HW))
        return found


def bounds(mask_HW: Tensor) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the true pixels, right and bottom just past them."""
    rows = mask_HW.any(1).nonzero()[:, 0].tolist()
    columns = mask_HW.any(0).nonzero()[:, 0].tolist()
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


class ColourJudge:
    """Zero-shot colours by CLIP."""

    def __init__(self, source: Source, batch: int) -> None:
        self.source, self.batch = source, batch
        self.model, self.tokenizer = source.load(CLIPModel), source.tokenizer()
        # without its files, transformers gives a tokenizer that knows no word
        tokens = [tuple(ids) for ids in self.tokenizer(list(COLOURS))["input_ids"]]
        known = self.model.config.text_config.vocab_size
        if len(set(tokens)) < len(COLOURS) or max(map(max, tokens)) >= known:
            raise ValueError(f"{source} holds no tokenizer for its model")
        self.size = self.model.config.vision_config.image_size
        self._colours: dict[str, Tensor] = {}

    def preprocess(self, crop_3HW: Tensor) -> Tensor:
        """[3, h, w] in [0, 1] -> normalised [3, S, S], by clip-crop-1 of _pixels.py."""
        height, width = crop_3HW.shape[-2:]
        short = min(height, width)
        # only the middle is seen; a crop one pixel wide would grow to a huge stripe
        top, left = (max(side - 8 * short, 0) // 2 for side in (height, width))
        crop_3HW = crop_3HW[:, top : height - top, left : width - left]
        return for_clip(crop_3HW[None], self.size)[0]

    def texts(self, name: str) -> Tensor:
        """fp32 [10, D]: a direction for each colour of a class; encoded once."""
        if name not in self._colours:
            texts = [form.format(c=c, name=name) for c in COLOURS for form in TEXTS]
            tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            features = self.model.get_text_features(
                tokens["input_ids"].to(self.source.device),
                tokens["attention_mask"].to(self.source.device),
            ).pooler_output
            directions = F.normalize(features.float())
            means = directions.unflatten(0, (len(COLOURS), len(TEXTS))).mean(1)
            self._colours[name] = F.normalize(means)
        return self._colours[name]

    def __call__(self, crops: Sequence[Tensor], names: Sequence[str]) -> list[str | None]:
        """The colour of each object, None where CLIP's output is not finite.

        crops: fp32 [3, h, w] in [0, 1] of any size; names: the class of each.
        """
        if not crops:
            return []
        colours_N10D = torch.stack([self.texts(name) for name in names])
        features = []
        for start in range(0, len(crops), self.batch):
            pixels = [self.preprocess(crop) for crop in crops[start : start + self.batch]]
            seen = self.model.get_image_features(torch.stack(pixels).to(self.model.dtype))
            features.append(seen.pooler_output)
        images_ND = F.normalize(torch.cat(features).float())
        cosines_N10 = (colours_N10D @ images_ND[:, :, None])[..., 0]
        finite_N = cosines_N10.isfinite().all(-1).tolist()
        best_N = cosines_N10.argmax(-1).tolist()
        return [COLOURS[i] if ok else None for i, ok in zip(best_N, finite_N, strict=True)]


def cut_out(image_3HW: Tensor, sighting: Sighting) -> Tensor:
    """The object's box, grey outside its mask."""
    left, top, right, bottom = (int(side) for side in sighting.box)
    mask = sighting.mask_HW[top:bottom, left:right]
    return image_3HW[:, top:bottom, left:right].where(mask, GREY)
