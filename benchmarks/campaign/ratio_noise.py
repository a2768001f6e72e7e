"""How far from 1 the policy ratio is on identical weights, in bf16 at FLUX.1-dev's size.

    python -m campaign.ratio_noise --out FOLDER [--seconds 120] [--small]

The velocities of the same latents at each trained step of Flux's sampler (T = 6, a = 0.9), once as
a rollout computes them and once as training does, and the ratio that `policy_loss` makes of the
two. What differs between the two passes is the case: batch shape, checkpointing, compilation,
attention backend. Without any difference the error should be 0; what is left is rounding, and it
has to stay well inside the clip range.

ratio_noise.csv has a row a step and one over all steps for each case: the largest, the mean and the
standard deviation of |ratio - 1| over rows, the largest as a share of two clip ranges, and how far
the velocities themselves are apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from core_ops.machine import Machine
from gardo.policies.flux import FluxPolicy
from gardo_kernels import policy_loss

from .flux_model import (
    ATTENTION,
    FULL,
    SMALL,
    TRAINED,
    Rows,
    Shape,
    add_lora,
    build,
    free,
    rows_of,
    set_lora_b,
    set_up,
    this_place,
)
from .table import Row, Table, number, run_script, tally

COLUMNS = (
    "rollout_batch", "train_batch", "checkpointing", "rollout_path", "train_path",
    "rollout_attention", "train_attention", "lora_b", "text_tokens", "step", "rows", "strength",
    "max", "mean", "std", "max_of_clip_1e-4", "max_of_clip_1e-5", "mean_log_ratio",
    "velocity_error",
)  # fmt: skip


@dataclass(frozen=True)
class Side:
    """One pass over the rows."""

    samples: int
    batch: int
    grad: bool
    checkpointing: str
    path: str
    attention: str
    lora_b: str
    text_tokens: int


@dataclass(frozen=True)
class Case:
    """A rollout's pass and training's; `checkpointing` is training's."""

    rollout_batch: int
    train_batch: int
    text_tokens: int
    checkpointing: str = "full"
    rollout_path: str = "eager"
    train_path: str = "eager"
    rollout_attention: str = "native"
    train_attention: str = "native"
    lora_b: str = "random"

    def sides(self, samples: int) -> tuple[Side, Side]:
        shared = {"lora_b": self.lora_b, "text_tokens": self.text_tokens}
        samples = max(samples, self.rollout_batch)
        return (
            Side(samples, self.rollout_batch, False, "none", self.rollout_path,
                 self.rollout_attention, **shared),
            Side(samples, self.train_batch, True, self.checkpointing, self.train_path,
                 self.train_attention, **shared),
        )  # fmt: skip


def cases(shape: Shape) -> list[Case]:
    """In the order of their worth."""
    small = shape is SMALL
    one, few, many, most = (1, 2, 3, 4) if small else (1, 3, 12, 24)
    short, long = shape.text_tokens
    unequal, equal = partial(Case, many, few), partial(Case, few, few)
    return [
        equal(short, "none"), unequal(short), unequal(short, lora_b="zero"),
        equal(short), equal(short, "selective"), unequal(short, "selective"),
        equal(short, "matmuls"), unequal(short, "matmuls"),
        equal(short, "none", lora_b="zero"), unequal(short, "none"),
        Case(many, many, short), Case(most, one, short),
        unequal(long), equal(long),
        *(unequal(short, rollout_path=path, train_path=path)
          for path in ("folded", "kernels", "compiled+folded")),
        *(case for name in ATTENTION[1:] for case in (
            unequal(short, rollout_attention=name, train_attention=name),
            equal(short, rollout_attention=name, train_attention=name),
            equal(short, train_attention=name))),
        equal(short, train_path="compiled"), unequal(short, train_path="compiled"),
        unequal(short, rollout_path="compiled", train_path="compiled"),
        equal(short, rollout_path="compiled", train_path="compiled"),
    ]  # fmt: skip


class Bench:
    """The model on the device; a pass that two cases share is made once."""

    def __init__(self, shape: Shape, machine: Machine, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.machine = shape, machine
        self.policy = build(shape, machine.device, dtype)
        add_lora(self.policy, shape)
        self.samples = 12 if shape is FULL else 4
        self.made: dict[Side, Tensor] = {}

    def free(self) -> None:
        free(self.policy)

    def expected_s(self, case: Case) -> float:
        """By estimate, not yet by measurement."""
        missing = [side for side in case.sides(self.samples) if side not in self.made]
        return sum(4.0 + 45.0 * (side.path == "compiled") for side in missing)

    def measure(self, case: Case) -> list[Row]:
        rollout, train = case.sides(self.samples)
        old_RX, new_RX = self.velocities(rollout), self.velocities(train)
        rows = rows_of(self.policy, rollout.samples, case.text_tokens)
        return statistics(rows, old_RX, new_RX)

    def velocities(self, side: Side) -> Tensor:
        if side not in self.made:
            self.made[side] = velocities(self.policy, self.shape, side)
        return self.made[side]


def velocities(policy: FluxPolicy, shape: Shape, side: Side) -> Tensor:
    """[R, X] in the model's dtype: as rollouts compute them, step by step, or as training."""
    set_up(
        policy, path=side.path, attention=side.attention, checkpointing=side.checkpointing,
        compiler=shape.compiler,
    )  # fmt: skip
    set_lora_b(policy, side.lora_b)
    rows = rows_of(policy, side.samples, side.text_tokens)
    order_R = torch.arange(len(rows.step_R), device=policy.device)
    if not side.grad:  # all samples at a step, then the next
        order_R = order_R.view(side.samples, TRAINED).T.flatten()
    with torch.set_grad_enabled(side.grad):
        parts = [rows.velocity(policy, part).detach() for part in order_R.split(side.batch)]
    made_RX = torch.empty_like(torch.cat(parts))
    made_RX[order_R] = torch.cat(parts)
    return made_RX


def statistics(rows: Rows, old_RX: Tensor, new_RX: Tensor) -> list[Row]:
    """A row a trained step, then one over all of them."""
    out = policy_loss(
        new_RX, old_RX, rows.u_RX, advantage=torch.ones_like(rows.h_R), h=rows.h_R, B=rows.B_R
    )
    log_ratio_R = out.log_ratio_R.double()
    error_R = log_ratio_R.expm1().abs()  # a ratio in fp32 would resolve 6e-8
    old, change = (t.double().flatten(1).square().sum(1) for t in (old_RX, new_RX - old_RX))
    found = []
    for step in [*range(TRAINED), "all"]:
        at = torch.ones_like(rows.step_R, dtype=torch.bool) if step == "all" else (
            rows.step_R == step
        )  # fmt: skip
        error, largest = error_R[at], float(error_R[at].max())
        strength = 2 * rows.h_R[at] * rows.B_R[at].square()
        found.append({
            "step": step, "rows": int(at.sum()), "strength": number(float(strength.mean())),
            "max": number(largest), "mean": number(float(error.mean())),
            "std": number(float(error.std(correction=0))),
            "max_of_clip_1e-4": number(largest / 1e-4), "max_of_clip_1e-5": number(largest / 1e-5),
            "mean_log_ratio": number(float(log_ratio_R[at].mean())),
            "velocity_error": number(float((change[at].sum() / old[at].sum()).sqrt())),
        })  # fmt: skip
    return found


def report(table: Table) -> str:
    """A line a case, over all steps: what differs, and how far the ratio is from 1."""
    lines = [f"{'rollout -> training':88} {'max':>10} {'mean':>10} {'of 1e-4':>8}  status"]
    plain = asdict(Case(0, 0, 0))
    for row in table.rows:
        if row.get("step") not in ("all", "", None):
            continue
        what = f"{row['rollout_batch']} -> {row['train_batch']}, {row['text_tokens']} tokens"
        what += "".join(f", {n} {row[n]}" for n in list(plain)[3:] if str(row[n]) != plain[n])
        names = ("max", "mean", "max_of_clip_1e-4")
        largest, mean, share = (str(row.get(name, "")) for name in names)
        note = f"{row['status']} {row.get('note') or ''}"[:70]
        lines.append(f"{what:88} {largest:>10} {mean:>10} {share:>8}  {note}")
    return "\n".join([*lines, tally(table)])


def main(arguments: Sequence[str] | None = None) -> int:
    def start(options: argparse.Namespace) -> tuple[list[Case], Bench]:
        shape = SMALL if options.small else FULL
        return cases(shape), Bench(shape, this_place())

    return run_script(
        "ratio_noise", __doc__, arguments, columns=COLUMNS, seconds=120.0,
        small="a tiny model, on any machine", start=start, report=report,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
