"""Tiny random Mask2Former and CLIP models of the real classes, and pictures for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, Mask2FormerConfig, SwinConfig

from gardo.rewards.geneval_prompts import CLASSES
from gardo.rewards.geneval_vision import InstanceSegmenter, Source

CPU = torch.device("cpu")
OFFSET = 150.0  # lowers the mask logits, whose spread is 100
SIZE = 384  # at which transformers' post-processing works


def source(path: Path) -> Source:
    return Source("path", str(path), None, "float32", CPU)


def names(labels: Any = CLASSES) -> dict[str, Any]:
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }


def detector_config(**changes: Any) -> Mask2FormerConfig:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=stages,
    )
    sizes = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    feedforward = {"encoder_feedforward_dim": 16, "dim_feedforward": 16, "num_queries": 20}
    options: dict[str, Any] = {**names(), **sizes, **layers, **feedforward, **changes}
    return Mask2FormerConfig(backbone_config=backbone, **options)


def segmenter(**changes: Any) -> Any:
    """Random, with logits large enough that queries are sure, and masks of parts of a picture."""
    torch.manual_seed(0)
    model = InstanceSegmenter(detector_config(**changes)).eval()
    head = model.model.transformer_module.decoder.mask_predictor.mask_embedder
    last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
    pixels = model.model.pixel_level_module.decoder.mask_projection
    with torch.no_grad():
        model.class_predictor.weight *= 600
        last.weight *= 2000
        last.bias.zero_()
        # a channel that says the same of every pixel and query lowers all mask logits
        last.weight[0], last.bias[0] = 0, 1
        pixels.weight[0], pixels.bias[0] = 0, -OFFSET
    return model


def save_clip(path: Path) -> CLIPModel:
    torch.manual_seed(1)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["-"]
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for piece in [*letters, *(letter + "</w>" for letter in letters)]:
        vocabulary[piece] = len(vocabulary)
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(path)
    text = {"hidden_size": 16, "vocab_size": len(vocabulary), "max_position_embeddings": 77}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {"hidden_size": 16, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(
        text_config={**text, **tokens, **layers},
        vision_config={**vision, **layers},
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():  # so that the colour of a crop decides
        model.vision_model.embeddings.patch_embedding.weight *= 20
    model.save_pretrained(path)
    return model


def pictures(count: int = 3, height: int = SIZE, width: int = SIZE) -> Tensor:
    """Coloured blocks in 8 bits, as fp32 [count, 3, height, width] in [0, 1]."""
    generator = torch.Generator().manual_seed(5)
    coarse = 0.2 + 0.6 * torch.rand(count, 3, 6, 6, generator=generator)  # far from clipping
    images = nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (images * 255).round() / 255


def as_pil(image_3HW: Tensor) -> Image.Image:
    return Image.fromarray((image_3HW * 255).round().byte().permute(1, 2, 0).numpy())
