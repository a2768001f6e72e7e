"""OCR: does the picture show the text that the prompt quotes?

    rewards:
      text: {kind: ocr, role: proxy}
    prompt: a shop window with a sign that says "OPEN TODAY"

The target is what stands between the first pair of quotes ("..." or “...”), or the "text" of a
prompt's metadata. Target and what the reader saw are compared in lower case and without spaces:

    strict (default):  1 - min(edit, len) / len      edit: Levenshtein distance to the target
    compat:            1 where the target is a part of what was read, else as strict
                                                     len: characters of the target

The value is in [0, 1]. `compat` is Flow-GRPO's reward (arXiv 2505.05470, flow_grpo/ocr.py): it
gives full marks to a picture full of other text, and to a target that is repeated; `strict` counts
every extra character as an error.

The reader is RapidOCR with the models in its wheel (Flow-GRPO uses PaddleOCR's; the models differ).
It sees 8-bit pictures in their own size; the shorter side is enlarged to `limit_side_len` where it
is smaller (preprocessing id "rapidocr-512", with the number). It needs the extra `rewards`.

An image on which the reader fails, or with a value that is not finite, is masked and a warning says
why. With `workers`, that many processes read in parallel, and a reader that dies takes no more than
its own image along; without, this process reads.

Shapes: B images.
"""

from __future__ import annotations

import multiprocessing
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw
from pydantic import Field

from gardo.lazily import no_grad
from gardo.rewards._pixels import eight_bits
from gardo.rewards.base import About, Reward, RewardSettings
from gardo.rewards.ocr_prompts import plain
from gardo.rewards.ocr_reader import LIBRARIES, end_with_parent, read, require
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

QUOTED = re.compile(r'"([^"]*)"|“([^“”]*)”')


class OcrSettings(RewardSettings):
    kind: Literal["ocr"] = "ocr"
    matching: Literal["strict", "compat"] = Field(
        "strict", description="compat: Flow-GRPO's, text beside the target costs nothing"
    )
    limit_side_len: int = Field(
        512, ge=32, description="pixels; a picture whose shorter side is smaller is enlarged"
    )
    workers: int = Field(0, ge=0, description="processes that read; 0: this one")
    batch: int = Field(64, ge=1, description="images that are made 8-bit pictures at once")


def target_of(prompt: Prompt) -> str:
    """The "text" of the metadata, or what is in the first pair of quotes; plain.

    ValueError where there is none, or nothing in it.
    """
    if "text" in prompt.metadata:
        text = prompt.metadata["text"]
        if not isinstance(text, str) or not plain(text):
            raise ValueError(f'{prompt!r}: "text" is {text!r}; it must be the text to look for')
        return plain(text)
    found = QUOTED.search(prompt)
    if not found:
        raise ValueError(
            f"{prompt!r} has no text in quotes for ocr to look for; write it as in: a sign that "
            'says "OPEN", or give its "text" in a .jsonl file'
        )
    target = plain(found[1] or found[2] or "")
    if not target:
        raise ValueError(f"{prompt!r}: the first pair of quotes is empty; ocr looks for its text")
    return target


def strict(seen: str, target: str) -> float:
    from rapidfuzz.distance import Levenshtein

    return 1 - min(Levenshtein.distance(seen, target), len(target)) / len(target)


def compat(seen: str, target: str) -> float:
    return 1.0 if target in seen else strict(seen, target)


MATCHING = {"strict": strict, "compat": compat}


def to_pictures(images_B3HW: Tensor) -> list[np.ndarray | None]:
    """[H, W, 3] in 8 bits and BGR order; None where an image is not finite."""
    return eight_bits(images_B3HW.flip(1))


def sign(text: str) -> np.ndarray:
    """Black on white, [128, 256, 3]."""
    picture = Image.new("RGB", (256, 128), "white")
    ImageDraw.Draw(picture).text((128, 64), text, "black", anchor="mm", font_size=48)
    return np.array(picture)


class Ocr(Reward):
    Settings = OcrSettings
    packages = LIBRARIES
    limits = (0.0, 1.0)
    about = About(
        "1 - min(edit, len) / len of the quoted text",
        "0 to 1",
        "Apache-2.0 (rapidocr)",
        "with the real reader, on rendered text",
    )

    def __init__(self, settings: OcrSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        require()
        threads = 1 if settings.workers else torch.get_num_threads()
        self.read = partial(read, limit_side_len=settings.limit_side_len, threads=threads)
        self.pool = self._new_pool() if settings.workers else None
        first = sign("OK")  # loads all models: a reader that cannot start must say so now
        self._text(first, self._submit(first) if self.pool else None)

    def _new_pool(self) -> ProcessPoolExecutor:
        """Started from scratch: a forked copy of a process with threads or CUDA may hang."""
        return ProcessPoolExecutor(
            self.settings.workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=end_with_parent,
        )

    def texts(self, pictures: Sequence[np.ndarray | None], first: int = 0) -> list[str | None]:
        """What each picture says; None where it cannot be read. Warnings count from `first`."""
        submitted = [
            self._submit(picture) if self.pool and picture is not None else None
            for picture in pictures
        ]
        texts: list[str | None] = []
        for i, (picture, future) in enumerate(zip(pictures, submitted, strict=True), first):
            try:
                texts.append(self._text(picture, future))
            except Exception as error:  # whatever a picture makes the reader do
                warnings.warn(f"ocr: image {i} cannot be read: {error!r}", stacklevel=2)
                texts.append(None)
        return texts

    def _submit(self, picture: np.ndarray) -> Future[str]:
        assert self.pool
        try:
            return self.pool.submit(self.read, picture)
        except BrokenProcessPool:  # a worker died since
            self.pool = self._new_pool()
            return self.pool.submit(self.read, picture)

    def _text(self, picture: np.ndarray | None, future: Future[str] | None) -> str:
        if picture is None:
            raise ValueError("it has values that are not finite")
        if future is None:
            return self.read(picture)
        try:
            return future.result()
        except BrokenProcessPool:  # not necessarily this picture's fault: once more, alone
            return self._submit(picture).result()

    @no_grad
    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        match = MATCHING[self.settings.matching]
        texts: list[str | None] = []
        for part in images_B3HW.split(self.settings.batch):
            texts += self.texts(to_pictures(part), len(texts))
        values = [
            float("nan") if text is None else match(plain(text), target_of(prompt))
            for text, prompt in zip(texts, prompts, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float32, device=images_B3HW.device)

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        target_of(prompt)


PLUGIN = Ocr
