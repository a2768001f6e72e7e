"""Rotary positions of a transformer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class RememberedPositions(nn.Module):
    """Rotary tables of positions: made once, for a model whose positions are always the same.

    A policy has one size and one length of text: positions of one shape are the same ones.
    """

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self._known: dict[Any, Any] = {}

    def forward(self, ids: Tensor) -> Any:
        key = ids.shape, ids.device, ids.dtype, type(ids)
        if key not in self._known:
            self._known = {key: self.embed(ids)}
        return self._known[key]
