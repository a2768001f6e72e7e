"""What the rewards on CLIP share: image and text features of a frozen model.

Preprocessing: for_clip of _pixels.py. Prompts are cut to the model's length (77 tokens, the end
token kept). A prompt is encoded once, however many images of it there are, now and in later
iterations: the features of the last TEXTS prompts are kept. So that they do not depend on what was
asked before (a run that goes on from a checkpoint knows none), each prompt is encoded alone: the
last bits of a matrix product depend on how many rows it has. The tokenizer does not repair broken
Unicode (the authors' uses ftfy for that).

Shapes: B images, U distinct prompts, L tokens, E width of the features.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gardo.lazily import no_grad
from gardo.rewards._files import ModelRewardSettings
from gardo.rewards._loading import frozen
from gardo.rewards._pixels import Fit, for_clip
from gardo.rewards.base import Reward, Weights
from gardo.settings import model_path
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

TEXTS = 4096  # 16 MB of ViT-H/14's features
LAION_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def unit_features(encode: Callable[[Tensor], Tensor], inputs: Tensor, batch: int) -> Tensor:
    """`encode` on `batch` rows at a time, each row of the result of length 1: fp32 [rows, E]."""
    parts = [encode(part).float() for part in inputs.split(batch)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


class Clip:
    """A frozen CLIPModel and its tokenizer.

    `scale` is exp(logit_scale), taken before the model is cast: in bfloat16 it would be 1 % off.
    """

    def __init__(
        self,
        model: Any,
        tokenizer_path: str,
        settings: ModelRewardSettings,
        device: torch.device,
        *,
        weights: Weights | None = None,
        tokenizer_revision: str | None = None,
        fit: Fit = "crop",
    ) -> None:
        from transformers import CLIPTokenizer

        self.scale = float(model.logit_scale.detach().exp())
        self.tokenizer = CLIPTokenizer.from_pretrained(
            model_path(tokenizer_path), revision=tokenizer_revision
        )
        text = model.config.text_config
        if len(self.tokenizer) != text.vocab_size:
            raise ValueError(
                f"tokenizer: {tokenizer_path!r} has {len(self.tokenizer)} tokens, the model "
                f"{text.vocab_size}"
            )
        self.length = text.max_position_embeddings
        self.size, self.fit = model.config.vision_config.image_size, fit
        self.model = frozen(model, settings.dtype, device, weights)
        self.batch, self.device = settings.batch, device
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def image_features(self, images_B3HW: Tensor) -> Tensor:
        """fp32 [B, E], each of length 1; gradients reach the images."""

        def encode(part: Tensor) -> Tensor:
            pixels = for_clip(part.to(self.device), self.size, self.fit).to(self.model.dtype)
            return self.model.get_image_features(pixels).pooler_output

        return unit_features(encode, images_B3HW, self.batch)

    @no_grad
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """fp32 [U, E], each of length 1, whatever else is asked with it or was before."""
        return torch.stack([self._text(str(prompt)) for prompt in prompts])

    def _text(self, prompt: str) -> Tensor:
        """fp32 [E]."""
        if prompt not in self._known:
            ids_1L = self.tokenizer(
                [prompt], truncation=True, max_length=self.length, return_tensors="pt"
            ).input_ids.to(self.device)
            features_1E = self.model.get_text_features(ids_1L).pooler_output.float()
            self._known[prompt] = torch.nn.functional.normalize(features_1E, dim=-1)[0]
            if len(self._known) > TEXTS:
                self._known.popitem(last=False)
        self._known.move_to_end(prompt)
        return self._known[prompt]

    def cosine(self, images_B3HW: Tensor, prompts: Sequence[str]) -> Tensor:
        """fp32 [B]: the cosine of each image's features with its prompt's."""
        row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        text_BE = self.text_features(list(row))[[row[prompt] for prompt in prompts]]
        return (self.image_features(images_B3HW) * text_BE).sum(-1)


class ClipReward(Reward):
    """A multiple of the cosine of an image with its prompt."""

    differentiable = True

    def __init__(self, settings: Any, device: torch.device) -> None:
        super().__init__(settings, device)
        self.clip = self.load()

    def load(self) -> Clip:
        raise NotImplementedError  # pragma: no cover

    @property
    def factor(self) -> float:
        return 1.0

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.factor * self.clip.cosine(images_B3HW, prompts)
