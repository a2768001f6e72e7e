"""A LoRA and the layer that it is added to as one linear: x W' + s (x A') B'.

PEFT's layer makes (x A') B', scales it and adds it: three passes over the output beside the matmul.
Here the second product is added up into the layer's own output, and layers of one input (an
attention's query, key and value) share one first product, over their A side by side. The sum is
rounded once, PEFT's three times: values and gradients differ from PEFT's by rounding.

The modules stay PEFT's, with their names and parameters, so checkpoints, slots and exports are the
same; W is never changed, and may be quantised. Inside blocks only: there ZeRO-3 gathers a block's
weights together, elsewhere for the module that is called.

Source: Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

ADAPTER = "default"  # diffusers' name of the only one there is


def fold_adapters(blocks: Iterable[nn.Module], *, in_place: bool) -> None:
    """Has the adapted linears of the blocks add their adapter as it is said above.

    `in_place`: nothing keeps what a layer itself has made, so that the sum may take its place when
    there are gradients too; without them it always does. Classes change to subclasses of
    themselves, of the same names; what PEFT does otherwise (dropout, variants such as DoRA) stays.
    """
    from peft.tuners.lora import LoraLayer

    for block in blocks:
        for layer in block.modules():
            if isinstance(layer, LoraLayer) and _is_plain(layer):
                kind: Any = type(layer)
                layer.__class__ = _folded(kind)
                # of a quantised layer autograd does not let it be changed
                layer.in_place = in_place and type(layer.get_base_layer()) is torch.nn.Linear


def _is_plain(layer: Any) -> bool:
    return (
        isinstance(layer.get_base_layer(), torch.nn.Linear)
        and list(layer.lora_A) == [ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], torch.nn.Identity)
        and ADAPTER not in layer.lora_variant
        and not layer.lora_bias[ADAPTER]
    )


@functools.cache
def _folded(original: type) -> type:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or not _adds(self, x):
            return original.forward(self, x, *args, **kwargs)  # type: ignore[attr-defined, no-any-return]
        return _together([self], x)[0]

    body = {"forward": forward, "__module__": original.__module__, "is_folded": True}
    return type(original.__name__, (original,), body)


def _adds(layer: Any, x: Tensor) -> bool:
    """Whether the adapter is on, apart from W, and of the input's dtype."""
    off = layer._disable_adapters or layer.merged_adapters
    return not off and bool(layer.lora_A[ADAPTER].weight.dtype == x.dtype)


def project(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """What each of the layers makes of x [..., D]: [..., N] each."""
    if all(hasattr(layer, "is_folded") and _adds(layer, x) for layer in layers):
        return _together(layers, x)
    return [layer(x) for layer in layers]


def _together(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    halves = [layer.lora_A[ADAPTER].weight for layer in layers]
    flat = x.flatten(0, -2)
    few = torch.nn.functional.linear(flat, halves[0] if len(halves) == 1 else torch.cat(halves))
    parts = few.split([half.shape[0] for half in halves], -1)
    made = (_added(layer, flat, part) for layer, part in zip(layers, parts, strict=True))
    return [out.unflatten(0, x.shape[:-1]) for out in made]


def _added(layer: Any, x: Tensor, part: Tensor) -> Tensor:
    """x W' + s part B', [T, N], of x [T, D] and part [T, r]."""
    out, b = layer.base_layer(x), layer.lora_B[ADAPTER].weight
    add = out.addmm_ if layer.in_place or not torch.is_grad_enabled() else out.addmm
    return add(part, b.t(), alpha=layer.scaling[ADAPTER])
