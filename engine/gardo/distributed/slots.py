"""Slots: named copies of the trainable weights, held shard by shard in fp32.

Using a slot writes it into the live shards, runs, and writes the live weights back, bit for bit.
Nothing is gathered for it, and the same code serves LoRA and full fine-tuning, one process and
ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

LIVE = "train"


class Shards(Protocol):
    """This rank's pieces of the trainable weights."""

    def live(self) -> Sequence[Tensor]:
        """What forward passes read (the pieces that are gathered from), in the model's dtype."""

    def masters(self) -> Sequence[Tensor]:
        """The fp32 pieces that the optimizer updates; where there are no others, the live ones."""

    def settle(self) -> None:
        """Drops anything gathered from the live pieces, so that what is written there is read."""


class Slots:
    """Slots by name; "train" is the live weights."""

    def __init__(self, shards: Shards, names: Sequence[str]) -> None:
        if LIVE in names:
            raise ValueError(f'a slot cannot be called "{LIVE}": that is the live weights')
        self._shards = shards
        self._slots = {n: [m.detach().float().clone() for m in shards.masters()] for n in names}
        self.exchanged: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def pieces(self, name: str) -> list[Tensor]:
        """This rank's fp32 pieces of a slot."""
        if name not in self._slots:
            raise KeyError(f"no slot {name!r}; the slots are {', '.join(self._slots) or 'none'}")
        return self._slots[name]

    @contextmanager
    @torch.no_grad()
    def use(self, name: str) -> Iterator[None]:
        """Forward passes inside see the slot's weights; no optimizer step may happen there."""
        self._check_free()
        if name == LIVE:
            yield
            return
        pieces = self.pieces(name)
        live = self._shards.live()
        kept = [t.detach().clone() for t in live]
        self._write(live, pieces)
        self.exchanged = name
        try:
            yield
        finally:
            self._write(live, kept)
            self.exchanged = None

    @torch.no_grad()
    def copy(self, source: str, *, to: str) -> None:
        """slot `to` := slot or live weights `source`, in fp32."""
        self._check_free()
        pieces = self._shards.masters() if source == LIVE else self.pieces(source)
        for slot, piece in zip(self.pieces(to), pieces, strict=True):
            slot.copy_(piece)

    @torch.no_grad()
    def decay(self, name: str, rate: float) -> None:
        """slot := rate slot + (1 - rate) live weights, in fp32 (an exponential moving average)."""
        self._check_free()
        for slot, master in zip(self.pieces(name), self._shards.masters(), strict=True):
            slot.lerp_(master.float(), 1.0 - rate)

    def _check_free(self) -> None:
        if self.exchanged is not None:
            raise RuntimeError(f"slot {self.exchanged!r} is in use; uses do not nest, and the live "
                               "weights are away")  # fmt: skip

    def _write(self, live: Sequence[Tensor], pieces: Sequence[Tensor]) -> None:
        self._shards.settle()
        for tensor, piece in zip(live, pieces, strict=True):
            tensor.detach().copy_(piece)
