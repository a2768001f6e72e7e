"""Evaluation during a run: each time the same prompts and noise through the diffusers pipeline.

The unit of every interval is the prompt: images of a prompt are averaged first. Changes are paired
with the first evaluation.

Shapes: E evaluation prompts, n images each, I = E n images, B images of one forward.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, field_validator

from gardo.distributed.base import Engine
from gardo.evaluation import attributes
from gardo.evaluation.drawing import (
    FEATURES,
    LABEL,
    REWARD,
    FixedImages,
    distances,
    judged,
    of_kind,
    shown_prompts,
)
from gardo.evaluation.statistics import bootstrap_mean, entropy, paired_change, prompt_means
from gardo.hf_prompts import is_dataset
from gardo.lazily import no_grad
from gardo.policies.base import Policy
from gardo.report.pictures import save_grid
from gardo.rewards.panel import Panel
from gardo.settings import Strict
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from gardo_kernels import Backend

Diversity = Literal["none", "attributes", "features", "both"]

HELD_OUT = "held_out"


class DiversitySettings(Strict):
    """How images are told apart: by features, or by attributes of the tiny world."""

    diversity: Diversity = Field(
        "none",
        description="how images of a prompt are told apart: by the reward of role features, by "
        "attributes of the tiny world, both, or not",
    )

    @property
    def measures_attributes(self) -> bool:
        return self.diversity in ("attributes", "both")

    @property
    def measures_features(self) -> bool:
        return self.diversity in ("features", "both")

    def check_prompt(self, prompt: str) -> None:
        """ValueError where the images of a prompt could not be measured as `diversity` says."""
        if self.measures_attributes:
            attributes.check_prompt(prompt)


class EvaluateSettings(DiversitySettings):
    """Fixed-noise images of fixed prompts through the pipeline; unit of the intervals = prompt."""

    every: int = Field(
        50, ge=1, description="iterations; the first and the last are always evaluated"
    )
    prompts: str | None = Field(
        None,
        description="a file, as data.prompts; held_out: those that data.held_out keeps. If left "
        "out: held_out, or where it keeps none the training prompts",
    )
    prompt_count: int | None = Field(None, ge=1, description="the first so many; all if left out")
    images_per_prompt: int = Field(
        8,
        ge=1,
        le=10_000,
        description="images of each prompt, the noise the same every time",
    )
    steps: int = Field(8, ge=1, le=1000, description="denoise steps")
    batch: int = Field(16, ge=1, le=100_000, description="images a forward")
    shown: int = Field(6, ge=1, description="prompts in the sample picture")

    @field_validator("prompts")
    @classmethod
    def _is_a_file(cls, prompts: str | None) -> str | None:
        if is_dataset(prompts):
            raise ValueError(
                f"{prompts!r}: a data set is for data.prompts; write held_out and keep a share of "
                "it by data.held_out, or name a file"
            )
        return prompts


class Evaluator:
    """Evaluates the weights that are in place; every rank calls it, every rank gets the record."""

    def __init__(
        self,
        policy: Policy,
        panel: Panel,
        engine: Engine,
        prompts: Sequence[Prompt],
        settings: EvaluateSettings,
        *,
        seed: int,
        folder: Path,
        kernels: Backend = "auto",
    ) -> None:
        self.policy, self.panel, self.engine = policy, panel, engine
        self.prompts, self.settings, self.seed, self.folder = list(prompts), settings, seed, folder
        self.kernels = kernels
        self.fixed = FixedImages(
            policy, self.prompts, settings.images_per_prompt, settings.steps, seed, kernels
        )
        self.shown = shown_prompts(len(self.prompts), settings.shown)
        self.first: dict[str, Tensor] = {}

    @property
    def identity(self) -> str:
        """Equal for evaluations whose numbers can be compared: same prompts, noise and steps."""
        settings = self.settings
        prompts = [[str(p), getattr(p, "metadata", {})] for p in self.prompts]
        of = [prompts, settings.images_per_prompt, settings.steps, self.seed]
        return hashlib.sha256(json.dumps(of, sort_keys=True, default=str).encode()).hexdigest()

    def restore(self, first: Mapping[str, Sequence[float]]) -> None:
        """The per-prompt means of the first evaluation of this run, from before a resume."""
        device = self.engine.device
        self.first = {
            n: torch.tensor(v, dtype=torch.float64, device=device) for n, v in first.items()
        }

    def batch(self, image_B: Tensor) -> tuple[Tensor, list[Prompt]]:
        """Images and prompts of the evaluation images with these indices."""
        return self.fixed.draw(image_B)

    def _batches(self) -> Iterator[Tensor]:
        """Indices of this rank's images, equally many on every rank: some lie past the end."""
        batch, engine = self.settings.batch, self.engine
        for call in range(math.ceil(math.ceil(self.fixed.total / batch) / engine.world)):
            start = (call * engine.world + engine.rank) * batch
            yield torch.arange(start, start + batch, device=engine.device)

    def encode(self) -> None:
        """Has the prompts that this rank will evaluate encoded, which are then known."""
        for image_B in self._batches():
            self.fixed.encode(image_B % self.fixed.total)

    @no_grad
    def __call__(self, step: int, *, between: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The record of the weights after `step` iterations; before each batch calls `between`."""
        images_per_prompt, total = self.settings.images_per_prompt, self.fixed.total
        shown_I = torch.isin(torch.arange(total) // images_per_prompt, self.shown)
        slot_I = (shown_I.cumsum(0) - 1).where(shown_I, -1).to(self.engine.device)
        device = self.engine.device
        columns: dict[str, list[Tensor]] = {"image": []}
        picture: Tensor | None = None
        for image_B in self._batches():
            between()
            images, prompts = self.batch(image_B % total)  # past the end: repeats, dropped below
            for name, column in self._judge(images, prompts).items():
                columns.setdefault(name, []).append(column)
            columns["image"].append(image_B)
            if picture is None:
                size = (int(shown_I.sum()), *images.shape[1:])
                picture = torch.zeros(size, dtype=torch.uint8, device=device)
            slot_B = slot_I[image_B % total].where(image_B < total, -1)
            inside = slot_B >= 0
            picture[slot_B[inside]] = (images[inside] * 255).round().to(torch.uint8)
        gathered = {n: self.engine.all_gather(torch.cat(c)) for n, c in columns.items()}
        order = gathered.pop("image").argsort()[:total]
        values = {name: column[order] for name, column in gathered.items()}
        assert picture is not None
        pictures = self.engine.all_gather(picture[None]).sum(0).float() / 255
        path = Path("samples") / f"step-{step:05d}.png"
        record = self._record(step, values, str(path))
        if self.engine.rank == 0:
            try:
                save_grid(pictures, self.folder / path, columns=images_per_prompt)
            except OSError as error:  # the disk is full: numbers are worth more than a picture
                record |= {"images": None, "events": [f"{path} is not written: {error}"]}
        return record

    def _judge(self, images: Tensor, prompts: list[Prompt]) -> dict[str, Tensor]:
        features, labels = self.settings.measures_features, self.settings.measures_attributes
        return judged(self.panel, images, prompts, features=features, labels=labels)

    def _record(self, step: int, values: dict[str, Tensor], picture: str) -> dict[str, Any]:
        images_per_prompt = self.settings.images_per_prompt
        rewards, change, by_prompt = {}, {}, {}
        for name, value_I in of_kind(values, REWARD).items():
            value_E = prompt_means(value_I, images_per_prompt)
            self.first.setdefault(name, value_E)
            role = self.panel.rewards[name].settings.role
            rewards[name] = {**asdict(bootstrap_mean(value_E)), "role": role}
            change[name] = asdict(paired_change(self.first[name], value_E))
            by_prompt[name] = value_E.tolist()
        return {
            "kind": "evaluation",
            "step": step,
            "rewards": rewards,
            "change": change,
            "diversity": self._diversity(values),
            "by_prompt": by_prompt,
            "images": picture,
            "image_count": len(next(iter(values.values()))),
            "prompt_count": len(self.prompts),
            "prompts": [self.prompts[i] for i in self.shown],
        }

    def _diversity(self, values: dict[str, Tensor]) -> dict[str, float]:
        found = {name: entropy(label_I) for name, label_I in of_kind(values, LABEL).items()}
        if FEATURES in values:
            features, per_prompt = values[FEATURES], self.settings.images_per_prompt
            found[FEATURES] = 100 * float(distances(features, per_prompt, self.kernels)[1].mean())
        return found


def due(step: int, last: int, every: int) -> bool:
    """Whether to evaluate after `step` iterations of `last`."""
    return step % every == 0 or step == last
