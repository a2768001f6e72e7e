"""Prompts: a text file, one a line; which of them a step uses is a function of (seed, step).

Every epoch is a permutation of the file, so each prompt comes once before any comes twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gardo.streams import Stream
from gardo_kernels import random_uniform

MAX_BYTES = 64 << 20


def load_prompts(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file.

    ValueError says what is wrong with the file and how to mend it.
    """
    if not path.is_file():
        raise ValueError(f"no such file: {str(path)!r}; give a text file with one prompt a line")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{str(path)!r} is larger than {MAX_BYTES >> 20} MiB; split it")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8, "
            "for example with iconv -t UTF-8"
        ) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{str(path)!r} is empty; write one prompt a line")
    return prompts


def step_prompts(prompts: Sequence[str], step: int, count: int, seed: int) -> list[str]:
    """The `count` prompts of a training step."""
    first = step * count
    return [
        prompts[_drawn(len(prompts), position, seed)] for position in range(first, first + count)
    ]


def _drawn(size: int, position: int, seed: int) -> int:
    epoch, index = divmod(position, size)
    order = random_uniform(seed, torch.tensor([epoch]), Stream.EPOCH, size)[0].argsort(stable=True)
    return int(order[index])
