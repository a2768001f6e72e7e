"""What the step benchmark trains: models in which matmuls dominate, and rewards without a model.

    PYTHONPATH=benchmarks:engine:kernels python -m step.models make flux FOLDER
    PYTHONPATH=benchmarks:engine:kernels python -m step.models flops RECIPE [--set FIELD=VALUE ...]

A model is the built-in one of its family (text encoders, VAE, tokenizers) with a transformer of
width 512 and random weights: its classes, heads, norms and embeddings are those of the published
models. `flops` counts what a sample costs, and what an iteration should cost by that.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import real_width
from gardo.config import load
from gardo.loading import build_policy, quiet_libraries
from gardo.recipe import Recipe
from gardo.rewards.base import Gathering, RewardSettings
from gardo.settings import model_path
from gardo.types import Prompt

CHANGES: dict[str, dict[str, Any]] = {
    "flux": {
        "num_layers": 1,
        "num_single_layers": 3,
        "num_attention_heads": 4,
        "attention_head_dim": 128,
        "axes_dims_rope": (16, 56, 56),
    },
    "sd3": {
        "num_layers": 2,
        "num_attention_heads": 8,
        "attention_head_dim": 64,
        "caption_projection_dim": 512,
    },
}  # about 23 and 19 million parameters


def make(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Writes the model of a family as a diffusers folder."""
    import diffusers

    shutil.copytree(model_path(f"builtin:{family}"), folder)
    name = {"flux": "FluxTransformer2DModel", "sd3": "SD3Transformer2DModel"}[family]
    transformer_class = getattr(diffusers, name)
    config = {**transformer_class.load_config(folder / "transformer"), **CHANGES[family]}
    shutil.rmtree(folder / "transformer")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        real_width.write(transformer_class.from_config, config, folder / "transformer")
    return folder


class TiedToneSettings(real_width.ToneSettings):
    share: float = Field(0.4, ge=0, le=1, description="of the groups, that tie")


class TiedTone(real_width.Tone):
    """`Tone`, but that all images of a share of an iteration's groups have the best value, 1."""

    Settings: ClassVar[type[RewardSettings]] = TiedToneSettings

    def score_together(
        self, images_B3HW: Tensor, prompts: Sequence[Prompt], place: Gathering
    ) -> Tensor:
        """Of n groups round(n share) tie, and the same ones every time."""
        share = self.settings.share
        before_B, after_B = ((share * (place.group_B + k) + 0.5).floor() for k in (0, 1))
        return torch.where(after_B > before_B, 1.0, self.score(images_B3HW, prompts))


class Flops(NamedTuple):
    """Floating-point operations of a sample at one step, with guidance of both its rows."""

    forward: int
    training: int  # forward and backward pass


def flops(recipe: Recipe) -> Flops:
    """Counted on one sample; attention as matmuls."""
    device = torch.device("cpu")
    policy = build_policy(recipe, device)
    policy.load_transformer()
    conditioning = policy.encode(recipe.prompts()[:1])
    x, sigma = torch.randn(1, *policy.latent_shape, dtype=policy.dtype), torch.full((1,), 0.5)
    counts = []
    for trains in (False, True):
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(trains):
            velocity = policy.velocity(x, sigma, conditioning)
            if trains:
                velocity.sum().backward()
        counts.append(counter.get_total_flops())
    return Flops(*counts)


def predicted(recipe: Recipe, cost: Flops, *, kept: float, gated: float) -> dict[str, float]:
    """FLOPs of an iteration: as released, and with the least that the same update needs.

    `kept` is the share of samples with an advantage, `gated` that of the gated ones. The release
    samples, trains what it keeps and asks the reference for all of that; the least asks it for the
    gated ones alone.
    """
    samples = recipe.data.prompts_per_step * recipe.data.images_per_prompt
    steps, trained = recipe.sampler.steps, recipe.sampler.train_steps
    sampling = samples * steps * cost.forward
    rows = samples * trained
    skips = recipe.model.family == "sd3"
    as_released = rows * (kept if skips else 1.0) * (cost.training + cost.forward)
    least = rows * (kept * cost.training + gated * cost.forward)
    return {"sampling": sampling, "released": sampling + as_released, "least": sampling + least}


def main() -> None:
    parser = argparse.ArgumentParser("step.models", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write a model")
    making.add_argument("family", choices=sorted(CHANGES))
    making.add_argument("folder", type=Path)
    counting = commands.add_parser("flops", help="count what a sample and an iteration cost")
    counting.add_argument("recipe", type=Path)
    counting.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets")
    counting.add_argument("--kept", type=float, default=1.0, help="share with an advantage")
    counting.add_argument("--gated", type=float, default=0.05, help="share that is gated")
    options = parser.parse_args()
    quiet_libraries()
    if options.command == "make":
        print(make(options.family, options.folder))
        return
    recipe = load(options.recipe, options.sets)
    cost = flops(recipe)
    for name, count in cost._asdict().items():
        print(f"a sample at one step, {name}: {count / 1e9:.2f} GFLOP")
    for name, count in predicted(recipe, cost, kept=options.kept, gated=options.gated).items():
        print(f"an iteration, {name}: {count / 1e9:.0f} GFLOP")


if __name__ == "__main__":
    main()
