"""A model's weights, read tensor by tensor: no rank ever holds a second copy of a model.

The module is built without weights (on torch's meta device); then each parameter is read from the
safetensors files and handed to whoever owns parameters: one process, or ZeRO-3, which keeps a part.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor, nn

# sets a parameter of a module, and keeps it
Place = Callable[["nn.Module", str, "nn.Parameter"], None]


class WeightFiles:
    """The safetensors files of one diffusers model folder, one or many with an index.

    ValueError where they are not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        if index.is_file():
            self._file = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            single = "diffusion_pytorch_model.safetensors"
            self._file = dict.fromkeys(shapes_in(folder / single), single)

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in sorted(set(self._file.values()))]

    def sha256(self) -> str:
        """Of the digests of all files. Minutes for a large model on a slow disk."""
        digest = hashlib.sha256()
        for path in self.paths:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def check(self, module: nn.Module) -> None:
        """ValueError where a parameter of `module` has no weights of its shape; reads headers."""
        shapes = {n: shape for path in self.paths for n, shape in shapes_in(path).items()}
        for name, parameter in module.named_parameters():
            if shapes.get(name) != tuple(parameter.shape):
                there = f"shape {list(shapes[name])}" if name in shapes else "no such tensor"
                raise ValueError(
                    f"{self.folder}: {name} must have shape {list(parameter.shape)}; the files have"
                    f" {there}"
                )

    def read(self, name: str) -> Tensor:
        """The tensor of a parameter; the adapter's wrapping of a layer is not in its name."""
        stored = name.replace(".base_layer.", ".")
        if stored not in self._file:
            raise ValueError(f"{self.folder} has no weights for {stored!r}")
        with safe_open(self.folder / self._file[stored], "pt") as file:
            return file.get_tensor(stored)


FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names: torch's


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The type that holds all floats of a folder's safetensors files exactly; None without any.

    transformers maps files into memory where a model is read in their type, and the processes of a
    machine share those pages; in another type each gets a copy of its own.
    """
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    found = [getattr(torch, dtype) for name, dtype in FLOATS.items() if name in names]
    return functools.reduce(torch.promote_types, found) if found else None


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a file. ValueError where it cannot be read."""
    try:
        with safe_open(path, "np") as file:  # of torch it would load all
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}; get it again") from error


def build_empty(transformer_class: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The transformer of a diffusers folder: parameters on the meta device, buffers real."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module = transformer_class.from_config(transformer_class.load_config(folder))
    files = WeightFiles(folder)
    files.check(module)
    for name, buffer in module.named_buffers():
        if name in module.state_dict():
            buffer.copy_(files.read(name))
    return module.to(dtype).eval()


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """The plain way to own a parameter: whole, on its device."""
    module.register_parameter(name, parameter)


def fill(
    module: nn.Module,
    read: Callable[[str], Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    place: Place = set_parameter,
    reads: bool = True,
) -> None:
    """Gives every parameter its values, one at a time, in the module's order.

    What is on the meta device is read, the rest (an adapter) moves. A rank that does not read
    (`reads`) hands over uninitialised memory: its owner gets the values from another rank.
    """
    for prefix, part in module.named_modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if not parameter.is_meta:
                value = parameter.detach().to(device, dtype)
            elif reads:
                value = read(f"{prefix}.{name}" if prefix else name).to(device, dtype)
                if value.shape != parameter.shape:
                    raise ValueError(f"{prefix}.{name}: the file has {tuple(value.shape)}, the "
                                     f"model {tuple(parameter.shape)}")  # fmt: skip
            else:
                value = torch.empty(parameter.shape, device=device, dtype=dtype)
            place(part, name, torch.nn.Parameter(value, requires_grad=parameter.requires_grad))
