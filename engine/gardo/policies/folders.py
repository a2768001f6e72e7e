"""Fully trained weights as diffusers folders, written tensor by tensor.

A safetensors file is the length of a JSON header, the header, and the tensors' bytes end to end
(github.com/huggingface/safetensors, "Format"). The header needs shapes only, so no more than one
tensor is in memory at a time, however large the model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

STEM = "diffusion_pytorch_model"
SHARD_BYTES = 5 * 10**9  # the most a file holds, as in diffusers' own folders
NAMES = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}

Shapes = Mapping[str, Sequence[int]]


def write_tensors(
    file: Path,
    shapes: Shapes,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    metadata: Mapping[str, str] = {"format": "pt"},
) -> None:
    """A safetensors file of these tensors, which `read` gives one at a time.

    The same bytes every time: the library writes metadata of several keys in any order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[str(dtype)],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(math.ceil(len(text) / 8) * 8)  # the data starts at a multiple of 8
    file.unlink(missing_ok=True)  # it may be a link to another folder's
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            flat = read(name).to("cpu", dtype).contiguous().view(-1)
            opened.write(flat.view(torch.uint8).numpy().data)


def write_shards(
    folder: Path,
    shapes: Shapes,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    limit: int = SHARD_BYTES,
) -> None:
    """The weights of a diffusers model: one file, or many of at most `limit` bytes and an index.

    A tensor larger than `limit` has a file of its own. Weights that were there are replaced.
    """
    shards: list[dict[str, Sequence[int]]] = [{}]
    room = limit
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = shape
        room -= size
    count = len(shards)
    names = [f"{STEM}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = names if count > 1 else [f"{STEM}.safetensors"]
    for old in folder.glob(f"{STEM}*.safetensors*"):
        old.unlink()
    for file, shard in zip(names, shards, strict=True):
        write_tensors(folder / file, shard, read, dtype)
    if count > 1:
        size = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        text = json.dumps(index, indent=2)
        (folder / f"{STEM}.safetensors.index.json").write_text(text, encoding="utf-8")


def save_transformer(
    transformer: Any,
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    dtype: torch.dtype,
    limit: int = SHARD_BYTES,
) -> Path:
    """The folder of the transformer's `from_pretrained`, with `weights` for its parameters.

    The transformer itself gives its configuration, shapes and buffers; its parameters may be
    anywhere. Returns the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(transformer.named_parameters())
    buffers = {n: transformer.get_buffer(n) for n in transformer.state_dict().keys() - parameters}
    shapes = {n: tuple(b.shape) for n, b in sorted(buffers.items())}
    shapes |= {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in parameters.items()}
    transformer.save_config(folder)
    write_shards(folder, shapes, lambda n: buffers[n] if n in buffers else weights[n], dtype, limit)
    return folder


def link_pipeline(base: Path, folder: Path) -> None:
    """Everything of a pipeline's folder but its transformer.

    Hard links where the file system has them: then the two folders share these files.
    """
    index = json.loads((base / "model_index.json").read_text(encoding="utf-8"))
    parts = [n for n in index if (base / n).is_dir() and n != "transformer"]
    files = [base / "model_index.json", *(p for n in parts for p in (base / n).rglob("*"))]
    for file in files:
        if file.is_file():
            target = folder / file.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(file.resolve(), target)
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(file, target)
