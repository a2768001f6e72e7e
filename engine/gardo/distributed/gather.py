"""Gather once: ZeRO-3's weights whole for as long as many forward passes run.

Inside, every parameter is gathered and DeepSpeed's module hooks are off; otherwise each module
would release what it used, and gather it again for the next forward pass. Afterwards the very same
hooks are back in the very same order, so that training goes on bit for bit, with its trace of what
to prefetch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from gardo.distributed.base import DistributedSettings, RolloutSettings
from gardo.distributed.zero_config import numel

SHARE = 0.75  # of what is free when the engine has started; the rest is for activations


class GatherOnce:
    """Gathers the weights of `module`, block by block, one collective each.

    `offload` is DeepSpeed's DeepSpeedZeRoOffload, which owns the hooks.
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


def choose_gather(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    offload: Any,
    *,
    settings: DistributedSettings,
    rollout: RolloutSettings,
    free: int,
    agree_max: Callable[[int], int],
) -> tuple[GatherOnce | None, str]:
    """Gather-once where a recipe asks for it and can have it, and a line that says why (stage 3).

    `free` bytes are left on this rank; `agree_max` is the engine's, because all ranks choose alike.
    """
    if rollout.gather == "step":
        return None, "weights gathered at every forward (rollout.gather: step)"
    if settings.hpz > 1:
        return None, "weights gathered at every forward (distributed.hpz has its own copies)"
    parameters = list(module.parameters())
    needed = numel(parameters) * parameters[0].element_size()
    sizes = f"{needed / 2**30:.2f} GiB of weights, {free / 2**30:.2f} GiB free"
    room = SHARE * free if rollout.gather == "auto" else free
    if agree_max(int(needed > room)):
        return None, f"weights gathered at every forward: no room on some rank (here {sizes})"
    once = GatherOnce(module, blocks, offload)
    problem = once.probe()
    if agree_max(int(problem is not None)):
        return None, (
            "weights gathered at every forward: gathering once does not work with deepspeed "
            f"{version('deepspeed')} ({problem or 'on another rank'})"
        )
    return once, f"weights gathered once a phase: {sizes}"


def _alone() -> bool:
    return torch.distributed.get_world_size() == 1
