"""GenEval's score as a reward (arXiv 2310.11513): does the picture show what the prompt asks?

    fraction  the share of the prompt's rules that hold
    strict    1 if all of them hold, else 0: what GenEval itself reports

The prompt says what to look for: its text (geneval_prompts.py), or the metadata beside it in
GenEval's own files (geneval_metadata.py). Mask2Former finds the objects and CLIP names their
colours (geneval_vision.py, with the preprocessing); the rules are GenEval's (geneval_rules.py). In
[0, 1]. Each object that is asked for is a rule, as are its colour, the place and, in `counting`,
the exact number: there, `fraction` is 0 or 1.

GenEval ran its detector at 800 pixels, larger than the pictures. Its overall score is the mean over
the six tasks of the strict score. Not verified against the published weights yet.

    rewards:
      objects: {kind: geneval, role: proxy, scoring: fraction}

Shapes: B images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field

from gardo.lazily import no_grad
from gardo.rewards._files import TOKENIZER_FILES, ModelFolder, ModelRewardSettings
from gardo.rewards.base import About, Holds, Reward
from gardo.rewards.geneval_metadata import request_of
from gardo.rewards.geneval_prompts import Request
from gardo.rewards.geneval_rules import fraction, judged, keep, strict, verdicts
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

SCORINGS = {"fraction": fraction, "strict": strict}


class GenevalSettings(ModelRewardSettings):
    kind: Literal["geneval"] = "geneval"
    scoring: Literal["fraction", "strict"] = Field(
        "fraction",
        description="share of the prompt's rules that hold, or 1 where all of them do and 0 "
        "elsewhere",
    )
    path: Annotated[ModelFolder, Holds("Mask2FormerForUniversalSegmentation")] = Field(
        "facebook/mask2former-swin-small-coco-instance",
        description="Mask2Former for COCO's instances: hub id or folder",
    )
    clip: Annotated[ModelFolder, TOKENIZER_FILES, Holds("CLIPModel")] = Field(
        "openai/clip-vit-large-patch14", description="CLIP: hub id or folder"
    )
    clip_revision: str | None = Field(None, description="of `clip` on the hub")
    size: int = Field(
        800, ge=32, le=8192, description="pixels of the shorter side, for the detector"
    )
    batch: int = Field(8, ge=1, description="images, or cut-out objects, that a model sees at once")
    dtype: Literal["tf32", "float32", "bfloat16"] = Field(
        "tf32", description="of the models; Mask2Former is not for float16"
    )


class Geneval(Reward):
    Settings = GenevalSettings
    limits = (0.0, 1.0)
    about = About(
        "share of the prompt's rules that hold, or all of them",
        "0 to 1",
        "CLIP: MIT; Mask2Former: read its page (CC BY-NC 4.0 at first)",
        "rules in full; detector and CLIP on tiny random models; published weights: no",
    )

    def __init__(self, settings: GenevalSettings, device: torch.device) -> None:
        from gardo.rewards.geneval_vision import ColourJudge, Detector, Source

        super().__init__(settings, device)
        dtype = settings.dtype
        detector = Source("path", settings.path, settings.revision, dtype, device)
        clip = Source("clip", settings.clip, settings.clip_revision, dtype, device)
        self.detector = Detector(detector, settings.size)
        self.colours = ColourJudge(clip, settings.batch)

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        request_of(prompt)

    @no_grad
    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        batch, score = self.settings.batch, SCORINGS[self.settings.scoring]
        values: list[float] = []
        for start in range(0, len(prompts), batch):
            images = images_B3HW[start : start + batch].to(self.device, torch.float32)
            asked = [request_of(prompt) for prompt in prompts[start : start + batch]]
            values += [math.nan if r is None else score(r) for r in self.rules(images, asked)]
        return torch.tensor(values, device=self.device)

    def rules(self, images_B3HW: Tensor, requests: Sequence[Request]) -> list[list[bool] | None]:
        """Which rules each picture fulfils; None where a model failed on it."""
        from gardo.rewards.geneval_vision import cut_out

        names = [{asked.name for asked in (*r.objects, *r.absent)} for r in requests]
        seen = self.detector(images_B3HW, names)
        kept = [
            keep(found or [], request.task) for found, request in zip(seen, requests, strict=True)
        ]
        failed = [found is None for found in seen]
        # one call of CLIP for the objects of all images
        jobs = [(i, at) for i, request in enumerate(requests) for at in judged(request, kept[i])]
        things = [kept[i][at] for i, at in jobs]
        crops = [cut_out(images_B3HW[i], thing) for (i, _), thing in zip(jobs, things, strict=True)]
        colours = self.colours(crops, [thing.name for thing in things])
        for (i, at), colour in zip(jobs, colours, strict=True):
            kept[i][at] = replace(kept[i][at], colour=colour)
            failed[i] |= colour is None
        return [
            None if failed[i] else verdicts(request, kept[i]) for i, request in enumerate(requests)
        ]


PLUGIN = Geneval
