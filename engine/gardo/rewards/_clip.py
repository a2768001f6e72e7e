"""What the rewards on CLIP share: preprocessing, loading, image and text features.

Preprocessing, on tensors, with gradients (bicubic, antialias on, then clamped to [0, 1] and
normalised with CLIP's mean and deviation):

    clip-crop-1   the shorter side becomes the model's size, the centre is cut out
    clip-pad-1    the longer side becomes the model's size, black bars fill the square

Pillow's bicubic, which the authors used, rounds to 8 bits in between; the pixels differ by about
0.001. Square images come out the same under both.

Prompts are cut to the model's length (77 tokens, the end token kept). A prompt is encoded once,
however many images of it there are. The tokenizer does not repair broken Unicode (the authors'
uses ftfy for that).

Shapes: B images, U distinct prompts, L tokens, E width of the features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.utils import cached_file

from gardo.rewards._loading import filled_model
from gardo.rewards.base import RewardSettings
from gardo.settings import is_hub_id, model_path

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
LAION_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
Fit = Literal["crop", "pad"]


def needs_file(path: str, file: str) -> str:
    """`path`, a hub id or a folder that holds `file`; ValueError for anything else."""
    if not is_hub_id(path) and not (Path(model_path(path)) / file).is_file():
        raise ValueError(f"no folder with {file}: {path!r}; give one, or a hub id owner/name")
    return path


ModelFolder = Annotated[str, AfterValidator(lambda path: needs_file(path, "config.json"))]
TokenizerFolder = Annotated[
    str, AfterValidator(lambda path: needs_file(path, "tokenizer_config.json"))
]


class ClipSettings(RewardSettings):
    """Fields of all rewards on CLIP; each adds its own `path`."""

    revision: str | None = Field(
        None, description="commit or tag of a hub id `path`; its newest if left out"
    )
    batch: int = Field(32, ge=1, description="images, or prompts, that are encoded at once")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the encoder; scores are float32"
    )


def preprocess(images_B3HW: Tensor, size: int, fit: Fit = "crop") -> Tensor:
    """[B, 3, H, W] in [0, 1] -> normalised [B, 3, size, size]."""
    H, W = images_B3HW.shape[-2:]
    if fit == "crop":
        height, width = (size * n // min(H, W) for n in (H, W))
    else:
        height, width = (round(n * (size / max(H, W))) for n in (H, W))
    if (height, width) != (H, W):
        images_B3HW = F.interpolate(
            images_B3HW, (height, width), mode="bicubic", antialias=True
        ).clamp(0, 1)
    if fit == "crop":
        top, left = (height - size) // 2, (width - size) // 2
        images_B3HW = images_B3HW[..., top : top + size, left : left + size]
    else:
        top, left = (size - height) // 2, (size - width) // 2
        images_B3HW = F.pad(images_B3HW, (left, size - width - left, top, size - height - top))
    mean = images_B3HW.new_tensor(MEAN)[:, None, None]
    std = images_B3HW.new_tensor(STD)[:, None, None]
    return (images_B3HW - mean) / std


def unit_features(encode: Callable[[Tensor], Tensor], inputs: Tensor, batch: int) -> Tensor:
    """`encode` on `batch` rows at a time, each row of the result of length 1: fp32 [rows, E]."""
    parts = [encode(part).float() for part in inputs.split(batch)]
    return F.normalize(torch.cat(parts), dim=-1)


def load_model(model_class: Any, path: str, revision: str | None) -> Any:
    """A `model_class` from a CLIP folder or hub id, in float32 on the CPU.

    ValueError where it is no CLIP or lacks weights of the class, OSError where there are none.
    """
    where = f"path: {path!r}"
    _check_type(where, path, revision, ("clip", model_class.config_class.model_type))
    return filled_model(
        model_class, where, model_path(path), revision=revision, use_safetensors=True
    )


def build_clip(config_path: str, state: dict[str, Tensor], where: str) -> CLIPModel:
    """A CLIPModel of a folder's or hub id's config.json, with the weights `state`.

    ValueError where that is no CLIP; and, opening with `where`, unless the names and shapes of
    `state` are exactly its own.
    """
    _check_type(f"base: {config_path!r}", config_path, None, ("clip",))
    config = CLIPConfig.from_pretrained(model_path(config_path))
    return filled_model(CLIPModel, where, None, config=config, state_dict=state, exact=True)


def _check_type(where: str, path: str, revision: str | None, kinds: tuple[str, ...]) -> None:
    found = CLIPConfig.get_config_dict(model_path(path), revision=revision)[0].get("model_type")
    if found not in kinds:
        wanted = " or ".join(dict.fromkeys(kinds))
        raise ValueError(f"{where} holds a model of type {found!r}; it must be {wanted}")


def read_weights(path: str, file: str, revision: str | None) -> dict[str, Tensor]:
    """The state dict in `file` (.safetensors, or torch's format) of a folder or hub id.

    A training checkpoint's is under `state_dict`. ValueError where the file holds none.
    """
    found = cached_file(model_path(path), file, revision=revision)
    try:
        if file.endswith(".safetensors"):
            return load_file(found)
        saved = torch.load(found, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise what their readers meet
        raise ValueError(
            f"{found} cannot be read as tensors ({type(error).__name__}); it must be safetensors, "
            "or a file of torch.save that holds tensors and no code"
        ) from error
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{found} holds no state dict (names and tensors)")
    return state


class Clip:
    """A frozen CLIPModel and its tokenizer.

    `scale` is exp(logit_scale), taken before the model is cast: in bfloat16 it would be 1 % off.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer_path: str,
        settings: ClipSettings,
        device: torch.device,
        *,
        tokenizer_revision: str | None = None,
        fit: Fit = "crop",
    ) -> None:
        self.scale = float(model.logit_scale.detach().exp())
        self.tokenizer = CLIPTokenizer.from_pretrained(
            model_path(tokenizer_path), revision=tokenizer_revision
        )
        text = model.config.text_config
        if len(self.tokenizer) != text.vocab_size:
            raise ValueError(
                f"the tokenizer of {tokenizer_path!r} has {len(self.tokenizer)} tokens, the model "
                f"{text.vocab_size}"
            )
        self.length = text.max_position_embeddings
        self.size, self.fit = model.config.vision_config.image_size, fit
        self.model = model.to(device, getattr(torch, settings.dtype)).eval().requires_grad_(False)
        self.batch, self.device = settings.batch, device

    def image_features(self, images_B3HW: Tensor) -> Tensor:
        """fp32 [B, E], each of length 1; gradients reach the images."""

        def encode(part: Tensor) -> Tensor:
            pixels = preprocess(part, self.size, self.fit).to(self.model.dtype)
            return self.model.get_image_features(pixels).pooler_output

        return unit_features(encode, images_B3HW.to(self.device), self.batch)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """fp32 [U, E], each of length 1."""
        ids_UL = self.tokenizer(
            list(prompts),
            padding=True,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).input_ids.to(self.device)
        # No attention mask: attention is causal, so the end token never sees the padding behind it.
        return unit_features(
            lambda part: self.model.get_text_features(part).pooler_output, ids_UL, self.batch
        )

    def cosine(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """fp32 [B]: the cosine of each image's features with its prompt's."""
        distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        text_BE = self.text_features(list(distinct))[[distinct[prompt] for prompt in prompts]]
        return (self.image_features(images_B3HW) * text_BE).sum(-1)
