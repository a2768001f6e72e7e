"""Conditioning of prompts, computed once each; and where the text encoders are in between.

    resident   on the device, always
    offload    in host memory; on the device only while a prompt is encoded that is not known yet
    free       every prompt of the run is encoded before anything else loads, then they are dropped

A prompt is encoded alone, so that its numbers do not depend on its neighbours in a batch: they are
the same on any number of ranks and after a resume. Known prompts wait in host memory, the latest
used `ROOM` bytes of them; with `free` in files, named by their content.

Shapes: P prompts.
"""

from __future__ import annotations

import gc
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from gardo.files import write_atomically
from gardo.types import to_device

if TYPE_CHECKING:
    from torch import Tensor, nn

Residence = Literal["resident", "offload", "free"]
Text = dict[str, "Tensor"]
ROOM = 4 << 30  # bytes of host memory


class Embeddings:
    """What `encode` says of a prompt; `encode` runs while the encoders are in the pipeline."""

    def __init__(
        self,
        pipeline: Any,
        encode: Callable[[list[str]], Text],
        *,
        residence: Residence,
        device: torch.device,
        dtype: torch.dtype,
        room: int = ROOM,
    ) -> None:
        """The encoders have `dtype` where they encode; they may wait in the type of their files."""
        self._pipeline, self._encode, self._device, self._room = pipeline, encode, device, room
        self._dtype = dtype
        self._encoders: dict[str, nn.Module] = {
            name: part
            for name, part in pipeline.components.items()
            if name.startswith("text_encoder") and part is not None
        }
        self._moves = residence != "resident" and device.type != "cpu"
        self._known: OrderedDict[str, Text] = OrderedDict()
        self._bytes = 0
        self._folder: Path | None = None
        self._identity = ""
        if self._moves:
            self._show(False)
        else:
            for encoder in self._encoders.values():
                encoder.to(device, dtype)

    def __call__(self, prompts: Sequence[str]) -> Text:
        """Tensors [P, ...] of the model's dtype on the device."""
        found = {prompt: self._look_up(prompt) for prompt in dict.fromkeys(prompts)}
        new = [prompt for prompt, text in found.items() if text is None]
        if new:
            found |= self._encoded(new)
        texts = [text for prompt in prompts if (text := found[prompt])]
        return {
            name: to_device(torch.cat([t[name] for t in texts]), self._device) for name in texts[0]
        }

    def free(
        self,
        prompts: Iterable[str],
        folder: Path,
        *,
        identity: str,
        share: tuple[int, int] = (0, 1),
        wait: Callable[[], None] = lambda: None,
    ) -> int:
        """Encodes the prompts into files of `folder` and drops the encoders; how many were new.

        `identity` says which encoders these are. This rank takes share[0] of every share[1]
        prompts, and encodes those that have no file yet; `wait` returns when all ranks have.
        """

        from safetensors.torch import save

        self._folder, self._identity = folder, identity
        own = list(dict.fromkeys(prompts))[share[0] :: share[1]]
        new = [prompt for prompt in own if not self._file(prompt).is_file()]
        with self._on_device():
            for prompt in new:
                text = {name: tensor.cpu() for name, tensor in self._encode([prompt]).items()}
                path = self._file(prompt)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, save(text))
        wait()
        self._show(False)
        self._encoders.clear()
        gc.collect()  # models hold themselves in cycles
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return len(new)

    def _file(self, prompt: str) -> Path:
        name = hashlib.sha256(f"{self._identity}\n{prompt}".encode()).hexdigest()
        assert self._folder is not None
        return self._folder / name[:2] / f"{name[2:]}.safetensors"

    def _look_up(self, prompt: str) -> Text | None:
        from safetensors.torch import load_file

        if prompt in self._known:
            self._known.move_to_end(prompt)
            return self._known[prompt]
        if self._folder is None:
            return None
        path = self._file(prompt)
        if not path.is_file():
            raise RuntimeError(
                f"no embedding of {prompt!r} in {self._folder}, and the text encoders are gone; "
                "use model.encoders: offload for prompts that the recipe does not name"
            )
        return self._remember(prompt, load_file(path))

    def _encoded(self, prompts: Iterable[str]) -> dict[str, Text]:
        with self._on_device():
            return {
                prompt: self._remember(
                    prompt, {n: tensor.cpu() for n, tensor in self._encode([prompt]).items()}
                )
                for prompt in prompts
            }

    def _remember(self, prompt: str, text: Text) -> Text:
        self._known[prompt] = text
        self._bytes += _size(text)
        while self._bytes > self._room and len(self._known) > 1:
            self._bytes -= _size(self._known.popitem(last=False)[1])
        return text

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """The encoders in the pipeline, on the device; those that move go back to where they were.

        They are frozen, so what is in host memory stays as it is: pages of their files, which the
        ranks of a machine share.
        """
        if not self._moves:
            yield
            return
        tensors = [
            tensor
            for encoder in self._encoders.values()
            for tensor in chain(encoder.parameters(), encoder.buffers())
        ]
        home = [tensor.data for tensor in tensors]
        self._show(True)
        try:
            for tensor in tensors:
                there = tensor.data.to(self._device, non_blocking=True)
                tensor.data = there.to(self._dtype) if there.is_floating_point() else there
            yield
        finally:
            for tensor, data in zip(tensors, home, strict=True):
                tensor.data = data
            self._show(False)

    def _show(self, there: bool) -> None:
        """Puts the encoders into the pipeline, or takes them out: it runs on the device of its
        first component."""
        for name, encoder in self._encoders.items():
            setattr(self._pipeline, name, encoder if there else None)


def _size(text: Text) -> int:
    return sum(tensor.nbytes for tensor in text.values())
