"""Which cases are run, the ones that targets speak of first: what a budget cuts off is the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .cases import Case, Problem
from .forward import NearestCosine, SdeStep
from .losses import AwmLoss, NftLoss, PolicyLoss

BATCHES = (1, 3, 9, 16, 64)
SAMPLES = ((1024, 64), (4096, 64), (16, 64, 64), (16, 128, 128))  # Flux and SD3.5, 512 and 1024 px
PROBLEMS: dict[str, type[Problem]] = {
    "policy_loss": PolicyLoss,
    "sde_step": SdeStep,
    "nft_loss": NftLoss,
    "awm_loss": AwmLoss,
    "nearest_cosine": NearestCosine,
}
OPS = tuple(PROBLEMS)
STACKED = 36  # four trained steps of nine samples


def elementwise(op: str) -> list[Case]:
    shape = (3, 1024, 64)
    first = [Case(op, shape), Case(op, (64, 4096, 64)), Case(op, shape, torch.float32)]
    if op == "policy_loss":
        first.append(Case(op, shape, torch.float32, layout="tiny"))
    special = [
        Case(op, (STACKED, 1024, 64), layout="stacked"),
        Case(op, (3, 1023, 63), layout="odd"),
        Case(op, (16, 4096, 64), layout="slice"),
        Case(op, (64, 4096, 64), torch.float32),
    ]
    if op == "sde_step":
        special.append(Case(op, (16, 1024, 64), layout="recorded"))
    gates = [Case(op, (B, 1024, 64), gate=gate) for gate in (0.0, 1.0) for B in (3, 64)]
    everywhere = op in ("policy_loss", "sde_step")  # the others have half the sizes
    samples, batches = (SAMPLES, BATCHES) if everywhere else (SAMPLES[:2], BATCHES[1::2])
    sizes = [Case(op, (B, *sample)) for sample in samples for B in (*batches, BATCHES[-1])]
    return [*first, *special, *([] if op == "sde_step" else gates), *sizes]


def neighbours() -> list[Case]:
    op = "nearest_cosine"
    return [
        Case(op, (48, 24, 1024), torch.float32),
        Case(op, (1, 4096, 1024), torch.float32),
        Case(op, (48, 24, 1024), torch.float32, layout="unequal"),
    ]


def gpu_cases(ops: Sequence[str], quick: bool) -> list[Case]:
    """In turns over the ops, so that a budget cuts all of them alike."""
    lists = [neighbours() if op == "nearest_cosine" else elementwise(op) for op in ops]
    if quick:
        lists = [cases[:2] for cases in lists]
    turns = range(max(map(len, lists)))
    ordered = [cases[turn] for turn in turns for cases in lists if turn < len(cases)]
    return list(dict.fromkeys(ordered))  # the first ones are sizes too


def cpu_cases(ops: Sequence[str], quick: bool) -> list[Case]:
    """Small ones: they show that the paths run, not how fast."""
    shapes = [(2, 64, 16)] if quick else [(1, 1024, 64), (3, 1024, 64), (3, 16, 64, 64)]
    cases = [Case(op, shape) for op in ops for shape in shapes if op != "nearest_cosine"]
    if "nearest_cosine" in ops:
        cases.append(Case("nearest_cosine", (2 if quick else 8, 24, 64), torch.float32))
    return cases


def counted_cases(ops: Sequence[str], quick: bool) -> list[Case]:
    """Launches do not depend on the size, bytes an element hardly: Flux at 512 px, B = 3."""
    shape = (2, 64, 16) if quick else (3, 1024, 64)
    groups = (4, 24, 64) if quick else (48, 24, 1024)
    return [
        Case(op, groups, torch.float32) if op == "nearest_cosine" else Case(op, shape) for op in ops
    ]
