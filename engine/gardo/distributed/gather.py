"""How passes without gradients get ZeRO-3's weights: gathered once for many, or at every forward.

DeepSpeed keeps a trace of the order in which modules run, forward and backward, prefetches by it,
and remembers for good what each place in it may release. A forward pass without its backward pass
would leave a trace that ends in the middle of a training step: neither way leaves one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from gardo.distributed.base import DistributedSettings, Engine, RolloutSettings
from gardo.distributed.zero_config import numel

SHARE = 0.75  # of what is free, where no plan says what else needs memory


class GatherEach:
    """Every forward pass gathers for itself, and prefetches by a trace of forward passes alone.

    `offload` is the DeepSpeedZeRoOffload of an engine that has run nothing yet.
    """

    def __init__(self, offload: Any) -> None:
        self._offload = offload
        self._coordinator = copy.copy(offload.param_coordinator)
        self._coordinator._clear_trace_structures()  # makes its own

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """No backward pass may run inside."""
        offload = self._offload
        offload.partition_all_parameters()
        training, offload.param_coordinator = offload.param_coordinator, self._coordinator
        try:
            yield
        finally:
            offload.partition_all_parameters()
            offload.param_coordinator = training


class GatherOnce:
    """Gathers the weights of `module`, block by block, one collective each.

    Inside, every parameter is whole and DeepSpeed's module hooks are off; otherwise each module
    would release what it used, and gather it again for the next forward pass. Afterwards the very
    same hooks are back in the very same order, so that training goes on bit for bit. `offload` is
    DeepSpeed's DeepSpeedZeRoOffload, which owns the hooks.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[nn.Module], offload: Any) -> None:
        self._module, self._offload = module, offload
        groups: list[list[Any]] = [list(block.parameters()) for block in blocks]
        inside = {id(p) for group in groups for p in group}
        groups.append([p for p in module.parameters() if id(p) not in inside])
        self._groups = [group for group in groups if group]

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """No backward pass may run inside."""
        self._offload.partition_all_parameters()
        kept = self._take_hooks_off()
        try:
            for group in self._groups:
                group[0].all_gather_coalesced(group).wait()
            yield
        finally:
            self._put_hooks_back(kept)
            for p in self._all():
                if p.ds_status.name == "INFLIGHT":  # its gather has failed
                    p.ds_status = type(p.ds_status).NOT_AVAILABLE
                p.partition([p])

    def _take_hooks_off(self) -> list[tuple[Any, Any]]:
        ids, kept = self._own_ids(), []
        for module in self._module.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                if ids & hooks.keys():
                    kept.append((hooks, dict(hooks)))
                    for number in ids & hooks.keys():
                        del hooks[number]
        return kept

    def _put_hooks_back(self, kept: list[tuple[Any, Any]]) -> None:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)

    def probe(self) -> str | None:
        """Tries it once; what does not work with this DeepSpeed, or None. A collective."""
        try:
            hooks = self._hooks()
            with self():
                whole = all(tuple(p.shape) == tuple(p.ds_shape) for p in self._all())
                bare = not any(self._hooks())
            parted = all(p.numel() == 0 or p.numel() < p.ds_numel for p in self._all())
        except (AttributeError, TypeError, KeyError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        if not (whole and bare and (parted or _alone()) and self._hooks() == hooks):
            return "weights or hooks are not as they were"
        return None

    def _all(self) -> list[Any]:
        return list(self._module.parameters())

    def _hooks(self) -> list[list[int]]:
        own, modules = self._own_ids(), self._module.modules()
        found = [
            [n for n in (*m._forward_pre_hooks, *m._forward_hooks) if n in own] for m in modules
        ]
        return [numbers for numbers in found if numbers]

    def _own_ids(self) -> set[int]:
        offload = self._offload
        handles = [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]
        return {handle.id for handle in handles}


def forget_forward(offload: Any) -> None:
    """Drops a trace that has no backward pass yet, because none will come."""
    coordinator = offload.get_param_coordinator()
    if coordinator.is_record_trace():
        coordinator._invalidate_trace()


@dataclass(frozen=True)
class Forecast:
    """What gathering once adds on a rank, at its most, to what is there when the engine starts.

    `bytes` are 0 where nobody can tell; `why` names the phase, or why not.
    """

    bytes: int
    why: str


def choose_gather(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    offload: Any,
    *,
    engine: Engine,
    settings: DistributedSettings,
    rollout: RolloutSettings,
    free: int,
    forecast: Callable[[], Forecast],
) -> tuple[GatherOnce | GatherEach, str]:
    """Gather-once where a recipe asks for it and can have it, and a line that says why (stage 3).

    `free` bytes are left on this rank of `engine`; all ranks choose alike. Rank 0 alone asks for
    the `forecast`.
    """
    if rollout.gather == "step":
        return _each(offload, "rollout.gather: step")
    if settings.hpz > 1:
        return _each(offload, "distributed.hpz has its own copies")
    if engine.world == 1 and settings.offload != "parameters":
        left, sizes = 0, "a rank alone has them whole"  # what it gathers is a view
    else:
        least = -engine.agree_max(-free)
        left, sizes = _left(module, engine, rollout.gather, least, forecast)
    if left < 0:
        return _each(offload, f"no room: {sizes}")
    once = GatherOnce(module, blocks, offload)
    problem = once.probe()
    if engine.agree_max(int(problem is not None)):
        return _each(
            offload,
            "gathering once does not work with deepspeed "
            f"{version('deepspeed')} ({problem or 'on another rank'})",
        )
    return once, f"ZeRO-3 gathers weights once a phase: {sizes}"


def _each(offload: Any, why: str) -> tuple[GatherEach, str]:
    return GatherEach(offload), f"ZeRO-3 gathers weights at every forward: {why}"


def _left(
    module: nn.Module, engine: Engine, gather: str, free: int, forecast: Callable[[], Forecast]
) -> tuple[int, str]:
    """What gathering once leaves of `free` bytes, the same on every rank, and how that is made up.

    The plan knows it; where there is none, a quarter is kept for what else needs memory.
    """
    parameters = list(module.parameters())
    weights = numel(parameters) * parameters[0].element_size()
    if gather == "iteration":
        return free - weights, f"{_gb(weights)} of weights, {_gb(free)} free"
    said = forecast() if engine.rank == 0 else Forecast(0, "by rank 0's plan")
    planned = engine.agree_max(said.bytes)
    if planned:
        sizes = f"{said.why} adds {_gb(planned)}, {_gb(weights)} of it weights; {_gb(free)} free"
        return free - planned, sizes
    room = int(SHARE * free)
    return room - weights, (
        f"{_gb(weights)} of weights, {_gb(room)} for them, three quarters of what is free "
        f"({said.why})"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _alone() -> bool:
    return torch.distributed.get_world_size() == 1
