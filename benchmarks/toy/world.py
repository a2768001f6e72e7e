"""The plane of the toy: a Gaussian mixture, rewards made of bumps, a small flow that learnt it.

The layout is ours: of its toy the GARDO paper (arXiv 2512.24138, figure 3) gives a caption and the
panels' labels. A sample is a position in the plane, and stands where an image stands elsewhere: the
policy's decoder is the identity, rewards are the engine's own `Reward` classes over positions.

Shapes: B samples, R rows, K modes of the mixture, M rewarded places, 2 coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field
from torch import Tensor, nn

from gardo.algorithms.base import SamplerSettings
from gardo.distributed.optimizers import OptimizerSettings
from gardo.rewards.base import Reward, RewardSettings
from gardo.rewards.panel import Panel
from gardo.settings import Pair, Strict
from gardo.types import Prompt

CPU = torch.device("cpu")


class Spurious(Strict):
    """A bump of the proxy alone; the spurious region is the disc of `region` around it."""

    degrees: float
    radius: float
    height: float
    std: float
    region: float


class Layout(Strict):
    """Where the mixture has its modes, and what the rewards pay where."""

    ring_modes: int
    ring_radius: float
    mode_std: float
    centre_density: float = Field(description="weight of the centre mode, a ring mode having 1")
    rewarded: list[int] = Field(description="ring modes that are rewarded; the centre is too")
    bump_std: float = Field(description="of the true reward's bumps, height 1")
    spurious: Spurious
    wide_std: float = Field(description="of the first auxiliary: the same bumps, blurred")
    taste: list[float] = Field(description="of the second: the same bumps, with these heights")
    covered_radius: float = Field(description="a sample this close to a mode belongs to it")
    covered_share: float = Field(description="a mode with at least this share is covered")


class Pretraining(Strict):
    width: int
    iterations: int
    batch: int
    lr: float


class Training(Strict):
    """What all arms share."""

    iterations: int
    groups: int
    group_size: int
    sampler: SamplerSettings
    shift: float
    optimizer: OptimizerSettings
    max_grad_norm: float
    evaluation_samples: int


class Arm(Strict):
    title: str
    algorithm: dict[str, Any] = Field(description="as in a recipe")


class Toy(Strict):
    seeds: int
    layout: Layout
    pretraining: Pretraining
    training: Training
    arms: dict[str, Arm]


def load(path: Path) -> Toy:
    return Toy.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


# ---- the mixture ------------------------------------------------------------------------------


def on_circle(radius: float, degrees: Tensor) -> Tensor:
    angle = degrees.deg2rad()
    return radius * torch.stack([angle.cos(), angle.sin()], -1)


class Mixture:
    """Modes on a ring and a faint one in the centre, which is the last: K = ring modes + 1."""

    def __init__(self, layout: Layout) -> None:
        ring = on_circle(
            layout.ring_radius, torch.arange(layout.ring_modes) * 360 / layout.ring_modes
        )
        self.modes_K2 = torch.cat([ring, torch.zeros(1, 2)])
        weight_K = torch.tensor([1.0] * layout.ring_modes + [layout.centre_density])
        self.weight_K = weight_K / weight_K.sum()
        self.std = layout.mode_std

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, 2] fp32."""
        mode_B = self.weight_K.multinomial(count, replacement=True, generator=generator)
        noise_B2 = torch.randn(count, 2, generator=generator)
        return self.modes_K2[mode_B] + self.std * noise_B2

    def log_density(self, x_B2: Tensor) -> Tensor:
        """log sum_k w_k N(x; m_k, std^2), [B] fp32."""
        square_BK = (x_B2[:, None] - self.modes_K2).square().sum(-1)
        normal_BK = -square_BK / (2 * self.std**2) - math.log(2 * math.pi * self.std**2)
        return (normal_BK + self.weight_K.log()).logsumexp(1)


# ---- rewards ----------------------------------------------------------------------------------


class BumpsSettings(RewardSettings):
    kind: str = "bumps"
    at: list[Pair[float]]
    heights: list[float]
    stds: list[float]


class Bumps(Reward):
    """sum_m height_m exp(-|x - at_m|^2 / (2 std_m^2))."""

    Settings = BumpsSettings

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """`images_B3HW` are positions [B, 2]."""
        at_M2, height_M, std_M = (
            torch.tensor(getattr(self.settings, name)) for name in ("at", "heights", "stds")
        )
        square_BM = (images_B3HW[:, None] - at_M2).square().sum(-1)
        return (height_M * torch.exp(-square_BM / (2 * std_M**2))).sum(1)


class Positions(Reward):
    """Features for diversity: where a sample is."""

    Settings = RewardSettings
    gives_features = True

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images_B3HW


def rewarded_places(layout: Layout) -> Tensor:
    """[M, 2]: the rewarded ring modes, then the centre."""
    modes_K2 = Mixture(layout).modes_K2
    return modes_K2[[*layout.rewarded, -1]]


def spurious_place(layout: Layout) -> Tensor:
    """[2]."""
    return on_circle(layout.spurious.radius, torch.tensor(layout.spurious.degrees))


def panel(layout: Layout) -> Panel:
    """Proxy = true reward + spurious bump; the two auxiliaries are other blurs of the true one."""
    at = [tuple(place) for place in rewarded_places(layout).tolist()]
    one, false = [1.0] * len(at), layout.spurious

    def bumps(role: str, heights: list[float], std: float) -> Bumps:
        settings = BumpsSettings(role=role, at=at, heights=heights, stds=[std] * len(at))
        return Bumps(settings, CPU)

    true = bumps("held_out", one, layout.bump_std)
    proxy = BumpsSettings(
        role="proxy",
        at=[*at, tuple(spurious_place(layout).tolist())],
        heights=[*one, false.height],
        stds=[*true.settings.stds, false.std],
    )
    return Panel(
        {
            "proxy": Bumps(proxy, CPU),
            "true": true,
            "wide": bumps("auxiliary", one, layout.wide_std),
            "taste": bumps("auxiliary", layout.taste, layout.bump_std),
            "positions": Positions(RewardSettings(kind="positions", role="features"), CPU),
        }
    )


def measures(layout: Layout, x_B2: Tensor) -> dict[str, float]:
    """What a run is judged by: mean rewards, modes covered of M, shares of the samples."""
    count = len(x_B2)
    scores = panel(layout)(
        x_B2,
        [""] * count,
        sample_B=torch.arange(count),
        group_B=torch.zeros(count, dtype=torch.int64),
    )
    distance_BM = torch.cdist(x_B2, rewarded_places(layout))
    share_M = (distance_BM < layout.covered_radius).double().mean(0)
    distance_B = (x_B2 - spurious_place(layout)).norm(dim=1)
    return {
        "proxy": float(scores.rewards["proxy"].double().mean()),
        "true": float(scores.rewards["true"].double().mean()),
        "modes": float((share_M >= layout.covered_share).sum()),
        "centre_share": float(share_M[-1]),
        "spurious_share": float((distance_B < layout.spurious.region).double().mean()),
    }


# ---- the policy -------------------------------------------------------------------------------


class PlanePolicy(nn.Module):
    """Velocity of a position at sigma by a three-layer MLP; what `gardo.rollout` asks of a policy.

    There is no prompt to condition on, and no guidance.
    """

    dtype = torch.float32
    latent_shape = (2,)
    cfg_scale = 1.0

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 + 5, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )
        with torch.no_grad():
            for layer in self.net[::2]:  # torch's own distribution, from this generator
                bound = 1 / math.sqrt(layer.in_features)
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        angle_R = sigma * math.pi
        waves = [f(k * angle_R) for k in (1, 2) for f in (torch.sin, torch.cos)]
        return self.net(torch.cat([x, torch.stack([sigma, *waves], 1)], 1))

    def branches(
        self, x: Tensor, sigma: Tensor, conditioning: Mapping[str, Tensor]
    ) -> tuple[Tensor, None]:
        return self.velocity(x, sigma, conditioning), None

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def matching_loss(policy: PlanePolicy, x0_B2: Tensor, generator: torch.Generator) -> Tensor:
    """Flow matching: mean |v(x_s, s) - (eps - x0)|^2 with s uniform, eps normal."""
    sigma_B = torch.rand(len(x0_B2), generator=generator)
    noise_B2 = torch.randn(x0_B2.shape, generator=generator)
    x_B2 = torch.lerp(x0_B2, noise_B2, sigma_B[:, None])
    return (policy.velocity(x_B2, sigma_B, {}) - (noise_B2 - x0_B2)).square().mean()


def pretrain(layout: Layout, settings: Pretraining, seed: int) -> PlanePolicy:
    """A policy that samples the mixture: Adam with a cosine to 0."""
    generator = torch.Generator().manual_seed(seed)
    policy, mixture = PlanePolicy(settings.width, generator), Mixture(layout)
    optimizer = torch.optim.Adam(policy.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.iterations)
    for _ in range(settings.iterations):
        loss = matching_loss(policy, mixture.sample(settings.batch, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return policy
