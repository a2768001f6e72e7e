"""Prompt files, and which of their prompts a step uses: a function of (seed, step).

    prompts.txt    one prompt a line
    prompts.jsonl  one JSON object a line: its "prompt", and anything else, which rewards may read

Every epoch is a permutation of the file, so each prompt comes once before any comes twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch

from gardo.streams import Stream
from gardo.types import Prompt
from gardo_kernels import random_uniform

MAX_BYTES = 64 << 20
MAX_PROMPTS = 1_000_000
MEND = 'write one object a line, such as {"prompt": "two red circles", "tag": "counting"}'
SHOWN = 60  # characters of a line, in an error


def load_prompts(path: Path) -> list[Prompt]:
    """The prompts of a UTF-8 file, empty lines left out.

    In a file NAME.jsonl, what an object says beside its "prompt" is the prompt's metadata.
    ValueError says what is wrong with the file, in which line, and how to mend it.
    """
    if not os.path.isfile(path):
        raise ValueError(f"no such file: {str(path)!r}; give a text file with one prompt a line")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{str(path)!r} is larger than {MAX_BYTES >> 20} MiB; split it")
    if path.suffix.lower() == ".json":
        raise ValueError(f"{str(path)!r}: {MEND}, and call the file {path.stem}.jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8 (byte {error.start}); save it as UTF-8, "
            "for example with iconv -t UTF-8"
        ) from error
    if text.count("\n") > MAX_PROMPTS:
        raise ValueError(f"{str(path)!r} has more than {MAX_PROMPTS} lines; split it")
    if "\0" in text:
        raise ValueError(f"{str(path)!r} is no text: it has a NUL in it; write one prompt a line")
    if path.suffix.lower() == ".jsonl":
        prompts = _from_json_lines(text, path)
    else:
        prompts = [Prompt(line.strip()) for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{str(path)!r} is empty; write one prompt a line")
    return prompts


def _from_json_lines(text: str, path: Path) -> list[Prompt]:
    prompts = []
    # not splitlines(), which would split at U+2028 inside a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                prompts.append(_from_json(line.strip()))
        except ValueError as error:
            raise ValueError(f"{str(path)!r}, line {number}: {error}") from None
    return prompts


def _from_json(line: str) -> Prompt:
    """The prompt of one object. ValueError says what is wrong with the line."""
    shown = line if len(line) <= SHOWN else f"{line[:SHOWN]}..."
    try:
        said = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}: {error.msg}"
        raise ValueError(f"{shown} is not JSON ({where}); {MEND}") from None
    except RecursionError:
        raise ValueError(f"{shown} is nested too deeply; {MEND}") from None
    if not isinstance(said, dict):
        raise ValueError(f"{shown} is no JSON object; {MEND}")
    if "prompt" not in said:
        raise ValueError(f'{shown} has no "prompt"; {MEND}')
    text = said.pop("prompt")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"prompt" is {json.dumps(text)}; it must be the text to draw')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f'"prompt" is {json.dumps(text)}: one \\u escape of a pair is missing; write both'
        ) from None
    return Prompt(text.strip(), said)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{json.dumps(twice)} stands twice; keep one")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; write a number, or null")


def step_prompts(prompts: Sequence[Prompt], step: int, count: int, seed: int) -> list[Prompt]:
    """The `count` prompts of a training step."""
    first = step * count
    return [
        prompts[_drawn(len(prompts), position, seed)] for position in range(first, first + count)
    ]


def run_prompts(prompts: Sequence[Prompt], steps: int, count: int, seed: int) -> list[Prompt]:
    """The prompts that `steps` training steps of `count` prompts see, each once."""
    if steps * count >= len(prompts):
        return list(dict.fromkeys(prompts))
    drawn = (prompt for step in range(steps) for prompt in step_prompts(prompts, step, count, seed))
    return list(dict.fromkeys(drawn))


def _drawn(size: int, position: int, seed: int) -> int:
    epoch, index = divmod(position, size)
    return _order(size, epoch, seed)[index]


@lru_cache(maxsize=2)
def _order(size: int, epoch: int, seed: int) -> list[int]:
    order = random_uniform(seed, torch.tensor([epoch]), Stream.EPOCH, size)[0].argsort(stable=True)
    return [int(index) for index in order]
