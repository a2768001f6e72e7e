"""Tiny random CLIP models of the class that holds the published weights, and rewards of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from gardo import plugins
from gardo.rewards import hpsv2
from gardo.settings import model_path

CPU = torch.device("cpu")
SIZE, LENGTH, WIDTH, HEADS, END = 28, 10, 32, 2, 1
PROMPTS = ["one red square", "two blue circles", "one red square"]


def to_open_clip(model: CLIPModel) -> dict[str, Tensor]:
    """A CLIPModel's weights as open_clip names and lays them out."""
    state = model.state_dict()
    text, vision = "text_model", "vision_model"
    out = {
        "logit_scale": state["logit_scale"],
        "positional_embedding": state[f"{text}.embeddings.position_embedding.weight"],
        "token_embedding.weight": state[f"{text}.embeddings.token_embedding.weight"],
        "text_projection": state["text_projection.weight"].T,
        "visual.class_embedding": state[f"{vision}.embeddings.class_embedding"],
        "visual.positional_embedding": state[f"{vision}.embeddings.position_embedding.weight"],
        "visual.conv1.weight": state[f"{vision}.embeddings.patch_embedding.weight"],
        "visual.proj": state["visual_projection.weight"].T,
    }
    for leaf in ("weight", "bias"):
        out[f"ln_final.{leaf}"] = state[f"{text}.final_layer_norm.{leaf}"]
        out[f"visual.ln_pre.{leaf}"] = state[f"{vision}.pre_layrnorm.{leaf}"]
        out[f"visual.ln_post.{leaf}"] = state[f"{vision}.post_layernorm.{leaf}"]
        for tower, prefix in ((text, ""), (vision, "visual.")):
            for n in range(2):
                layer, block = f"{tower}.encoder.layers.{n}", f"{prefix}transformer.resblocks.{n}"
                attention = [state[f"{layer}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
                out[f"{block}.attn.in_proj_{leaf}"] = torch.cat(attention)
                out[f"{block}.attn.out_proj.{leaf}"] = state[f"{layer}.self_attn.out_proj.{leaf}"]
                out[f"{block}.ln_1.{leaf}"] = state[f"{layer}.layer_norm1.{leaf}"]
                out[f"{block}.ln_2.{leaf}"] = state[f"{layer}.layer_norm2.{leaf}"]
                out[f"{block}.mlp.c_fc.{leaf}"] = state[f"{layer}.mlp.fc1.{leaf}"]
                out[f"{block}.mlp.c_proj.{leaf}"] = state[f"{layer}.mlp.fc2.{leaf}"]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def head_state() -> dict[str, Tensor]:
    """The published head's names and number of layers, on the tiny model's features."""
    torch.manual_seed(2)
    widths = {"0": (16, 24), "2": (24, 12), "4": (12, 8), "6": (8, 4), "7": (4, 1)}
    layers = nn.ModuleDict({number: nn.Linear(*size) for number, size in widths.items()})
    return {f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}


def save_clip(path: Path) -> None:
    """A CLIP folder, the same weights in open_clip's names, and an aesthetic head."""
    tokenizer = CLIPTokenizer.from_pretrained(model_path("builtin:flux/tokenizer"))
    tokenizer.save_pretrained(path)
    shared = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "projection_dim": 16,
        "hidden_act": "gelu",
        "initializer_factor": 4.0,  # features then differ between images
    }
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    ends = {"bos_token_id": 0, "eos_token_id": END, "pad_token_id": END}
    vision = {"image_size": SIZE, "patch_size": 7}
    torch.manual_seed(1)
    model = CLIPModel(
        CLIPConfig(
            text_config=shared | text | ends, vision_config=shared | vision, projection_dim=16
        )
    )
    for parameter in model.parameters():  # biases and norms too: a swap of two must show
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.logit_scale.data.fill_(math.log(97.0))
    model.save_pretrained(path)
    state = to_open_clip(model)
    torch.save({"epoch": 3, "state_dict": state}, path / hpsv2.FILES["v2.1"])
    torch.save({"state_dict": {k: v.half() for k, v in state.items()}}, path / hpsv2.FILES["v2"])
    save_file(state, path / "hps.safetensors")
    torch.save(head_state(), path / "head.pth")


def build(kind: str, folder: Path, **settings: Any) -> Any:
    own: dict[str, Any] = {
        "pickscore": {"tokenizer": str(folder)},
        "clipscore": {},
        "hpsv2": {"base": str(folder)},
        "aesthetic": {"head": str(folder), "head_file": "head.pth"},
    }[kind]
    plugin = plugins.resolve("gardo.rewards", kind)
    fields = {"kind": kind, "role": "proxy", "path": str(folder)} | own | settings
    return plugin(plugin.Settings(**fields), CPU)


def pictures(count: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    """8-bit noise in [0.2, 0.8]: resizing it never reaches the clamp."""
    generator = torch.Generator().manual_seed(height + width)
    noise = torch.randint(51, 205, (count, 3, height, width), generator=generator)
    return noise.float() / 255


def pil(images: Tensor) -> list[Image.Image]:
    as_bytes = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return [Image.fromarray(one.numpy()) for one in as_bytes]
