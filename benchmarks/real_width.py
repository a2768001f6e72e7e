"""Models of a published width and little depth, with random weights, as diffusers folders.

    python benchmarks/real_width.py black-forest-labs/FLUX.1-dev FOLDER [--blocks 1 2]

The transformer and the VAE have the configuration that ships for the hub id, but for the number of
blocks of each kind; the text encoders have one layer and the built-in models' tokenizers. What such
a folder does, the whole model does as often as it has blocks, without a download.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gardo.rewards.base import Reward, RewardSettings
from gardo.settings import PUBLISHED, model_path
from gardo.types import Prompt

TOKENIZED = {"FluxPipeline": "builtin:flux", "StableDiffusion3Pipeline": "builtin:sd3"}
DTYPE = torch.bfloat16


def make(hub_id: str, folder: Path, blocks: Sequence[int], *, seed: int = 0) -> Path:
    """Writes the model; `blocks` is how many of each kind, as its configuration lists them."""
    import diffusers

    published = PUBLISHED / hub_id.replace("/", "--")
    index = json.loads((published / "model_index.json").read_text())
    tokenized = Path(model_path(TOKENIZED[index["_class_name"]]))
    shutil.copytree(published, folder)
    for tokenizer in tokenized.glob("tokenizer*"):
        shutil.copytree(tokenizer, folder / tokenizer.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer_class = getattr(diffusers, index["transformer"][1])
        config = transformer_class.load_config(published / "transformer")
        depths = [name for name in ("num_layers", "num_single_layers") if name in config]
        config |= dict(zip(depths, blocks, strict=True))
        if dual := config.get("dual_attention_layers"):
            config["dual_attention_layers"] = [i for i in dual if i < config["num_layers"]]
        write(transformer_class.from_config, config, folder / "transformer")
        vae = diffusers.AutoencoderKL
        write(vae.from_config, vae.load_config(published / "vae"), folder / "vae")
        for encoder in sorted(folder.glob("text_encoder*")):
            _write_encoder(encoder, tokenized / encoder.name)
    return folder


def write(build: Any, config: Any, folder: Path) -> None:
    """Matrices of variance 1 / fan-in, so that activations stay of order 1."""
    with torch.device("meta"):
        model: Any = build(config)
    model.to(DTYPE).to_empty(device="cpu")
    real: Any = build(config) if any(True for _ in model.buffers()) else model
    for (_, buffer), (_, value) in zip(model.named_buffers(), real.named_buffers(), strict=True):
        buffer.copy_(value)
    _fill(model)
    model.save_pretrained(folder)


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(float(name.endswith("weight")))


def _write_encoder(folder: Path, tiny: Path) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    of_tokenizer = transformers.AutoConfig.from_pretrained(tiny)
    words = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id",
             "max_position_embeddings")  # fmt: skip
    for name in words:
        if hasattr(of_tokenizer, name):
            setattr(config, name, getattr(of_tokenizer, name))
    layers = "num_layers" if config.model_type == "t5" else "num_hidden_layers"
    setattr(config, layers, 1)
    model = getattr(transformers, config.architectures[0])(config).to(DTYPE)
    model.save_pretrained(folder)


class ToneSettings(RewardSettings):
    part: str = "mean"  # or std


class Tone(Reward):
    """The mean or the standard deviation of an image's numbers: a reward without a model."""

    Settings: ClassVar[type[RewardSettings]] = ToneSettings
    differentiable = True

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        pixels = images_B3HW.flatten(1)
        return pixels.mean(1) if self.settings.part == "mean" else pixels.std(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model", help="a hub id whose configuration ships")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    print(make(options.model, options.folder, options.blocks))


if __name__ == "__main__":
    main()
