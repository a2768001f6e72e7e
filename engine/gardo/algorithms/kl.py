"""The KL to the reference: what a gated row of it weighs in an update, and what is logged of it.

The loss is a mean over all rows of an update on all ranks, so a row's KL weighs 1 / rows in it. How
many of the rows are gated is known before the update's first backward pass, and so the weights do
not depend on how it is cut into micro-batches:

  batch     1 for gated rows: their sum over all rows (GARDO, arXiv 2512.24138, eq. 7)
  gated     rows / gated rows: the mean of the gated rows
  released  the mean over the release's micro-batches of the mean of their gated rows, 0 in one
            without any, as expected over the ways to draw `kl_micro_batch` samples

The release cuts an update at random into micro-batches of m samples at one step. A micro-batch has
a gated sample with probability P = 1 - C(n - k, m) / C(n, m), k of n samples being gated, and all
of these are alike: each has the weight n P / k. With k / n = 5 % and m = 9 P is 37 %, so beta
weighs that much less than with `gated`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import comb
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from gardo.algorithms.base import AlgorithmSettings
from gardo.types import Batch, Credit, Metrics, Points

if TYPE_CHECKING:
    from torch import Tensor


class KLSettings(AlgorithmSettings):
    """Of an algorithm with a KL to a reference."""

    beta: float = Field(0.0, ge=0, description="weight of the KL to the reference")
    kl_reduction: Literal["batch", "gated", "released"] = Field(
        "batch",
        description="gated rows' KL: their sum over all rows of an update, their mean, or what the "
        "release's micro-batches make of it",
    )
    kl_micro_batch: int = Field(
        9, ge=1, description="samples of the release's micro-batch, for `released`: 9 SD3, 3 Flux"
    )

    @property
    def has_kl(self) -> bool:
        return self.beta > 0

    def kl_weights(self, gated: int, samples: int) -> tuple[float, float]:
        """What `kl_reduction` says."""
        if self.kl_reduction == "batch" or not gated:
            return 1.0, 0.0
        share = 1.0
        if self.kl_reduction == "released":
            share = gated_share(gated, samples, self.kl_micro_batch)
        return samples * share / gated, 0.0


def gated_share(gated: int, samples: int, micro_batch: int) -> float:
    """P that a random micro-batch of so many of the samples holds one that is gated."""
    size = min(micro_batch, samples)
    return 1.0 - comb(samples - gated, size) / comb(samples, size)


def weighed(
    credit: Credit, update_B: Tensor, kl_weights: Callable[[int, int], tuple[float, float]]
) -> Credit:
    """The credit of all ranks with what the KL of every sample weighs in the update it is in.

    update_B int64 [B]; kl_weights(gated, samples) says it for a gated sample and for another one.
    """
    samples = update_B.bincount()
    gated = update_B[credit.gate_B].bincount(minlength=len(samples))
    weights = [*map(kl_weights, gated.tolist(), samples.tolist())]
    table = torch.tensor(weights, dtype=torch.float32)
    return replace(credit, kl_weight_B=table[update_B, 1 - credit.gate_B.long()])


def asks_reference(points: Points, credit: Credit) -> Tensor:
    """The rows whose KL weighs something, bool [R], on the host."""
    return (credit.kl_weight_or_gate != 0)[points.sample_R]


def note_kl(metrics: Metrics, kl_R: Tensor, batch: Batch) -> None:
    """Logs the KL of the gated rows, the KL as the loss has it (without beta), and their share.

    The latter two are over all rows of an update, those that were left out too.
    """
    gate_R = batch.gate_R.float()
    metrics.mean("kl", kl_R, gate_R)
    metrics.mean("kl_loss", batch.kl_weight_R * kl_R, share=batch.share)
    metrics.mean("gate_share", gate_R, share=batch.share)
