"""ImageReward (arXiv 2304.05977, THUDM/ImageReward): how well people would like the picture.

    rewards:
      beauty: {kind: imagereward, role: proxy}

    h     = BLIP's text encoder over the prompt, which attends to ViT-L/16's tokens of the picture
    y     = MLP(h of the first token)
    value = (y - 0.1671736) / 1.0333395

The value is about -2 to 2, with mean 0 and standard deviation 1 over the authors' pictures. The
MLP's five layers have nothing but dropout between them: they are one affine map, multiplied out at
load in fp64. A prompt is cut at 35 tokens, as published.

`raw: true` gives y itself. The ReFL algorithm standardises with the same two constants, so under it
use `raw: true`, or keep the value as it is and set the algorithm's reward_mean: 0, reward_std: 1;
both are the published ReFL loss. Otherwise the value would be standardised twice.

Preprocessing clip-crop-1 of _pixels.py: the shorter side to 224 (bicubic, antialiased, on
tensors), the middle square, CLIP's statistics. Differentiable.

`path` holds ImageReward.safetensors or ImageReward.pt (read as tensors alone, never as a pickle's
code) and med_config.json; the authors' names of the tensors are mapped onto transformers' classes.
The text encoder's tokenizer is BERT's. Not verified against the published weights yet.

Shapes: B images, D width of the text encoder, L tokens, T prompts that differ.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field

from gardo.rewards._affine import collapse
from gardo.rewards._files import TOKENIZER_FILES, ModelRewardSettings, holding
from gardo.rewards._loading import frozen, model_of, read_weights
from gardo.rewards._pixels import for_clip
from gardo.rewards.base import About, Holds, Reward, weights_of
from gardo.settings import model_path
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

Y_MEAN, Y_STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35
WEIGHTS = ("ImageReward.safetensors", "ImageReward.pt")  # the hub has the second
TEXT_CONFIG = "med_config.json"
VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."
VISION_NAMES = (  # published -> transformers
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)


class ImageRewardSettings(ModelRewardSettings):
    kind: Literal["imagereward"] = "imagereward"
    path: Annotated[str, holding(WEIGHTS, TEXT_CONFIG), Holds("BlipModel")] = Field(
        "THUDM/ImageReward", description="hub id or folder"
    )
    tokenizer: Annotated[str, holding(("vocab.txt", "tokenizer.json")), TOKENIZER_FILES] = Field(
        "google-bert/bert-base-uncased", description="hub id or folder of BERT's tokenizer"
    )
    tokenizer_revision: str | None = Field(None, description="of `tokenizer` on the hub")
    raw: bool = Field(False, description="the MLP's output, not standardised")
    batch: int = Field(16, ge=1, description="images that the model sees at once")


def part_of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
    found.pop("embeddings.position_ids", None)  # 0, 1, 2, ...; transformers keeps no copy
    return found


def vision_model(weights: Mapping[str, Tensor]) -> Any:
    """BLIP's ViT; the sizes are those of the tensors, and heads are 64 wide as in B and L."""
    from transformers import BlipVisionConfig, BlipVisionModel

    published = part_of(weights, VISION)
    state = {}
    for name, weight in published.items():
        for pattern, replacement in VISION_NAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = weight
    width, _, patch, _ = published["patch_embed.proj.weight"].shape
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(published["blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=sum(name.endswith(".attn.qkv.bias") for name in published),
        num_attention_heads=width // 64,
        image_size=patch * math.isqrt(published["pos_embed"].shape[1] - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return model_of(BlipVisionModel, "the vision encoder", config, state)


def text_model(weights: Mapping[str, Tensor], med: Mapping[str, Any], width: int) -> Any:
    """BERT with cross attention to pictures, whose tokens are `width` wide; `med`: its settings."""
    from transformers import BlipTextConfig, BlipTextModel

    config = BlipTextConfig(
        **{name: med[name] for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps",
            "pad_token_id",
        )},
        encoder_hidden_size=width,
        is_decoder=True,  # what transformers calls having cross attention
    )  # fmt: skip
    state = part_of(weights, TEXT)
    return model_of(BlipTextModel, "the text encoder", config, state, add_pooling_layer=False)


class ImageReward(Reward):
    Settings = ImageRewardSettings
    about = About("(y - 0.1671736) / 1.0333395", "-2 to 2", "Apache-2.0 (authors' repository)")
    differentiable = True

    def __init__(self, settings: ImageRewardSettings, device: torch.device) -> None:
        from transformers import BertTokenizer
        from transformers.utils import cached_file

        super().__init__(settings, device)
        folder, revision = model_path(settings.path), settings.revision
        name = next((n for n in WEIGHTS if (Path(folder) / n).is_file()), WEIGHTS[-1])
        where = f"path: {name} of {settings.path!r}"
        weights = read_weights(settings.path, name, revision)
        med = Path(cached_file(folder, TEXT_CONFIG, revision=revision))
        if f"{VISION}cls_token" not in weights:
            raise ValueError(f"{where} is not ImageReward's: no tensor {VISION}cls_token")
        try:
            vision = vision_model(weights)
            text_settings = json.loads(med.read_text(encoding="utf-8"))
            text = text_model(weights, text_settings, vision.config.hidden_size)
            weight_D, bias = collapse(part_of(weights, "mlp."))
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{where} and {TEXT_CONFIG} do not make an ImageReward: {error}"
            ) from error
        from_file = weights_of(settings, "path")
        self.vision, self.text = (
            frozen(model, settings.dtype, device, (part, *from_file))
            for part, model in (("vision", vision), ("text", text))
        )
        self.weight_1D, self.bias_1 = (x.float()[None].to(device) for x in (weight_D, bias))
        self.tokenizer = BertTokenizer.from_pretrained(
            model_path(settings.tokenizer), revision=settings.tokenizer_revision
        )
        if len(self.tokenizer) > text.config.vocab_size:
            raise ValueError(
                f"tokenizer: {settings.tokenizer!r} has {len(self.tokenizer)} tokens, the text "
                f"encoder {text.config.vocab_size}; it needs bert-base-uncased's"
            )

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        tokens_TL = self.tokenizer(
            list(row), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self.device)
        row_B = torch.tensor([row[prompt] for prompt in prompts], device=self.device)
        y_B = torch.cat([
            self._output(images, tokens_TL.input_ids[rows], tokens_TL.attention_mask[rows])
            for images, rows in zip(
                images_B3HW.split(self.settings.batch),
                row_B.split(self.settings.batch),
                strict=True,
            )
        ])  # fmt: skip
        return y_B if self.settings.raw else (y_B - Y_MEAN) / Y_STD

    def _output(self, images_B3HW: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """y, fp32 [B]."""
        pixels = for_clip(images_B3HW.to(self.device), self.vision.config.image_size)
        hidden_BLD = self.text(
            ids_BL,
            attention_mask=mask_BL,
            encoder_hidden_states=self.vision(pixels).last_hidden_state,
        ).last_hidden_state
        return torch.nn.functional.linear(hidden_BLD[:, 0].float(), self.weight_1D, self.bias_1)[
            :, 0
        ]


PLUGIN = ImageReward
