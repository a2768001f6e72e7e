"""Where this rank's pieces of the trainable weights live, whatever partitions them.

A piece is a run of elements of one flattened parameter. Slots and checkpoints speak of pieces only,
so they are the same for one process and for every ZeRO stage. `home` is the tensor that the
optimizer updates (a whole parameter, or the flat fp32 tensor in which DeepSpeed packs many), and
the key of its moments.

    stage   the optimizer updates                what forward passes read
    -, 0    the parameter itself                 the same
    1, 2    this rank's part of a flat tensor    whole parameters, gathered after every step
    3       this rank's part of a flat tensor    parts, gathered when a module runs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gardo.lazily import no_grad

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """Elements start ... start + length of the flattened parameter `name` of `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    home: Tensor
    offset: int  # of the piece in the flattened home

    def of(self, tensor: Tensor) -> Tensor:
        """The piece in a tensor laid out like its home, such as a moment: [length]."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


class Shards(Protocol):
    """This rank's pieces, in an order that is the same in every call."""

    pieces: list[Piece]
    replicated: bool  # every rank holds everything

    def exchange(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Lets forward passes on every rank read `values` (one a piece) and returns what they read
        before, which exchanged back restores it bit for bit. A collective."""

    def refresh(self) -> None:
        """Lets forward passes read the masters, after those were written. A collective."""


def masters(shards: Shards) -> list[Tensor]:
    """The pieces as the optimizer updates them, fp32 unless the masters are bf16."""
    return [piece.of(piece.home) for piece in shards.pieces]


def homes(shards: Shards) -> list[Tensor]:
    """Every home once, in the order of the pieces."""
    return list({id(piece.home): piece.home for piece in shards.pieces}.values())


@no_grad
def load_masters(shards: Shards, weights: Mapping[str, Tensor]) -> None:
    """Overwrites what trains with whole parameters by name. A collective: each rank has them all"""
    for piece in shards.pieces:
        whole = weights[piece.name].reshape(-1)
        piece.of(piece.home).copy_(whole[piece.start : piece.start + piece.length])
    shards.refresh()


def _overwrite(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    kept = [t.clone() for t in tensors]
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value.to(tensor.device, non_blocking=True))  # before a change of dtype
    return kept


class WholeShards:
    """One process, or stage 0: the parameters are their own masters."""

    replicated = True

    def __init__(self, trainable: Mapping[str, nn.Parameter]) -> None:
        self.pieces = [Piece(n, tuple(p.shape), 0, p.numel(), p, 0) for n, p in trainable.items()]

    def exchange(self, values: Sequence[Tensor]) -> list[Tensor]:
        return _overwrite(masters(self), values)

    def refresh(self) -> None:
        pass


class FlatShards:
    """Stages 1 and 2: fragments of flat fp32 tensors, whole low-precision parameters."""

    replicated = False

    def __init__(self, optimizer: Any, trainable: Mapping[str, Any]) -> None:
        self._optimizer = optimizer
        flats = _flat_masters(optimizer)
        self.pieces = []
        for name, p in trainable.items():
            mapping = p._hp_mapping  # None where this rank has no part of the parameter
            if mapping is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                home = flats[mapping.param_group_index]
                self.pieces.append(
                    Piece(name, tuple(p.shape), here.start, here.numel, home, there.start)
                )

    def exchange(self, values: Sequence[Tensor]) -> list[Tensor]:
        kept = _overwrite(masters(self), values)
        self.refresh()
        return kept

    def refresh(self) -> None:
        self._optimizer.update_lp_params()  # casts the masters and gathers, as after a step


class PartitionShards:
    """Stage 3: each parameter in equal parts over the ranks, the last one padded."""

    replicated = False

    def __init__(self, optimizer: Any, trainable: Mapping[str, Any], *, rank: int) -> None:
        self._optimizer = optimizer
        self._parameters = list(trainable.values())
        flats = _flat_masters(optimizer)
        self.pieces = []
        for name, p in trainable.items():
            group, offset, padded = optimizer.grad_position[optimizer.get_param_id(p)]
            start = min(rank * padded, p.ds_numel)
            length = min(padded, p.ds_numel - start)
            self.pieces.append(Piece(name, tuple(p.ds_shape), start, length, flats[group], offset))

    def _live(self) -> list[Tensor]:
        # nothing gathered from what is written now
        self._optimizer.parameter_offload.partition_all_parameters()
        return [
            p.ds_tensor.detach().narrow(0, 0, piece.length)
            for p, piece in zip(self._parameters, self.pieces, strict=True)
        ]

    def exchange(self, values: Sequence[Tensor]) -> list[Tensor]:
        kept = _overwrite(self._live(), values)
        self._finish()
        return kept

    def refresh(self) -> None:
        _overwrite(self._live(), masters(self))
        self._finish()
        self._optimizer.invalidate_secondary_tensor()  # hpZ's copies

    def _finish(self) -> None:
        """DeepSpeed gathers on a stream of its own, which does not wait for what was written."""
        if self._parameters and self._parameters[0].ds_tensor.is_cuda:
            torch.cuda.current_stream().synchronize()


def _flat_masters(optimizer: Any) -> Sequence[Tensor]:
    """The flat fp32 tensors that a ZeRO optimizer updates on this rank, one a group."""
    for name in (
        "fp32_partitioned_groups_flat",  # stage 3
        "single_partition_of_fp32_groups",  # stages 1 and 2
        "fp32_groups_flat_partition",  # stage 1 in bf16
    ):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    raise RuntimeError(
        f"{type(optimizer).__name__} keeps its masters where this release of gardo does not look; "
        "use the deepspeed of constraints.txt"
    )
