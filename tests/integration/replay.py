"""An exported LoRA in diffusers' own pipeline, in a process that has trained nothing.

    python -m tests.integration.replay EXPORT OUT.png

draws the demo's evaluation images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file

from gardo.report.pictures import save_grid
from gardo.streams import Stream
from gardo_kernels import random_normal
from tests import ROOT


def pipeline_with(lora: Path) -> FluxPipeline:
    torch.set_num_threads(1)
    model = ROOT / "engine/gardo/tiny/weights/flux"
    pipeline = FluxPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.load_lora_weights(lora)
    return pipeline


def draw(
    pipeline: FluxPipeline, prompts: Sequence[str], *, seed: int, first: int, size: int, steps: int
) -> torch.Tensor:
    """An image a prompt [B, 3, size, size], the evaluation's from `first` on."""
    image_B = torch.arange(first, first + len(prompts))
    shape = ((size // 4) ** 2, 16)  # latents of 2 x 2 pixels, packed 2 x 2
    return pipeline(
        list(prompts),
        latents=random_normal(seed, image_B, Stream.EVALUATION, shape),
        height=size, width=size, num_inference_steps=steps, guidance_scale=3.5,
        max_sequence_length=8, output_type="pt",
    ).images  # fmt: skip


def prompts(count: int) -> list[str]:
    return (ROOT / "recipes/tiny_prompts.txt").read_text().split("\n")[:count]


def equals_evaluation(export: Path, evaluation: Path) -> None:
    """A case's images, bit for bit."""
    wanted = load_file(evaluation)["evaluation"]
    size = wanted.shape[-1]
    images = draw(pipeline_with(export), prompts(4), seed=7, first=0, size=size, steps=2)
    assert torch.equal(images, wanted), (images - wanted).abs().max()


def draw_demo(export: Path, out: Path) -> None:
    """The demo's evaluation as the tests type it: two images a prompt, four a batch."""
    pipeline, each = pipeline_with(export), [p for p in prompts(4) for _ in range(2)]
    images = [draw(pipeline, each[first : first + 4], seed=42, first=first, size=32, steps=8)
              for first in (0, 4)]  # fmt: skip
    save_grid(torch.cat(images), out, columns=2)


if __name__ == "__main__":
    draw_demo(Path(sys.argv[1]), Path(sys.argv[2]))
