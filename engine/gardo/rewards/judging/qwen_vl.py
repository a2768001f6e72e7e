"""Pictures and chat turns as Qwen2-VL and Qwen2.5-VL take them, on tensors; no torchvision.

Pixels. A picture is resized (bicubic, antialiased) to sides that are multiples of patch * merge,
28, and that have between `min_pixels` and `max_pixels` pixels together: the rule that the authors
call smart_resize. CLIP's statistics. Then it is cut into patches of 14 x 14, four that become one
token beside each other, and stands for both of the two frames that a patch has:

    row n of [P, V]: patch (y, x), n counts y // 2, x // 2, y % 2, x % 2 in this order
    V              : channel, frame, y and x within the patch

Tokens. A turn, with a line's end after each header and each end:

    <|im_start|>system SYSTEM <|im_end|> <|im_start|>user PARTS <|im_end|> <|im_start|>assistant

where a picture is <|vision_start|>, an <|image_pad|> for each of its tokens, <|vision_end|>. Texts
are data: no added token is looked for in them, so what spells one is letters. Other texts have the
ids that the authors' template has.

Verified against transformers' image processor and tokenizer (patches equal where nothing is
resized, to Pillow's 8 bits else). Gradients reach the pictures.

Shapes: B images, P patches of a picture, V values of a patch, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self

import torch

from gardo.rewards._pixels import CLIP, normalised, resized
from gardo.settings import config_folder, model_path, read_value

if TYPE_CHECKING:
    from torch import Tensor

START, END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
SPECIAL = (START, END, VISION_START, VISION_END, PAD)
CLASSES = {  # by the type that config.json says
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
LONGEST = 200  # times the shorter side, as the authors' rule has it


def class_of(path: str) -> str | None:
    """Of the model in a folder here, or of a hub id whose configuration is; None: not known."""
    folder = config_folder(path)
    if folder is None:
        return None
    try:
        return CLASSES.get(read_value(folder / "config.json", "model_type", str))
    except ValueError:  # loading says it
        return None


@dataclass(frozen=True)
class Pixels:
    """How a model wants its pictures."""

    min_pixels: int
    max_pixels: int
    patch: int = 14
    merge: int = 2  # patches a side of one token
    frames: int = 2  # of a patch

    @classmethod
    def of(cls, vision: Any, min_pixels: int, max_pixels: int) -> Self:
        """For a vision tower of this configuration."""
        return cls(
            min_pixels,
            max_pixels,
            vision.patch_size,
            vision.spatial_merge_size,
            vision.temporal_patch_size,
        )

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Of a picture once it is resized. ValueError where it is too long for its width.

        The order of the operations is the authors': a side of exactly 16 * 28 must not become 15.
        """
        if max(height, width) > LONGEST * min(height, width):
            raise ValueError(f"a picture of {height} x {width} is longer than {LONGEST} : 1")
        side = self.patch * self.merge
        new_height, new_width = (round(n / side) * side for n in (height, width))
        if new_height * new_width > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            new_height, new_width = (
                max(side, math.floor(n / shrink / side) * side) for n in (height, width)
            )
        elif new_height * new_width < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            new_height, new_width = (math.ceil(n * grow / side) * side for n in (height, width))
        return new_height, new_width

    def tokens(self, height: int, width: int) -> int:
        """How many a picture of this size is, before it is resized."""
        new_height, new_width = self.size(height, width)
        return new_height * new_width // (self.patch * self.merge) ** 2

    def patches(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [0, 1] -> patches [B, P, V]; int64 [B, 3]: frames, rows, columns."""
        B, channels = images_B3HW.shape[:2]
        height, width = self.size(*images_B3HW.shape[-2:])
        pixels = normalised(resized(images_B3HW, height, width), CLIP)
        patch, merge = self.patch, self.merge
        rows, columns = height // patch, width // patch
        cut = pixels.reshape(
            B, channels, rows // merge, merge, patch, columns // merge, merge, patch
        ).permute(0, 2, 5, 3, 6, 1, 4, 7)
        still = cut[:, :, :, :, :, :, None].expand(*cut.shape[:6], self.frames, patch, patch)
        grid_B3 = torch.tensor([[1, rows, columns]] * B, device=images_B3HW.device)
        return still.reshape(B, rows * columns, -1), grid_B3


class Words:
    """A Qwen tokenizer that knows what is data."""

    def __init__(self, tokenizer: Any, where: str, special: Iterable[str] = SPECIAL) -> None:
        """ValueError, opening with `where`, for one that lacks a special token."""
        self.tokenizer = tokenizer
        known = tokenizer.get_added_vocab()
        lacks = [name for name in special if name not in known]
        if lacks:
            raise ValueError(f"{where} has no token {lacks[0]}; it needs a Qwen2-VL tokenizer")
        self.id = {name: known[name] for name in special}
        # padding is masked: any token would do
        self.pad = self.id[END] if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def data(self, text: str) -> list[int]:
        """The ids of a text, none of them an added token's."""
        parts = self.tokenizer.backend_tokenizer
        text = text.encode(errors="replace").decode()  # half of a surrogate pair is no text
        text = parts.normalizer.normalize_str(text) if parts.normalizer else text
        words = parts.pre_tokenizer.pre_tokenize_str(text)
        return [token.id for word, _ in words for token in parts.model.tokenize(word)]

    def picture(self, tokens: int) -> list[int]:
        return [self.id[VISION_START], *[self.id[PAD]] * tokens, self.id[VISION_END]]

    def turn(self, system: str, parts: Sequence[str | Sequence[int]]) -> list[int]:
        """The ids of a turn up to where the model answers; texts side by side are one."""
        start, end = [self.id[START]], [self.id[END]]
        pieces = [start, f"system\n{system}", end, "\n", start, "user\n", *parts]
        pieces += [end, "\n", start, "assistant\n"]
        ids: list[int] = []
        for texts, group in groupby(pieces, lambda piece: isinstance(piece, str)):
            if texts:
                ids += self.data("".join(map(str, group)))
            else:
                ids += [token for piece in group for token in piece if isinstance(token, int)]
        return ids

    def rows(self, turns: Sequence[Sequence[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        """int64 [B, L] and its mask, 1 where a token is: padded to the longest on one side."""
        most = max(map(len, turns))
        ids, mask = [], []
        for turn in turns:
            none = most - len(turn)
            pad, off, on = [self.pad] * none, [0] * none, [1] * len(turn)
            ids.append([*pad, *turn] if left else [*turn, *pad])
            mask.append([*off, *on] if left else [*on, *off])
        return torch.tensor(ids), torch.tensor(mask)


def load_words(path: str, revision: str | None, *, field: str, more: Sequence[str] = ()) -> Words:
    """The tokenizer of a folder or hub id, with special tokens `more` that it may lack.

    ValueError, opening with the `field` that names it, where it is no Qwen2-VL tokenizer.
    """
    from transformers import Qwen2Tokenizer

    where = f"{field}: {path!r}"
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(model_path(path), revision=revision)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{where} holds no tokenizer: {error}") from error
    tokenizer.add_tokens([*more], special_tokens=True)
    return Words(tokenizer, where, (*SPECIAL, *more))
