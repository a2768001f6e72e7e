"""Chains of Linear layers as one map, and the aesthetic head, which is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.rewards._affine import collapse
from tests.engine.rewards.clip_models import (
    build,
    head_state,
)


def test_head_is_one_affine_map() -> None:
    """float64 throughout: the two orders of summing 16 to 24 numbers differ by rounding only."""
    state = head_state()
    weight, bias = collapse(dict(reversed(state.items())))
    assert weight.dtype == bias.dtype == torch.float64
    features = torch.randn(50, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    hidden = features
    for n in (0, 2, 4, 6, 7):
        layer = state[f"layers.{n}.weight"].double(), state[f"layers.{n}.bias"].double()
        hidden = F.linear(hidden, *layer)
    assert torch.allclose(features @ weight + bias, hidden[:, 0], atol=1e-13, rtol=0)


def test_layers_are_ordered_by_number_not_by_text() -> None:
    generator = torch.Generator().manual_seed(4)
    state = {}
    for n in (2, 10):
        state[f"layers.{n}.weight"] = torch.randn(1, 1, generator=generator)
        state[f"layers.{n}.bias"] = torch.randn(1, generator=generator)
    _, bias = collapse(state)
    last = state["layers.10.weight"].double() @ state["layers.2.bias"].double()
    assert float(bias) == pytest.approx(float(last + state["layers.10.bias"].double()))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fc.weight": torch.zeros(1, 16)}, "names are layers.N.weight and layers.N.bias"),
        ({"layers.0.weight": torch.zeros(1, 16)}, "names are layers.N.weight and layers.N.bias"),
        (
            {
                "layers.0.weight": torch.zeros(3, 16),
                "layers.0.bias": torch.zeros(3),
                "layers.1.weight": torch.zeros(1, 4),
                "layers.1.bias": torch.zeros(1),
            },
            "a layer of 4 inputs follows 3",
        ),
        (
            {"layers.0.weight": torch.zeros(3, 16), "layers.0.bias": torch.zeros(3)},
            "it gives 3 numbers",
        ),
        (
            {"layers.0.weight": torch.zeros(1, 9), "layers.0.bias": torch.zeros(1)},
            "takes 9 features, the model of .* has 16",
        ),
    ],
)
def test_other_heads_are_refused(
    clip_folder: Path, tmp_path: Path, state: dict[str, Tensor], message: str
) -> None:
    torch.save(state, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=f"head: head.pth of .*{message}"):
        build("aesthetic", clip_folder, head=str(tmp_path))
