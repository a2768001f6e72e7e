"""The built-in tiny models with what trains switched on, and what a training step makes of them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gardo.plugins import resolve
from gardo.policies.base import Policy
from gardo.policies.checkpointing import Checkpointing

CPU = torch.device("cpu")
ROWS = 3
PROMPTS = ["two red circles", "one blue square", "three green triangles"]


def built_in(family: str, weights: str = "lora", **where: Any) -> Policy:
    """The policy of builtin:FAMILY; an adapter's B is not zero, so that all of it has a gradient"""
    plugin = resolve("gardo.policies", family)
    settings = plugin.Settings(path=f"builtin:{family}", size=[16, 16], text_tokens=8)
    policy: Policy = plugin(settings, **({"dtype": torch.float32, "device": CPU} | where))
    if weights == "full":
        policy.train_full()
        return policy
    policy.train_lora(rank=4, alpha=8, targets=None, seed=5)
    draw = torch.Generator(policy.device).manual_seed(3)
    for parameter in policy.trainable().values():
        parameter.data.normal_(std=0.1, generator=draw)
    return policy


@functools.cache
def inputs(policy: Policy) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents, a time of its own and a prompt for each of ROWS rows."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, *policy.latent_shape, generator=draw).to(policy.device)
    return x, torch.tensor([0.9, 0.5, 0.1]).to(policy.device), policy.encode(PROMPTS)


def sampled(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.velocity(*inputs(policy))


def trained(policy: Policy, mode: Checkpointing = "none") -> tuple[Tensor, dict[str, Tensor]]:
    """The velocities of a training step, and the gradients of their mean square."""
    policy.transformer.disable_gradient_checkpointing()
    policy.checkpoint_activations(mode)
    out = policy.velocity(*inputs(policy))
    out.float().square().mean().backward()
    policy.transformer.disable_gradient_checkpointing()
    gradients = {}
    for name, parameter in policy.trainable().items():
        if parameter.grad is not None:  # the last block leaves its text behind
            gradients[name], parameter.grad = parameter.grad, None
    return out.detach(), gradients


class Calls(TorchDispatchMode):
    """Counts the calls of ops, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[str, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function.overloadpacket.__name__
        self.of[name] = self.of.get(name, 0) + 1
        return function(*args, **(kwargs or {}))
