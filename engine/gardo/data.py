"""Prompt files, and which of their prompts a step uses: a function of (seed, step).

    prompts.txt    one prompt a line
    prompts.jsonl  one JSON object a line: its "prompt", and anything else, which rewards may read

Every epoch is a permutation of the file, so each prompt comes once before any comes twice. Where
prompts have weights, an epoch is as long, and a prompt of weight w comes n w / W times in it: that
number rounded down or up (systematic sampling), and over E epochs within O(log E) of E times it,
for the offset moves by the golden ratio. W is the sum of the weights, n the number of prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn

import torch

import gardo_kernels
from gardo.settings import FieldError
from gardo.streams import Stream
from gardo.types import Prompt

MAX_BYTES = 64 << 20
MAX_PROMPTS = 1_000_000
MEND = 'write one object a line, such as {"prompt": "two red circles", "tag": "counting"}'
SHOWN = 60  # characters of a line, in an error
WEIGHT = "weight"  # what a line calls it, unless data.weights has another name
LARGEST_WEIGHT = 1e9
GOLDEN = (5**0.5 - 1) / 2


def load_prompts(path: Path) -> list[Prompt]:
    """The prompts of a UTF-8 file, empty lines left out.

    In a file NAME.jsonl, what an object says beside its "prompt" is the prompt's metadata.
    ValueError says what is wrong with the file, in which line, and how to mend it.
    """
    text = _text_of(path)
    if path.suffix.lower() == ".jsonl":
        prompts = [prompt for _, prompt in _from_json_lines(text, path)]
    else:
        prompts = [Prompt(line.strip()) for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{str(path)!r} is empty; write one prompt a line")
    return prompts


def load_lines(path: Path) -> list[tuple[int, Prompt]]:
    """As `load_prompts` of a file of JSON objects, whatever its name; each with its line's number.

    It may be empty.
    """
    return _from_json_lines(_text_of(path), path)


def _text_of(path: Path) -> str:
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
    return text


def _from_json_lines(text: str, path: Path) -> list[tuple[int, Prompt]]:
    prompts = []
    # not splitlines(), which would split at U+2028 inside a JSON string
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                prompts.append((number, _from_json(line.strip())))
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
    return prompt_of(said, "prompt")


def prompt_of(said: dict[str, Any], field: str) -> Prompt:
    """The text in `field`, and the rest as its metadata. ValueError where that is no text."""
    text = said.pop(field)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{json.dumps(field)} is {json.dumps(text)}; it must be the text to draw")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{json.dumps(field)} is {json.dumps(text)}: one \\u escape of a pair is missing; "
            "write both"
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


def weighed(prompts: Iterable[Prompt], field: str | None) -> list[Prompt]:
    """The prompts with the weights that their metadata has in `field`: 1 where it has none.

    ValueError for what is no weight; FieldError where no prompt has a field of that name.
    """
    if field is None:
        return list(prompts)
    found, said = [], 0
    for number, prompt in enumerate(prompts, start=1):
        weight = prompt.metadata.get(field, 1)
        said += field in prompt.metadata
        number_like = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number_like and 0 < weight <= LARGEST_WEIGHT):
            raise ValueError(
                f"prompt {number}, {str(prompt)[:SHOWN]!r}: {json.dumps(field)} is {weight!r}; a "
                f"weight is a number above 0, at most {LARGEST_WEIGHT:g} (data.weights: null takes "
                "none)"
            )
        found.append(prompt if weight == 1 else Prompt(prompt, prompt.metadata, float(weight)))
    if field != WEIGHT and not said:
        raise FieldError(f"data.weights: {field!r} is a field of no prompt; look at data.prompts")
    return found


def divided(prompts: Sequence[Prompt], share: float) -> tuple[list[Prompt], list[Prompt]]:
    """(those to train on, those held out), in their order.

    A hash of the text decides, so what else is in the file does not matter, prompts of one text
    stay together, and a larger share holds out the same ones and more. FieldError where one of the
    two would be empty.
    """
    trained: list[Prompt] = []
    held_out: list[Prompt] = []
    for prompt in prompts:
        digest = hashlib.sha256(prompt.encode()).digest()
        kept = int.from_bytes(digest[:8], "big") < share * 2.0**64
        (held_out if kept else trained).append(prompt)
    if not (trained and held_out):
        what, other = ("no prompt", "larger") if trained else ("every prompt", "smaller")
        raise FieldError(
            f"data.held_out: {share:g} of {len(prompts)} prompts is {what}; use a {other} share, "
            "or name a file of other prompts in evaluate.prompts"
        )
    return trained, held_out


def digest_of(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of texts, metadata and weights, in hexadecimal digits."""
    lines = ([str(p), dict(p.metadata), p.weight] for p in prompts)
    digest = hashlib.sha256()
    for line in lines:
        digest.update(json.dumps(line, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


# ---- which prompts a step uses -------------------------------------------------------------------


def step_prompts(prompts: Sequence[Prompt], step: int, count: int, seed: int) -> list[Prompt]:
    """The `count` prompts of a training step."""
    size, weights = len(prompts), _weights(prompts)
    drawn: list[Prompt] = []
    while len(drawn) < count:
        epoch, index = divmod(step * count + len(drawn), size)
        order = _order(size, epoch, seed, weights)
        drawn += [prompts[i] for i in order[index : index + count - len(drawn)]]
    return drawn


def run_prompts(prompts: Sequence[Prompt], steps: int, count: int, seed: int) -> list[Prompt]:
    """The prompts that `steps` training steps of `count` prompts see, each once.

    All of them where an epoch ends; of those with weights, some then may not have come.
    """
    if steps * count >= len(prompts):
        return list(dict.fromkeys(prompts))
    drawn = (prompt for step in range(steps) for prompt in step_prompts(prompts, step, count, seed))
    return list(dict.fromkeys(drawn))


def _weights(prompts: Sequence[Prompt]) -> tuple[float, ...] | None:
    """None where all prompts come alike."""
    weights = tuple(getattr(prompt, "weight", 1.0) for prompt in prompts)
    return weights if len(set(weights)) > 1 else None


@lru_cache(maxsize=2)
def _order(size: int, epoch: int, seed: int, weights: tuple[float, ...] | None) -> list[int]:
    """Which prompts an epoch has, one after the other."""
    order = gardo_kernels.random_uniform(seed, torch.tensor([epoch]), Stream.EPOCH, size)[
        0
    ].argsort(stable=True)
    chosen = _systematic(weights, epoch, seed) if weights else range(size)
    return [chosen[int(index)] for index in order]


def _systematic(weights: Sequence[float], epoch: int, seed: int) -> list[int]:
    """As many prompts as there are, in their order: where equal steps along the weights end."""
    start = float(gardo_kernels.random_uniform(seed, torch.tensor([0]), Stream.WEIGHTS, 1)[0, 0])
    offset = (start + epoch * GOLDEN) % 1.0
    ends = list(accumulate(weights))
    step, last, at = ends[-1] / len(ends), len(ends) - 1, 0
    chosen = []
    for k in range(len(ends)):
        while at < last and ends[at] <= (k + offset) * step:
            at += 1
        chosen.append(at)
    return chosen
