"""The heads of a fitted reward: small nets on a frozen model's features, an ensemble as one module.

    z = (x - mean) / deviation                              of the training pictures' features x
    out_k = V_k z + c_k                                     hidden: 0
    out_k = V_k gelu(U_k z + b_k) + c_k                     otherwise
    r_k = out_k[0], log sigma_k = 4 tanh(out_k[1] / 4)      where there are two

`state_dict` is what is saved. Verified against each head computed alone.

Shapes: B rows of features, W their width, K heads, H hidden units, O outputs of a head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_SIGMA = 4.0  # it stays within plus or minus this


class Heads(nn.Module):
    """K heads; zero until they are filled."""

    mean: Tensor  # [W]
    deviation: Tensor  # [W]

    def __init__(self, heads: int, width: int, hidden: int, outputs: int = 1) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        if hidden:
            self.hidden_weight = nn.Parameter(torch.zeros(heads, hidden, width))
            self.hidden_bias = nn.Parameter(torch.zeros(heads, hidden))
        self.weight = nn.Parameter(torch.zeros(heads, outputs, hidden or width))
        self.bias = nn.Parameter(torch.zeros(heads, outputs))
        self.hidden = hidden

    @property
    def width(self) -> int:
        return len(self.mean)

    def standardised(self, features_BW: Tensor) -> Tensor:
        return (features_BW - self.mean) / self.deviation

    def outputs(self, standardised_BW: Tensor) -> Tensor:
        """[K, O, B]."""
        if not self.hidden:
            out_KOB = torch.einsum("kow,bw->kob", self.weight, standardised_BW)
        else:
            inner_KHB = torch.einsum("khw,bw->khb", self.hidden_weight, standardised_BW)
            inner_KHB = F.gelu(inner_KHB + self.hidden_bias[..., None])
            out_KOB = torch.einsum("koh,khb->kob", self.weight, inner_KHB)
        return out_KOB + self.bias[..., None]

    def forward(self, features_BW: Tensor) -> Tensor:
        """The rewards, [K, B]."""
        return self.outputs(self.standardised(features_BW))[:, 0]


def log_sigma(out: Tensor) -> Tensor:
    """Of an output: about itself near 0, never so far that its exponential is of no use."""
    return LOG_SIGMA * torch.tanh(out / LOG_SIGMA)


def filled(heads: Heads, state: Mapping[str, Tensor]) -> Heads:
    """The heads with these tensors in float32. ValueError where they are of other heads."""
    own = heads.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state:
            raise ValueError(f"lacks {name}")
        if name not in own:
            raise ValueError(f"also has {name}")
        if state[name].shape != own[name].shape:
            said, wanted = list(state[name].shape), list(own[name].shape)
            raise ValueError(f"{name} has the shape {said}, its description says {wanted}")
        if not state[name].isfinite().all():
            raise ValueError(f"{name} is not finite")
    heads.load_state_dict({name: value.float() for name, value in state.items()})
    return heads
