"""A chain of Linear layers with nothing between them: one affine map, multiplied out once.

Shapes: E inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LAYER = re.compile(r"layers\.(\d+)\.weight")


def collapse(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(w [E], b []), float64: the Linear layers `layers.N.{weight,bias}` applied in order of N.

    ValueError where the names are others or the shapes do not chain to one output.
    """
    numbers = sorted(int(found[1]) for found in map(LAYER.fullmatch, state) if found)
    names = {f"layers.{n}.{leaf}" for n in numbers for leaf in ("weight", "bias")}
    if not numbers or names != set(state):
        odd = min(names ^ set(state), default="no layer")
        raise ValueError(f"names are layers.N.weight and layers.N.bias; look at {odd}")
    first, *rest = (state[f"layers.{n}.weight"].double() for n in numbers)
    bias_first, *bias_rest = (state[f"layers.{n}.bias"].double() for n in numbers)
    weight, bias = first, bias_first
    for next_weight, next_bias in zip(rest, bias_rest, strict=True):
        if next_weight.shape[1] != len(weight):
            raise ValueError(f"a layer of {next_weight.shape[1]} inputs follows {len(weight)}")
        weight, bias = next_weight @ weight, next_weight @ bias + next_bias
    if len(weight) != 1:
        raise ValueError(f"it gives {len(weight)} numbers, not one score")
    return weight[0], bias[0]
