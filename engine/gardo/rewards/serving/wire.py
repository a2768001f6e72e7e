"""Bodies of requests and answers: tensors as safetensors, all else as JSON in their metadata.

Nothing that is read can run. Pictures travel as they are (float32), so that a reward says the same
wherever it runs, or rounded to 8 bits, which is what a saved picture has: a quarter of the bytes.

Shapes: B images, N pairs of images.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError

from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
TOKEN = "GARDO_REWARD_TOKEN"  # the environment variable, at both ends
CONTENT_TYPE = "application/vnd.gardo.safetensors"
Pixels = Literal["float32", "uint8"]
PICTURES = {"score": ("images",), "compare": ("first", "second")}


class BadBody(ValueError):
    """What came over the line is not what is expected there."""


@dataclass(frozen=True, eq=False)
class Request:
    """A question to a reward; `pictures` are float32 in [0, 1], [B, 3, H, W] each, all alike."""

    pictures: tuple[Tensor, ...]
    prompts: tuple[Prompt, ...]
    exact: bool = True  # computed as it is asked, with no other question beside it

    @property
    def method(self) -> str:
        return "score" if len(self.pictures) == 1 else "compare"


@dataclass(frozen=True, eq=False)
class Scored:
    """An answer: values of images, fp32 [B], or features [B, D]; NaN where an image has none."""

    values: Tensor
    costs: Mapping[str, float] | None = None  # what a judge's questions took: judging/base.COSTS
    trouble: str = ""  # why images have none


def secret(variable: str, value: str | None) -> str | None:
    """The secret that an environment variable holds, without ends of lines; None if it is empty.

    ValueError, without the value, where it cannot stand in a header.
    """
    if not value:
        return None
    found = value.rstrip("\r\n")
    if not re.fullmatch("[!-~]+", found):
        raise ValueError(
            f"{variable}: has a character that a header cannot hold; give printable ASCII without "
            "blanks"
        )
    return found


def pack_request(request: Request, pixels: Pixels = "float32") -> bytes:
    names = PICTURES[request.method]
    tensors = {
        name: _as(picture, pixels) for name, picture in zip(names, request.pictures, strict=True)
    }
    prompts = [[str(p), dict(p.metadata)] for p in request.prompts]
    return _pack(tensors, {"prompts": prompts, "exact": request.exact})


def unpack_request(body: bytes, method: str) -> Request:
    """BadBody says what is wrong."""
    tensors, said = _unpack(body)
    names = PICTURES[method]
    if set(tensors) != set(names):
        raise BadBody(f"tensors {sorted(tensors)}; {method} takes {list(names)}")
    pictures = tuple(_pictures(name, tensors[name]) for name in names)
    prompts = said.get("prompts")
    if not isinstance(prompts, list) or not all(map(_is_prompt, prompts)):
        raise BadBody("prompts: a list of [text, metadata] is expected")
    if {len(p) for p in pictures} != {len(prompts)} or len({p.shape for p in pictures}) != 1:
        shapes = [list(p.shape) for p in pictures]
        raise BadBody(f"{len(prompts)} prompts for pictures {shapes}; as many are expected")
    exact = said.get("exact", True)
    if not isinstance(exact, bool):
        raise BadBody(f"exact: {exact!r} is no truth value")
    return Request(pictures, tuple(Prompt(text, about) for text, about in prompts), exact)


def pack_answer(answer: Scored) -> bytes:
    values = answer.values.detach().float().cpu()
    return _pack({"values": values}, {"costs": answer.costs, "trouble": answer.trouble})


def unpack_answer(body: bytes, count: int) -> Scored:
    """Of `count` images; BadBody where it is no such answer."""
    tensors, said = _unpack(body)
    values = tensors.get("values")
    if values is None or values.dtype != torch.float32 or values.dim() not in (1, 2):
        raise BadBody("no values of type float32, [B] or [B, D]")
    if len(values) != count:
        raise BadBody(f"{len(values)} values for {count} images")
    costs, trouble = said.get("costs"), said.get("trouble", "")
    if not (costs is None or _are_costs(costs)) or not isinstance(trouble, str):
        raise BadBody("costs: numbers by name, and trouble: a text are expected")
    return Scored(values, costs, trouble)


def _pack(tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save

    metadata = {"gardo": json.dumps({"version": VERSION, **said}, allow_nan=False)}
    # an image may be compared with itself, and safetensors wants a storage for each
    packed: bytes = save({name: t.clone().contiguous() for name, t in tensors.items()}, metadata)
    return packed


def _unpack(body: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors.torch import load

    try:
        tensors = load(body)
        size = int.from_bytes(body[:8], "little")
        said = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["gardo"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadBody(f"no safetensors with metadata of this service: {error}") from None
    if not isinstance(said, dict) or said.get("version") != VERSION:
        raise BadBody(f"not of version {VERSION}; use the same release on both sides")
    return tensors, said


def _as(pictures: Tensor, pixels: Pixels) -> Tensor:
    pictures = pictures.detach().float()
    if pixels == "uint8":
        pictures = (pictures * 255).round().clamp(0, 255).to(torch.uint8)
    return pictures.cpu()


def _pictures(name: str, given: Tensor) -> Tensor:
    if given.dim() != 4 or given.shape[1] != 3 or not given.numel():
        raise BadBody(f"{name}: shape {list(given.shape)}; [B, 3, H, W] is expected")
    if given.dtype == torch.uint8:
        return given.float() / 255
    if given.dtype != torch.float32:
        raise BadBody(f"{name}: {given.dtype}; float32 or uint8 is expected")
    if not bool(((given >= 0) & (given <= 1)).all()):
        raise BadBody(f"{name}: values outside of [0, 1]")
    return given


def _are_costs(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(v) in (int, float) and math.isfinite(v) and v >= 0 for v in value.values()
    )


def _is_prompt(value: Any) -> bool:
    match value:
        case [str(), dict()]:
            return True
    return False
