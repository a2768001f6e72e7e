"""What the tiny Flux draws, one row a prompt: the first picture of the README.

    PYTHONPATH=engine:kernels python benchmarks/tiny_samples.py

The noise is seeded, so the same weights draw the same picture.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxPipeline

from gardo.report.pictures import save_grid
from gardo.tiny import make, models, world

PICTURE = Path(__file__).parent / "results" / "tiny_flux_samples.png"
COLUMNS = 12


def main() -> None:
    pipeline = FluxPipeline.from_pretrained(make.FLUX, dtype=torch.float32)
    prompts = [world.caption(1 + k % 3, k, k % 3) for k in range(len(world.COLOURS))]
    rows = [prompt for prompt in prompts for _ in range(COLUMNS)]
    noise = torch.randn(len(rows), 64, 16, generator=torch.Generator().manual_seed(0))
    images = pipeline(
        rows,
        latents=noise,
        height=world.SIZE,
        width=world.SIZE,
        num_inference_steps=16,
        guidance_scale=make.GUIDANCE,
        max_sequence_length=models.TEXT_TOKENS,
        output_type="pt",
    ).images
    print(*prompts, sep=", ")
    save_grid(images, PICTURE, columns=COLUMNS, scale=2)


if __name__ == "__main__":
    main()
