"""Who judges the pictures of the world of words: two nets, and the rewards that they are.

    letters: {kind: "words.judges:Letters", role: auxiliary, path: FOLDER/letters.safetensors}
    genuine: {kind: "words.judges:Genuine", role: held_out, path: FOLDER/genuine.safetensors}

Both say what stands at the places of a label (world.CLASSES). `Letters` is a small convolutional
reader of the word alone that has seen clean pictures only: quick, and wrong about anything else.
`Genuine` is a transformer that judges word, colour, ground and decoration; it has also seen noised
and blurred pictures, and corrupted ones, which it is to reject. It is never optimised.

Shapes: B pictures of 64 x 64 pixels, K places of a label, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gardo.rewards.base import Reward, RewardSettings
from gardo.types import Prompt
from words import world

REJECTED = len(world.CLASSES)  # the class after all others, at every place of a corrupted picture
PATCH = 8  # pixels


class LettersNet(nn.Sequential):
    """[B, 3, 64, 64] in [0, 1] -> logits [B, 5, C] of the word's characters."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 24, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(48 * (world.SIZE // 8) ** 2, world.LONGEST * len(world.CLASSES)),
            nn.Unflatten(1, (world.LONGEST, len(world.CLASSES))),
        )


class GenuineNet(nn.Module):
    """[B, 3, 64, 64] in [0, 1] -> logits [B, K, C + 1], the last class REJECTED.

    A token asks for each place, beside those of the patches.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * PATCH**2, width)
        self.tokens = nn.Parameter(torch.randn(world.PLACES, width) / width**0.5)
        self.place = nn.Parameter(torch.zeros((world.SIZE // PATCH) ** 2, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(3)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, REJECTED + 1))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        patches = nn.functional.unfold(images_B3HW * 2 - 1, PATCH, stride=PATCH).transpose(1, 2)
        tokens = self.tokens.expand(len(images_B3HW), -1, -1)
        hidden = torch.cat([tokens, self.patch(patches) + self.place], 1)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden[:, : world.PLACES])


def _weights(path: str) -> str:
    if not os.path.isfile(path):
        raise ValueError(f"no such file: {path!r}; `./run words make` writes it")
    try:
        safe_open(path, "pt")
    except Exception as error:
        raise ValueError(f"{path!r} cannot be read: {error}; make it again") from None
    return path


class JudgeSettings(RewardSettings):
    path: Annotated[str, AfterValidator(_weights)] = Field(description="its weights")
    batch: int = Field(256, ge=1, description="images that are scored at once")


class Judge(Reward):
    """Each has its own `net`, and `values` of the log-probabilities of the asked classes."""

    Settings = JudgeSettings

    def __init__(self, settings: JudgeSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        state = load_file(settings.path)
        net = self.net_of(state)
        net.load_state_dict(state)
        self.net = net.float().to(device).eval().requires_grad_(False)

    @classmethod
    def net_of(cls, state: dict[str, Tensor]) -> nn.Module:
        """The net that has these weights."""
        raise NotImplementedError  # pragma: no cover

    def values(self, log_probability_BK: Tensor) -> Tensor:
        raise NotImplementedError  # pragma: no cover

    @torch.no_grad()
    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        label_BK = world.labels(prompts, images_B3HW.device)
        parts = zip(
            images_B3HW.split(self.settings.batch), label_BK.split(self.settings.batch), strict=True
        )
        return torch.cat([self._values(images, label) for images, label in parts])

    def _values(self, images_B3HW: Tensor, label_BK: Tensor) -> Tensor:
        log_BKC = self.net(images_B3HW).log_softmax(-1)
        asked_BK1 = label_BK[:, : log_BKC.shape[1], None]
        return self.values(log_BKC.gather(2, asked_BK1)[:, :, 0])

    @classmethod
    def check_prompt(cls, prompt: Prompt) -> None:
        world.parse(prompt)


class LettersSettings(JudgeSettings):
    floor: float = Field(-4.0, lt=0, description="log-probabilities are clamped here")


class Letters(Judge):
    """Mean log-probability of the word's characters."""

    Settings = LettersSettings

    @classmethod
    def net_of(cls, state: dict[str, Tensor]) -> nn.Module:
        return LettersNet()

    def values(self, log_probability_BK: Tensor) -> Tensor:
        return log_probability_BK.clamp(min=self.settings.floor).mean(1)


class Genuine(Judge):
    """Geometric mean of the probabilities of all that the caption says, in [0, 1]."""

    @classmethod
    def net_of(cls, state: dict[str, Tensor]) -> nn.Module:
        return GenuineNet(state["patch.weight"].shape[0])

    def values(self, log_probability_BK: Tensor) -> Tensor:
        return log_probability_BK.mean(1).exp()


# ---- what Genuine is to reject -------------------------------------------------------------------


def corrupted(images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures that no caption fits: a fifth each torn, smeared, doubled, drowned, of blobs.

    On the device of the images and the generator.
    """
    device, size = generator.device, world.SIZE

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def whole(low: int, high: int, count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator, device=device).tolist()

    torn, smeared, doubled, drowned, blobs = images_B3HW.tensor_split(5)
    ground = torn[:, :, :1, :1]
    hole = nn.functional.interpolate((uniform(len(torn), 1, 8, 8) < 0.45).float(), scale_factor=8)
    torn = torch.lerp(torn, ground, hole)
    smeared = _overlaid(
        smeared, [[(0, n * k) for n in range(4)] for k in whole(1, 4, len(smeared))]
    )
    offsets = zip(whole(3, 7, len(doubled)), whole(3, 7, len(doubled)), strict=True)
    doubled = _overlaid(doubled, [[(0, 0), offset] for offset in offsets])
    noise = torch.randn(drowned.shape, generator=generator, device=device)
    drowned = (drowned + 0.45 * noise).clamp(0, 1)
    coarse = uniform(len(blobs), 3, 9, 9)
    blobs = nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)
    return torch.cat([torn, smeared, doubled, drowned, blobs])


def _overlaid(images_B3HW: Tensor, offsets: Sequence[Sequence[Any]]) -> Tensor:
    """Each picture over copies of itself: of every pixel the one farthest from the ground."""
    found = []
    for image_3HW, moves in zip(images_B3HW, offsets, strict=True):
        copies = torch.stack([image_3HW.roll(move, (-2, -1)) for move in moves])
        contrast = (copies - image_3HW[:, :1, :1]).abs().sum(1, keepdim=True)
        found.append(
            copies.gather(0, contrast.argmax(0, keepdim=True).expand(1, *image_3HW.shape))[0]
        )
    return torch.stack(found) if found else images_B3HW
