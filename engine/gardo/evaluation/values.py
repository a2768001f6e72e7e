"""What an evaluation measured, and its summary: means, spreads, diversity, rank correlations.

All intervals are over prompts (statistics.py). What has no value is NaN here, null in JSON.

Shapes: E prompts, n images each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gardo.evaluation.drawing import FEATURES, LABEL, REWARD, distances, of_kind, vendi
from gardo.evaluation.statistics import Interval, bootstrap_mean, entropy, rank_correlation
from gardo.rewards.base import RewardSettings

PROXY = "the proxy"  # the weighted sum of the proxies; no reward can have that name


@dataclass(frozen=True)
class Values:
    """Values of every image, and of every prompt's images together."""

    rewards: Mapping[str, Tensor]  # fp64 [E, n]
    roles: Mapping[str, str]
    weights: Mapping[str, float]  # of the proxies in their sum
    diversity: Mapping[str, Tensor]  # fp64 [E]: pairwise, nearest, vendi
    labels: Mapping[str, float]  # entropies of all images' labels, nats

    def mean(self, name: str) -> Tensor:
        """fp64 [E] of a reward, or of the proxies' sum, over the images that have a value."""
        return self.images(name).nanmean(1)

    def spread(self, name: str) -> Tensor:
        """fp64 [E]: standard deviation among a prompt's images; NaN with fewer than two values."""
        value_En = self.images(name)
        there_En = ~value_En.isnan()
        off_En = (value_En - value_En.nanmean(1, keepdim=True)).nan_to_num()
        count_E = there_En.sum(1)
        variance_E = off_En.square().sum(1) / (count_E - 1).clamp(min=1)
        return variance_E.sqrt().where(count_E > 1, torch.nan)

    def images(self, name: str) -> Tensor:
        """fp64 [E, n] of a reward, or of the proxies' sum."""
        if name == PROXY:
            return torch.stack([w * self.rewards[n] for n, w in self.weights.items()]).sum(0)
        return self.rewards[name]

    def others(self, *roles: str) -> list[str]:
        return [name for name, role in self.roles.items() if role in roles]


def values_of(
    columns: dict[str, Tensor], settings: Mapping[str, RewardSettings], images_per_prompt: int
) -> Values:
    """From the columns of `drawing.judged` of all images, in order."""
    rewards = {
        name: value_I.double().view(-1, images_per_prompt)
        for name, value_I in of_kind(columns, REWARD).items()
    }
    diversity: dict[str, Tensor] = {}
    if FEATURES in columns:
        features_ID = columns[FEATURES].float()
        nearest_I, pairwise_I = distances(features_ID, images_per_prompt, "torch")
        for name, distance_I in (("pairwise", pairwise_I), ("nearest", nearest_I)):
            diversity[name] = 100 * distance_I.double().view(-1, images_per_prompt).mean(1)
        diversity["vendi"] = vendi(features_ID, images_per_prompt)
    return Values(
        rewards=rewards,
        roles={name: settings[name].role for name in rewards},
        weights={n: settings[n].weight for n in rewards if settings[n].role == "proxy"},
        diversity=diversity,
        labels={name: entropy(label_I) for name, label_I in of_kind(columns, LABEL).items()},
    )


def summary(values: Values) -> dict[str, Any]:
    """Everything for result.json; `values_in` reads the values back."""
    rewards = {
        name: {
            "role": values.roles[name],
            **interval(bootstrap_mean(values.mean(name))),
            "spread": interval(bootstrap_mean(values.spread(name))),
            "images_without_value": int(value_En.isnan().sum()),
            "by_prompt": plain(values.mean(name)),
            "by_image": plain(value_En),
        }
        for name, value_En in values.rewards.items()
    }
    diversity = {
        name: {**interval(bootstrap_mean(value_E)), "by_prompt": plain(value_E)}
        for name, value_E in values.diversity.items()
    }
    found: dict[str, Any] = {"rewards": rewards, "diversity": diversity}
    found["label_entropy"] = dict(values.labels)
    if values.weights:
        found["proxy"] = {
            "weights": dict(values.weights),
            **interval(bootstrap_mean(values.mean(PROXY))),
            "rank_correlation": {
                name: interval(rank_correlation(values.mean(PROXY), values.mean(name)))
                for name in values.others("auxiliary", "held_out")
            },
        }
    return found


def values_in(result: Mapping[str, Any]) -> Values:
    """The values of a `summary`."""
    rewards, diversity = result["rewards"], result["diversity"]
    return Values(
        rewards={name: tensor(one["by_image"]) for name, one in rewards.items()},
        roles={name: str(one["role"]) for name, one in rewards.items()},
        weights=dict(result.get("proxy", {}).get("weights", {})),
        diversity={name: tensor(one["by_prompt"]) for name, one in diversity.items()},
        labels=dict(result["label_entropy"]),
    )


def interval(value: Interval) -> dict[str, float | None]:
    return {name: number(end) for name, end in asdict(value).items()}


def number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def plain(values: Tensor) -> Any:
    """A tensor as lists, null for NaN."""
    return [plain(row) if row.ndim else number(float(row)) for row in values.double()]


def tensor(values: Any) -> Tensor:
    """The fp64 tensor of lists of `plain`."""

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        return math.nan if value is None else float(value)

    return torch.tensor(filled(values), dtype=torch.float64)
