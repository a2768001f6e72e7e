"""FLUX.1-dev at full size on one GPU: LoRA on a base in nf4, int8 and bf16, and all 12 B trained.

    python -m campaign.flux_bases --out FOLDER [--seconds 300] [--ceiling 790] [--small]

Random weights, 1024 image and 128 text tokens, LoRA 64/128, eager. The rows of flux_bases.csv:

    weights   making them, rounded tensor by tensor as they are drawn
    sample    a model call of the sampler
    train     forward, `policy_loss` and backward
    ratio     for each trained step and over all: |ratio - 1| on identical weights, rollouts of
              `rollout_batch` rows against training's of `micro_batch`; how far the velocities of
              the two are apart; and how far the rollout's are from those of the bf16 base
    step      of an optimizer on all weights, bf16 and without fp32 masters: its forward pass,
              backward pass and update, and then all of it, checkpointing full

Columns are those of flux_full.csv. A nf4 base is multiplied in bf16 and its rounding to that is no
FLOP; an int8 base is multiplied in int8. Pages (`_paged`) are not tensors of torch's: `peak_gib`
and `held_gib` leave them out. What does not fit is a row that says so, and what of the step did
not; what needs bitsandbytes says so where it is not installed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from core_ops.machine import Machine
from gardo.distributed.optimizers import OptimizerSettings, build_optimizer, check_here
from gardo.policies.quantised import BASES
from gardo.settings import FieldError, check_installed

from . import ratio_noise
from .flux_bench import Call, FluxBench
from .flux_model import FULL, SMALL, Shape, add_lora, build, rows_of, set_up, this_place
from .ratio_noise import Side, statistics, velocities
from .table import Row, Table, Unavailable, number, run_script, tally

COLUMNS = (
    "work", "base", "micro_batch", "checkpointing", "lora", "optimizer", "part", "rollout_batch",
    "text_tokens", "ms", "least_ms", "reps", "first_call_s", "peak_gib", "held_gib", "gpu_gib",
    "model_tflop", "executed_tflop", "model_tflop_s", "executed_tflop_s", "percent_of_peak",
    "percent_of_ceiling", "ceiling_tflop_s", "step", "max_ratio_error", "mean_ratio_error",
    "velocity_error", "velocity_from_bf16",
)  # fmt: skip
MODES = ("matmuls", "full")
ROUNDS = 3  # of a step, after one that makes the optimizer's state


@dataclass(frozen=True)
class Case(Call):
    base: str = "bf16"  # model.base
    optimizer: str = ""  # train.optimizer.name
    rollout_batch: int = 0


def cases(shape: Shape) -> list[Case]:
    """In the order of their worth, as far as a base need not be made again for it."""
    text = shape.text_tokens[0]
    one, many, *_ = shape.sampling
    few, *more = sorted(shape.training)[-3:]
    more = [*more, 2 * more[-1]]

    def train(base: str, sizes: Sequence[int]) -> list[Case]:
        return [Case("train", size, text, mode, base=base) for mode in MODES for size in sizes]

    def first(base: str) -> list[Case]:
        return [
            Case("weights", 0, text, base=base),
            Case("ratio", few, text, MODES[0], base=base, rollout_batch=many),
            *(Case("sample", size, text, base=base) for size in (one, many)),
            *train(base, [few]),
        ]

    def step(optimizer: str) -> Case:
        return Case("step", 1, text, "full", lora=False, optimizer=optimizer)

    return [
        *first("bf16"), *first("nf4"), *train("nf4", more), step("adamw_8bit"), step("adamw"),
        *first("int8"), *train("int8", more), *train("bf16", more),
        step("adamw_8bit_paged"),  # last: bitsandbytes never gives its pages back
    ]  # fmt: skip


class Bench(FluxBench):
    """One base at a time on the device, with a LoRA or to train whole."""

    def __init__(self, shape: Shape, machine: Machine, ceiling: float | None) -> None:
        super().__init__(shape, machine, ceiling)
        self.here: tuple[str, bool] | None = None  # the base, and whether it has a LoRA
        self.rollouts: dict[str, Tensor] = {}  # velocities, by base

    def load(self, base: str, lora: bool = True) -> None:
        """Makes the weights, unless they are here."""
        if self.here == (base, lora):
            return
        self.policy = self.here = None
        if self.machine.is_gpu:
            gc.collect()
            torch.cuda.empty_cache()
        if base in BASES:
            check_installed("bitsandbytes", f"model.base: {base}")
        start = time.monotonic()
        self.reset_peak()
        self.policy = build(self.shape, self.machine.device, base=base)
        if lora:
            add_lora(self.policy, self.shape)
        else:
            self.policy.train_full()
        self.weights = self.made(start)
        self.here = (base, lora)

    def measure(self, case: Case) -> list[Row]:
        try:
            if case.work == "ratio":
                return self.ratios(case)
            if case.work == "step":
                check_here(case.optimizer, self.machine.device)
            self.load(case.base, case.lora)
        except FieldError as error:
            raise Unavailable(str(error)) from error
        if case.work == "weights":
            return [self.weights]
        set_up(
            self.policy, path="eager", attention="native", checkpointing=case.checkpointing,
            compiler=self.shape.compiler,
        )  # fmt: skip
        return self.stepped(case) if case.work == "step" else [self.timed(case)]

    def expected_s(self, case: Case) -> float:
        """By estimate, not yet by measurement."""
        making = 20.0 * (self.here != (case.base, case.lora))
        each = {"sample": 0.2, "train": 0.7, "step": 15.0, "ratio": 3.0}.get(case.work, 0.0)
        return 2.0 + making + each * case.micro_batch

    # ---- the ratio -------------------------------------------------------------------------------

    def ratios(self, case: Case) -> list[Row]:
        """A row a trained step, then one over all of them."""
        passes = ratio_noise.Case(
            case.rollout_batch, case.micro_batch, case.text_tokens, case.checkpointing
        )
        rollout, train = passes.sides(case.rollout_batch)
        bf16_RX, old_RX = (self.rollout(base, rollout) for base in ("bf16", case.base))
        self.load(case.base)
        new_RX = velocities(self.policy, self.shape, train)
        rows = rows_of(self.policy, case.rollout_batch, case.text_tokens)
        found = zip(
            statistics(rows, old_RX, new_RX), statistics(rows, bf16_RX, old_RX), strict=True
        )
        return [
            {
                "step": own["step"],
                "max_ratio_error": own["max"],
                "mean_ratio_error": own["mean"],
                "velocity_error": own["velocity_error"],
                "velocity_from_bf16": other["velocity_error"],
            }
            for own, other in found
        ]

    def rollout(self, base: str, side: Side) -> Tensor:
        if base not in self.rollouts:
            self.load(base)
            self.rollouts[base] = velocities(self.policy, self.shape, side)
        return self.rollouts[base]

    # ---- a step on all weights -------------------------------------------------------------------

    def stepped(self, case: Case) -> list[Row]:
        """A row a part of the step, then one of all of it."""
        settings = OptimizerSettings(name=case.optimizer)
        optimizer = build_optimizer(list(self.policy.trainable().values()), settings)
        loss, made = self.loss_of(case), {}
        calls: dict[str, Callable[[], Any]] = {
            "forward": lambda: made.update(loss=loss()),
            "backward": lambda: made.pop("loss").backward(),
            "update": optimizer.step,
        }
        rounds = []
        for _ in range(1 + ROUNDS):
            rounds.append({part: self.part(part, call) for part, call in calls.items()})
            optimizer.zero_grad(set_to_none=True)
        rows = [over_rounds([each[part] for each in rounds]) | {"part": part} for part in calls]
        whole = over_rounds([of_all(list(each.values())) for each in rounds])
        return [*rows, whole | {"part": "all"} | self.rates(case, whole["ms"])]

    def part(self, name: str, call: Callable[[], Any]) -> Row:
        self.reset_peak()
        try:
            ms = self.machine.microseconds(call, flush=False) / 1e3
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(f"{name}: {error}") from None
        return {"ms": ms, **self.memory()}


def of_all(parts: Sequence[Row]) -> Row:
    """A round of a step: its parts one after the other."""
    peaks = {"peak_gib": max(part["peak_gib"] for part in parts)} if "peak_gib" in parts[0] else {}
    return {**parts[-1], "ms": sum(part["ms"] for part in parts), **peaks}


def over_rounds(rounds: Sequence[Row]) -> Row:
    """Times without the first round's; memory as the last round has it."""
    first, *others = (each["ms"] for each in rounds)
    return {
        **rounds[-1], "ms": number(median(others)), "least_ms": number(min(others)),
        "reps": len(others), "first_call_s": number(first / 1e3),
    }  # fmt: skip


def report(table: Table) -> str:
    """A line a row: what, how fast, how full; and how far off."""
    lines = [f"{'what':48} {'ms':>9} {'TFLOP/s':>8} {'GiB':>6} {'from bf16':>10}  status"]
    for row in table.rows:
        r = {name: row.get(name) for name in table.columns}
        if r["step"] not in ("all", "", None):
            continue
        what = f"{r['work']} {r['base']} mb {r['micro_batch']} {r['checkpointing']}"
        what += f" {r['optimizer']} {r['part'] or ''}".rstrip()
        names = ("ms", "executed_tflop_s", "peak_gib", "velocity_from_bf16")
        ms, rate, peak, far = (str("" if r[name] is None else r[name]) for name in names)
        error = f", |ratio - 1| <= {r['max_ratio_error']}" if r["step"] else ""
        note = f"{r['status']}{error} {r['note'] or ''}"[:90]
        lines.append(f"{what:48} {ms:>9} {rate:>8} {peak:>6} {far:>10}  {note}")
    return "\n".join([*lines, tally(table)])


def main(arguments: Sequence[str] | None = None) -> int:
    def start(options: argparse.Namespace) -> tuple[list[Case], Bench]:
        shape = SMALL if options.small else FULL
        return cases(shape), Bench(shape, this_place(), options.ceiling)

    ceiling = {"type": float, "help": "TFLOP/s of a large bf16 matmul here"}
    return run_script(
        "flux_bases", __doc__, arguments, columns=COLUMNS, seconds=300.0,
        small="a tiny model, on any machine", start=start, report=report,
        options={"--ceiling": ceiling},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
