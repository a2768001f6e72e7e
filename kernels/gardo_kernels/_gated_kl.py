"""What the losses with a gated KL share: the reference, the reductions, the sums of their kernels.

A loss sums over each row in two stages, so that its bits do not depend on who comes first: every
program writes the sums of CHUNK elements of a row, then one program adds a row's chunks in order.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK, BLOCK = 4096, 1024  # elements of a program of the sums, and at a time
ROWS_AT_A_TIME = 64

Reduction = Literal["batch", "gated"]


def gated_kl_ref(
    v_RN: Tensor, v_ref_RN: Tensor, gate_R: Tensor, kl_scale_R: Tensor, reduction: Reduction
) -> tuple[Tensor, Tensor]:
    """The gated KL, reduced, and the KL of each row.

    What v_ref holds in rows of gate 0 does not matter, NaN included.
    """
    has_reference_R = gate_R != 0
    difference_RN = torch.where(has_reference_R[:, None], v_RN - v_ref_RN, 0.0)
    kl_R = kl_scale_R * difference_RN.square().mean(1)
    return (gate_R * kl_R).sum() / kl_rows(gate_R, reduction), kl_R


def kl_rows(gate_R: Tensor, reduction: Reduction) -> Tensor:
    """What the sum of gated KLs is divided by: all rows, or the gated ones (at least 1)."""
    if reduction == "batch":
        return torch.full_like(gate_R[0], gate_R.shape[0])
    return (gate_R != 0).sum().clamp(min=1).to(gate_R.dtype)


def check_kl_options(
    op: str, beta: float, reduction: Reduction, gate: Tensor | None, v_ref: Tensor | None
) -> None:
    """What the losses with a gated KL refuse in its settings."""
    if not beta >= 0:
        raise ValueError(f"{op}: beta is {beta}; it must not be negative")
    if reduction not in ("batch", "gated"):
        raise ValueError(f"{op}: reduction {reduction!r} is unknown; choose batch or gated")
    if beta > 0 and v_ref is None and gate is None:
        raise ValueError(
            f"{op}: beta is {beta} but v_ref is None; pass v_ref, or beta=0, or the gate"
        )


def gate_and_scale(
    gate: Tensor | None, kl_scale: Tensor | None, v_RN: Tensor
) -> tuple[Tensor, Tensor]:
    ones_R = torch.ones(v_RN.shape[0], dtype=v_RN.dtype, device=v_RN.device)
    gate_R = ones_R if gate is None else gate.detach().to(v_RN.dtype)
    return gate_R, ones_R if kl_scale is None else kl_scale.detach().to(v_RN.dtype)


@triton.jit
def sum_chunks(sums_ptr, row, inside, chunks, COLUMN: tl.constexpr, COLUMNS: tl.constexpr):
    """One column of sums[row, chunk, column], added over the chunks in their order."""
    total = tl.zeros(row.shape, tl.float32)
    for chunk in range(chunks):
        at = (row.to(tl.int64) * chunks + chunk) * COLUMNS + COLUMN
        total += tl.load(sums_ptr + at, mask=inside, other=0.0)
    return total


@triton.jit
def count_kl_rows(gate_ptr, rows, GATED: tl.constexpr, ROWS: tl.constexpr):
    """`kl_rows`: all rows, or the gated ones, at least 1."""
    gated = 0.0
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        gated += tl.sum((tl.load(gate_ptr + row, mask=row < rows, other=0.0) != 0).to(tl.float32))
    return tl.maximum(gated, 1.0) if GATED else rows * 1.0
