"""Images of fixed prompts and noise through the diffusers pipeline, and what rewards say of them.

An image is a function of (seed, its index, the weights): image i is of prompt i // n, whoever draws
it in whatever batch. Evaluations during training and `gardo eval` are both made of this.

Shapes: E prompts, n images each, I = E n images, B images of one forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

import gardo_kernels
from gardo.evaluation import attributes
from gardo.policies.base import Policy
from gardo.rewards.panel import Panel
from gardo.rollout import rows_of
from gardo.streams import Stream
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from gardo_kernels import Backend

FEATURES, REWARD, LABEL = "features", "reward", "label"  # columns: features, KIND/NAME


@dataclass(frozen=True)
class FixedImages:
    """`images_per_prompt` images of each prompt, numbered prompt by prompt."""

    policy: Policy
    prompts: Sequence[Prompt]
    images_per_prompt: int
    steps: int  # denoise steps
    seed: int
    kernels: Backend = "auto"

    @property
    def total(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    def initial_latents(self, image_B: Tensor) -> Tensor:
        return gardo_kernels.random_normal(
            self.seed, image_B, Stream.EVALUATION, self.policy.latent_shape, backend=self.kernels
        )

    def prompts_of(self, image_B: Tensor) -> list[Prompt]:
        return [self.prompts[i] for i in (image_B // self.images_per_prompt).tolist()]

    def encode(self, image_B: Tensor) -> None:
        """Has the prompts of these images encoded, which are then known."""
        self.policy.encode(list(dict.fromkeys(self.prompts_of(image_B))))

    def draw(self, image_B: Tensor) -> tuple[Tensor, list[Prompt]]:
        """The images with these indices, fp32 [B, 3, H, W] in [0, 1], and their prompts."""
        prompts = self.prompts_of(image_B)
        distinct = list(dict.fromkeys(prompts))
        index_B = torch.tensor([distinct.index(p) for p in prompts], device=image_B.device)
        conditioning = rows_of(self.policy.encode(distinct), index_B)
        images = self.policy.generate(conditioning, self.initial_latents(image_B), steps=self.steps)
        return images, prompts


def batches(total: int, batch: int) -> list[Tensor]:
    """Indices of `total` images in batches of one size: those of the last lie past the end."""
    starts = range(0, math.ceil(total / batch) * batch, batch)
    return [torch.arange(start, start + batch) for start in starts]


def shown_prompts(count: int, shown: int) -> Tensor:
    """Which of `count` prompts a picture of evaluations shows: spread over them."""
    shown = min(shown, count)
    return torch.arange(shown) * count // shown


def judged(
    panel: Panel, images: Tensor, prompts: Sequence[Prompt], *, features: bool, labels: bool
) -> dict[str, Tensor]:
    """What the rewards that score alone say of the images, fp32 [B], NaN where one has no value.

    By column: `reward/NAME`; with `features` also `features` [B, D]; with `labels` also
    `label/KIND`, int64 (attributes.py).
    """
    columns: dict[str, Tensor] = {}
    for name, reward in panel.rewards.items():
        if not reward.scores_alone or (reward.gives_features and not features):
            continue
        value = panel.score(name, images, prompts)
        if reward.gives_features:
            columns[FEATURES] = value
        else:
            columns[f"{REWARD}/{name}"] = value.float().where(value.isfinite(), torch.nan)
    if labels:
        for name, label in attributes.attribute_labels(images, prompts).items():
            columns[f"{LABEL}/{name}"] = label
    return columns


def of_kind(columns: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The columns `kind/NAME`, by name."""
    named = ((column.partition("/"), value) for column, value in columns.items())
    return {name: value for (found, _, name), value in named if found == kind and name}


def distances(
    features_ID: Tensor, images_per_prompt: int, kernels: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Cosine distances among the images of a prompt, fp32 [I]: to the nearest, and of all pairs."""
    group_I = torch.arange(len(features_ID), device=features_ID.device) // images_per_prompt
    return gardo_kernels.nearest_cosine(features_ID, group_I, backend=kernels)


def vendi(features_ID: Tensor, images_per_prompt: int) -> Tensor:
    """The Vendi score of each prompt's images with the cosine kernel, fp64 [E]: 1 to n.

    exp(-sum_k l_k log l_k) with l the eigenvalues of K / n, K the cosines: as many as there are
    different images (Friedman and Dieng, arXiv 2210.02410). NaN where a feature is not finite.
    """
    features_EnD = features_ID.view(-1, images_per_prompt, features_ID.shape[1]).double()
    unit_EnD = torch.nn.functional.normalize(features_EnD, dim=2)
    kernel_Enn = unit_EnD @ unit_EnD.transpose(1, 2) / images_per_prompt
    finite_E = kernel_Enn.isfinite().all((1, 2))
    eigen_En = torch.linalg.eigvalsh(kernel_Enn.nan_to_num()).clamp(min=0)
    score_E = -torch.special.xlogy(eigen_En, eigen_En).sum(1)
    return score_E.exp().where(finite_E, torch.nan)
