"""Scores of a gathered batch by hand or at random, and GARDO around a base."""

import torch

from gardo.algorithms.base import SamplerSettings, World
from gardo.algorithms.flow_grpo import FlowGRPOSettings
from gardo.algorithms.gardo import (
    Gardo,
    GardoSettings,
)
from gardo.flow import sd3_sigmas
from gardo.types import Scores

SAMPLER = SamplerSettings(steps=5, train_steps=3)
WORLD = World(sampler=SAMPLER, sigmas=sd3_sigmas(5), seed=1)


def scores_of(proxy, auxiliaries=None, *, valid=None, group=None, sample=None, features=None):
    proxy = torch.as_tensor(proxy, dtype=torch.float32)
    count = len(proxy)
    rewards = {n: torch.as_tensor(v).float() for n, v in (auxiliaries or {}).items()}
    return Scores(
        sample_B=torch.arange(count) if sample is None else torch.as_tensor(sample),
        group_B=torch.zeros(count, dtype=torch.int64) if group is None else torch.as_tensor(group),
        proxy_B=proxy,
        valid_B=torch.ones(count, dtype=torch.bool) if valid is None else torch.as_tensor(valid),
        rewards={"proxy": proxy, **rewards},
        auxiliaries=tuple(rewards),
        features_BD=features,
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_scores(count=60, seed=0, groups=5):
    draw = generator(seed)
    return scores_of(
        torch.rand(count, generator=draw),
        {n: torch.rand(count, generator=draw) for n in ("fidelity", "purity")},
        group=torch.arange(count) // (count // groups),
        features=torch.randn(count, 6, generator=draw),
    )


def gardo(base=None, **parts):
    return Gardo(GardoSettings(base=base or FlowGRPOSettings(beta=0.04), **parts), WORLD)


def uncertain(k, count=100):
    """Scores whose mean positive uncertainty is k (count - k) / count^2: k win rates up for all."""
    ascending = torch.arange(float(count))
    return scores_of(ascending.roll(-k), {"a": ascending})


def credit_of(algorithm, scores):
    """As the loop asks for it."""
    return algorithm.credit(algorithm.measured(scores))
