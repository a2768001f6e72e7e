"""A world of 64 x 64 pictures: a word in a colour on a ground, perhaps with a line or a frame.

A caption quotes the word, as the ocr reward reads prompts: `"STOP" in red on navy with a frame`.
Words are spelt in capitals and digits, at most five of them, in the fonts of matplotlib's wheel. A
world's held-out words are never drawn in pre-training, so that what a model has learned can be told
from what it can spell.

Shapes: B pictures, F fonts, N texts, K = 8 places of a label, H = W = 64 pixels. Pictures: float32
[B, 3, H, W] in [0, 1].
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from gardo.tiny.world import HUES, hsv_to_rgb

SIZE = 64
LONGEST = 5  # characters of a word
CHARACTERS = string.ascii_uppercase + string.digits
GROUNDS = {  # name: (RGB, value of the ink)
    "black": ((0.08, 0.08, 0.08), 0.95),
    "navy": ((0.06, 0.09, 0.31), 0.95),
    "white": ((0.92, 0.92, 0.92), 0.70),
}
DECORATIONS = ("nothing", "line", "frame")
CLASSES = ("", *CHARACTERS, *HUES, *GROUNDS, *DECORATIONS)  # what may stand at a place of a label
PLACES = LONGEST + 3  # the characters, the colour, the ground, the decoration
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
BOX = (48, 28)  # pixels, width and height that a word fills at most
CENTRE = (32, 27)  # of a word, (x, y); the line is below it
_CAPTION = re.compile(r'"([A-Z0-9]+)" in (\w+) on (\w+)(?: with a (\w+))?')


@dataclass(frozen=True)
class World:
    """What is drawn: words, and in pre-training other texts as often as words."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    others: tuple[str, ...] = ()
    fonts: tuple[str, ...] = ("DejaVuSans-Bold.ttf",)
    colours: tuple[str, ...] = tuple(HUES)
    grounds: tuple[str, ...] = tuple(GROUNDS)
    decorations: tuple[str, ...] = DECORATIONS
    shift: int = 3  # pixels by which a word may stand off its centre, on either axis

    @property
    def texts(self) -> tuple[str, ...]:
        return (*self.trained, *self.others, *self.held_out)

    def captions(self, words: Sequence[str], seed: int) -> list[str]:
        """One of each word, its looks drawn at random."""
        pick = random.Random(seed).choice
        return [
            caption(word, pick(self.colours), pick(self.grounds), pick(self.decorations))
            for word in words
        ]


def words_world() -> World:
    """120 English words, every fifth held out; texts of random characters teach to spell."""
    listed = Path(__file__).with_name("words.txt").read_text(encoding="utf-8").split()
    draw = random.Random(0)
    random_texts = [
        "".join(draw.choices(CHARACTERS, k=draw.randint(2, LONGEST))) for _ in range(20_000)
    ]
    return World(
        trained=tuple(word for i, word in enumerate(listed) if i % 5 != 4),
        held_out=tuple(listed[4::5]),
        others=tuple(sorted({*random_texts} - {*listed})),
        fonts=("DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf", "DejaVuSerif-Bold.ttf"),
    )


def numbers_world() -> World:
    """The 90 numbers of two digits, a fifth held out: every digit is seen at both places."""
    held_out = [n for n in range(10, 100) if (3 * (n // 10) + n % 10) % 5 == 4]
    return World(
        trained=tuple(str(n) for n in range(10, 100) if n not in held_out),
        held_out=tuple(map(str, held_out)),
        colours=("red", "yellow", "cyan"),
        grounds=("black",),
        decorations=("nothing",),
        shift=0,
    )


# ---- captions ------------------------------------------------------------------------------------


def caption(word: str, colour: str, ground: str, decoration: str) -> str:
    tail = "" if decoration == DECORATIONS[0] else f" with a {decoration}"
    return f'"{word}" in {colour} on {ground}{tail}'


def parse(prompt: str) -> tuple[str, str, str, str]:
    """(word, colour, ground, decoration) of a caption. ValueError says what is no caption's."""
    found = _CAPTION.fullmatch(prompt)
    if not found:
        raise ValueError(
            f"prompt {prompt!r}: expected such as {caption('STOP', 'red', 'navy', 'line')}"
        )
    word, colour, ground, decoration = found[1], found[2], found[3], found[4] or DECORATIONS[0]
    for name, known in ((colour, HUES), (ground, GROUNDS), (decoration, DECORATIONS)):
        if name not in known:
            raise ValueError(f"prompt {prompt!r}: {name!r} is none of {', '.join(known)}")
    if len(word) > LONGEST:
        raise ValueError(f"prompt {prompt!r}: {word!r} has more than {LONGEST} characters")
    return word, colour, ground, decoration


def labels(prompts: Sequence[str], device: torch.device) -> Tensor:
    """int64 [B, K], indices into CLASSES: what stands at each place of the asked pictures."""
    rows = []
    for word, *looks in map(parse, prompts):
        characters = [*word, *[""] * (LONGEST - len(word))]
        rows.append([CLASSES.index(name) for name in (*characters, *looks)])
    return torch.tensor(rows, device=device)


# ---- pictures ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """B pictures as numbers, int64 [B] indices into the world's tuples if not said otherwise."""

    text_B: Tensor
    font_B: Tensor
    colour_B: Tensor
    ground_B: Tensor
    decoration_B: Tensor
    shift_B2: Tensor  # int64 pixels, (x, y)
    light_B: Tensor  # float32, of which the ink's value is multiplied


def sample_scenes(world: World, batch: int, generator: torch.Generator) -> Scene:
    """Random scenes of pre-training: no held-out word."""

    def below(count: int, *shape: int) -> Tensor:
        return torch.randint(count, (batch, *shape), generator=generator)

    words = len(world.trained)
    text_B = below(words)
    if world.others:
        text_B = torch.where(below(2) == 1, words + below(len(world.others)), text_B)
    return Scene(
        text_B=text_B,
        font_B=below(len(world.fonts)),
        colour_B=below(len(world.colours)),
        ground_B=below(len(world.grounds)),
        decoration_B=below(len(world.decorations)),
        shift_B2=below(2 * world.shift + 1, 2) - world.shift,
        light_B=0.85 + 0.15 * torch.rand(batch, generator=generator),
    )


def captions(world: World, scene: Scene) -> list[str]:
    texts = world.texts
    columns = (scene.text_B, scene.colour_B, scene.ground_B, scene.decoration_B)
    return [
        caption(texts[t], world.colours[c], world.grounds[g], world.decorations[d])
        for t, c, g, d in zip(*(column.tolist() for column in columns), strict=True)
    ]


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS / name), size)


def mask(text: str, font: str) -> np.ndarray:
    """uint8 [H, W]: where the text, as large as fits the box, has ink."""
    left, top, right, bottom = _font(font, 100).getbbox(text)
    size = int(100 * min(BOX[0] / (right - left), BOX[1] / (bottom - top)))
    picture = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(picture).text(CENTRE, text, 255, _font(font, size), anchor="mm")
    return np.array(picture)


def masks(world: World) -> Tensor:
    """uint8 [F, N, H, W] of all texts in all fonts, 4 kB each."""
    drawn = [[mask(text, font) for text in world.texts] for font in world.fonts]
    return torch.from_numpy(np.array(drawn))


def decoration_masks(device: torch.device) -> Tensor:
    """float32 [3, H, W], in the order of DECORATIONS."""
    found = torch.zeros(len(DECORATIONS), SIZE, SIZE, device=device)
    found[1, 54:57, 8:56] = 1
    found[2, 2:62, 2:62] = 1
    found[2, 4:60, 4:60] = 0
    return found


def draw(world: World, scene: Scene, masks_FNHW: Tensor) -> Tensor:
    """The pictures of the scenes, on the masks' device."""
    device, axis = masks_FNHW.device, torch.arange(SIZE)
    x_BW, y_BH = ((axis - shift[:, None]) % SIZE for shift in scene.shift_B2.unbind(1))
    at = (scene.font_B[:, None, None], scene.text_B[:, None, None], y_BH[:, :, None], x_BW[:, None])
    ink_BHW = masks_FNHW[tuple(index.to(device) for index in at)].float() / 255
    decoration = torch.tensor([DECORATIONS.index(name) for name in world.decorations])
    over_BHW = decoration_masks(device)[decoration[scene.decoration_B].to(device)]
    grounds = [(*GROUNDS[name][0], GROUNDS[name][1]) for name in world.grounds]
    ground_B4 = torch.tensor(grounds)[scene.ground_B]
    hue = torch.tensor([HUES[name] for name in world.colours])
    rgb_C3 = hsv_to_rgb(hue, torch.full_like(hue, 0.9), torch.ones_like(hue))
    ink_B3 = (ground_B4[:, 3] * scene.light_B)[:, None] * rgb_C3[scene.colour_B]
    ground_B311, ink_B311 = (rgb[:, :3, None, None].to(device) for rgb in (ground_B4, ink_B3))
    return torch.lerp(ground_B311, ink_B311, torch.maximum(ink_BHW, over_BHW)[:, None])
