"""The shipped tiny models: whole, small, and good enough to show what a run does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from torch import Tensor

from gardo import plugins
from gardo.tiny import models, world
from gardo_kernels import random_normal

PROMPTS = world.prompts()[:: 54 // 24][:24]  # every second: all counts but few "three"
FLUX = models.WEIGHTS / "flux"


def score(kind: str, images: Tensor, prompts: list[str]) -> Tensor:
    plugin = plugins.resolve("gardo.rewards", kind)
    return plugin(plugin.Settings(role="proxy"), torch.device("cpu")).score(images, prompts)


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(FLUX, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def images(pipeline: FluxPipeline) -> Tensor:
    """A picture of each prompt, from fixed noise in 8 steps, as anyone would make it."""
    return pipeline(
        prompt=PROMPTS,
        latents=random_normal(7, torch.arange(len(PROMPTS)), 0, (64, 16)),
        height=32,
        width=32,
        num_inference_steps=8,
        guidance_scale=3.5,
        max_sequence_length=8,
        output_type="pt",
    ).images


def test_weights_are_small_safetensors_in_bf16() -> None:
    files = [p for p in models.WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 8e6
    assert {p.suffix for p in files} == {".json", ".safetensors"}
    tensors = [p for p in files if p.suffix == ".safetensors"]
    assert len(tensors) >= 11  # Flux 4, SD3.5 5, DINOv3 1, judges 2, less any shared
    for path in tensors:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert kinds == {"BF16"}, path


def test_the_folder_is_a_flux_pipeline(pipeline: FluxPipeline) -> None:
    index = json.loads((FLUX / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    assert pipeline.transformer.config.guidance_embeds
    assert pipeline.vae_scale_factor == 2 and pipeline.transformer.config.in_channels == 16
    assert 0.5e6 < sum(p.numel() for p in pipeline.transformer.parameters()) < 2e6


def test_captions_are_read_whole(pipeline: FluxPipeline) -> None:
    """A token for each word, and those that begin and end a text: nothing is cut."""
    for tokenizer, around in ((pipeline.tokenizer, 2), (pipeline.tokenizer_2, 1)):
        tokens = [tuple(tokenizer(p).input_ids) for p in world.prompts()]
        assert len(set(tokens)) == 54
        assert {len(ids) for ids in tokens} == {3 + around}
        assert tokenizer.unk_token_id not in {i for ids in tokens for i in ids[:3]}


def test_the_decoder_keeps_pictures(pipeline: FluxPipeline) -> None:
    scene = world.sample_scenes(64, torch.Generator().manual_seed(50))
    pictures = world.draw(scene)
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures * 2 - 1).latent_dist.mode()
        again = pipeline.vae.decode(latents).sample / 2 + 0.5
    assert float((again - pictures).square().mean()) < 0.003
    normalised = (latents - pipeline.vae.config.shift_factor) * pipeline.vae.config.scaling_factor
    assert abs(float(normalised.mean())) < 0.1
    assert float(normalised.std()) == pytest.approx(1, abs=0.1)


def test_pictures_show_what_was_asked(images: Tensor) -> None:
    assert images.shape == (len(PROMPTS), 3, 32, 32)
    assert float(score("tiny_fidelity", images, PROMPTS).mean()) > 0.6
    assert float(score("tiny_purity", images, PROMPTS).mean()) > 0.9


def test_counting_can_be_improved(images: Tensor) -> None:
    """Some pictures have the right count and some do not: a proxy that training can raise."""
    exact = score("tiny_patches", images, PROMPTS) == 1
    assert 0.4 < float(exact.float().mean()) < 0.95


def test_pictures_follow_their_own_prompt(images: Tensor) -> None:
    asked = [world.parse(p) for p in PROMPTS]
    colours = [world.caption(n, (c + 3) % 6, s) for n, c, s in asked]
    shapes = [world.caption(n, c, (s + 1) % 3) for n, c, s in asked]
    own = float(score("tiny_fidelity", images, PROMPTS).mean())
    assert float(score("tiny_fidelity", images, colours).mean()) < own / 5
    assert float(score("tiny_fidelity", images, shapes).mean()) < own / 3


def test_other_noise_makes_other_layouts(pipeline: FluxPipeline) -> None:
    """A healthy start: the pictures of one prompt are not copies of each other."""
    pictures = pipeline(
        prompt=["two blue squares"] * 6,
        latents=random_normal(8, torch.arange(6), 0, (64, 16)),
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=3.5,
        max_sequence_length=8,
        output_type="pt",
    ).images
    distance = torch.cdist(pictures.flatten(1), pictures.flatten(1)) / (3 * 32 * 32) ** 0.5
    assert float(distance[~torch.eye(6, dtype=torch.bool)].min()) > 0.05


def test_every_built_in_model_is_shipped() -> None:
    folders = sorted(p.name for p in Path(models.WEIGHTS).iterdir())
    assert folders == ["dinov3", "flux", "judges", "numbers", "sd3"]
    assert (models.WEIGHTS / "sd3/model_index.json").is_file()
