"""HPSv2 and v2.1 (arXiv 2306.09341): a CLIP ViT-H/14 trained on people's preferences.

    score = cos(image, prompt)

No logit scale: raw scores lie at about 0.2 to 0.36. Differentiable.

The weights are published in open_clip's names (xswu/HPSv2, a `.pt` with a state dict); they are
renamed here to those of transformers' CLIPModel, without a change of any number. A safetensors file
with the same names does as well. What the file does not say comes from `base`: config.json (heads,
activation gelu) and the tokenizer.

Preprocessing clip-pad-1 (_pixels.py), as the release pads what is not square. The release resizes
8-bit images with Pillow, here tensors are resized with antialias on. Not verified against the
published weights yet: the tests compare tiny random models of the same class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from gardo.rewards._clip import LAION_H14, Clip, ClipReward
from gardo.rewards._files import TOKENIZER_FILES, ConfigFolder, ModelRewardSettings, holding
from gardo.rewards._loading import check_type, model_of, read_weights
from gardo.rewards.base import About, Holds, weights_of
from gardo.settings import model_path

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = ("path", "revision", "weights", "base", "base_revision")  # fields that say which
FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}

# open_clip's name -> transformers'. A projection is x @ P there and a Linear here: its transpose.
WHOLE = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
}
TRANSPOSED = ("text_projection", "visual.proj")
NORMS = {
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of open_clip's CLIP under the names of CLIPModel.

    ValueError for a name that open_clip's CLIP does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        block = BLOCK.fullmatch(name)
        if name in WHOLE:
            renamed[WHOLE[name]] = tensor.T if name in TRANSPOSED else tensor
        elif module in NORMS:
            renamed[f"{NORMS[module]}.{leaf}"] = tensor
        elif block:
            tower = "vision_model" if block[1] else "text_model"
            renamed |= _block(f"{tower}.encoder.layers.{block[2]}", block[3], tensor, name)
        else:
            raise ValueError(f"{name} is no name of open_clip's CLIP")
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def _block(layer: str, inner: str, tensor: Tensor, name: str) -> dict[str, Tensor]:
    """One tensor of a transformer block; queries, keys and values are stacked in open_clip."""
    if inner in ("attn.in_proj_weight", "attn.in_proj_bias"):
        leaf = inner.removeprefix("attn.in_proj_")
        return {
            f"{layer}.self_attn.{part}_proj.{leaf}": rows
            for part, rows in zip("qkv", tensor.chunk(3), strict=True)
        }
    module, _, leaf = inner.rpartition(".")
    if module not in IN_BLOCK:
        raise ValueError(f"{name} is no name of open_clip's CLIP")
    return {f"{layer}.{IN_BLOCK[module]}.{leaf}": tensor}


def weights_file(fields: Mapping[str, Any]) -> str:
    """The one of the settings, or the release's."""
    return fields["file"] or FILES[fields["version"]]


class HPSv2Settings(ModelRewardSettings):
    kind: Literal["hpsv2"] = "hpsv2"
    version: Literal["v2", "v2.1"] = Field("v2.1", description="which release's weights")
    file: str | None = Field(
        None, description="weights in open_clip's names; the release's file if left out"
    )
    path: Annotated[str, holding(weights_file)] = Field(
        "xswu/HPSv2", description="hub id or folder of the weights"
    )
    base: Annotated[ConfigFolder, TOKENIZER_FILES, Holds("CLIPModel", WEIGHTS)] = Field(
        LAION_H14, description="hub id or folder: config.json, tokenizer"
    )
    base_revision: str | None = Field(None, description="of `base` on the hub")

    @property
    def weights(self) -> str:
        return weights_file(vars(self))


class HPSv2(ClipReward):
    Settings = HPSv2Settings
    about = About("cos(image, prompt)", "0.2 to 0.36", "Apache-2.0 (authors' package)")

    def load(self) -> Clip:
        from transformers import CLIPConfig, CLIPModel

        settings = self.settings
        where = f"path: {settings.weights} of {settings.path!r}"
        state = read_weights(settings.path, settings.weights, settings.revision)
        try:
            renamed = from_open_clip(state)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        base, revision = settings.base, settings.base_revision
        check_type(f"base: {base!r}", base, revision, "clip")
        config = CLIPConfig.from_pretrained(model_path(base), revision=revision)
        model = model_of(CLIPModel, where, config, renamed)
        return Clip(
            model,
            base,
            settings,
            self.device,
            weights=weights_of(settings, "base"),
            tokenizer_revision=revision,
            fit="pad",
        )


PLUGIN = HPSv2
