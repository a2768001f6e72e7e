"""FLUX.1-dev at full size on one GPU: time, FLOP/s and memory of sampling and of LoRA training.

    python -m campaign.flux_full --out FOLDER [--seconds 150] [--ceiling 790] [--small]

Random weights, 1024 image and 128 text tokens, LoRA 64/128. A row of flux_full.csv is a call: a
forward pass without gradients (`sample`), or forward, `policy_loss` and backward (`train`); or one
kind of op's share of a block's GPU time (`profile`). Rows are written as they are measured and are
not measured again.

`percent_of_peak` is what the model asks for over 989 TFLOP/s, bf16's dense peak on an H100 or H200;
`percent_of_ceiling` is what runs, recomputation included, over the matmul rate given as --ceiling.
Times are medians from an idle device: at micro-batch 1 the host's launches show. `first_call_s` has
the compilation in it, and of `weights` it is the time to make them; `peak_gib` and `held_gib` are
the most that tensors took and what they took afterwards, without an optimizer, on a GPU of
`gpu_gib`. `modelled_percent` is what the counted traffic of whole blocks lets one expect of
`percent_of_ceiling` (block_traffic.py), a model at that ceiling.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType

from block_traffic import MATMULS, flux_traffic, share
from core_ops.machine import Machine

from .flux_bench import Call, FluxBench
from .flux_model import (
    ATTENTION,
    FULL,
    PATHS,
    SMALL,
    TRAINED,
    Shape,
    add_lora,
    build,
    flops,
    graphs,
    rows_of,
    set_up,
    this_place,
)
from .table import Row, Table, number, run_script, tally

COLUMNS = (
    "work", "micro_batch", "checkpointing", "path", "attention", "lora", "text_tokens", "block",
    "kind", "share_percent", "ms", "least_ms", "reps", "first_call_s", "graphs", "peak_gib",
    "held_gib", "gpu_gib", "model_tflop", "executed_tflop", "model_tflop_s", "executed_tflop_s",
    "percent_of_peak", "percent_of_ceiling", "modelled_percent", "ceiling_tflop_s",
)  # fmt: skip
KINDS = ("matmul", "attention", "norm and elementwise", "LoRA's matmuls", "other")


@dataclass(frozen=True)
class Case(Call):
    """`work`: weights, sample, train or profile."""

    path: str = "eager"  # of PATHS
    attention: str = "native"
    block: str = ""  # whose profile: double or single


def cases(shape: Shape) -> list[Case]:
    """In the order of their worth."""
    short, long = shape.text_tokens
    (one, many, *more), (few, *others) = shape.sampling, shape.training

    def sample(size: int, tokens: int = short, **how: Any) -> Case:
        return Case("sample", size, tokens, **how)

    def train(size: int, checkpointing: str, **how: Any) -> Case:
        return Case("train", size, short, checkpointing, **how)

    return [
        *(Case("weights", 0, short, lora=lora) for lora in (False, True)),
        sample(one), sample(many),
        train(few, "full"), train(few, "none"), train(few, "selective"),
        train(few, "matmuls"),
        *(train(size, "full") for size in others),
        *(Case("profile", few, short, block=block) for block in ("double", "single")),
        *(work for path in PATHS[1:]
          for work in (sample(many, path=path), train(few, "matmuls", path=path))),
        train(few, "full", path="compiled"),
        *(work for name in ATTENTION[1:]
          for work in (sample(many, attention=name), train(few, "full", attention=name))),
        *(train(size, mode) for mode in ("matmuls", "selective", "none") for size in others),
        *(sample(size) for size in more),
        sample(many, lora=False), sample(many, long),
        train(few, "none", path="compiled"), train(others[0], "full", path="compiled"),
        sample(many, path="compiled", attention="_native_cudnn"),
        sample(one, path="compiled"),
    ]  # fmt: skip


class Bench(FluxBench):
    """The model on the device, and how a case is measured."""

    def __init__(self, shape: Shape, machine: Machine, ceiling: float | None) -> None:
        super().__init__(shape, machine, ceiling)
        start = time.monotonic()
        self.reset_peak()
        self.policy = build(shape, machine.device)
        self.weights = {False: self.made(start)}
        add_lora(self.policy, shape)
        self.weights[True] = self.made(start)

    def measure(self, case: Case) -> list[Row]:
        if case.work == "weights":
            return [self.weights[case.lora]]
        set_up(
            self.policy, path=case.path, attention=case.attention,
            checkpointing=case.checkpointing, compiler=self.shape.compiler,
        )  # fmt: skip
        if case.work == "profile":
            return self.profiled(case)
        if not case.lora:
            self.policy.transformer.disable_adapters()
        try:
            row = self.timed(case) | self.modelled(case)
        finally:
            self.policy.transformer.enable_adapters()
        return [row | {"graphs": graphs() if "compiled" in case.path else ""}]

    def modelled(self, case: Case) -> Row:
        policy, image_tokens = self.policy.transformer, self.policy.latent_shape[0]
        count = flops(policy, image_tokens, case.text_tokens, case.lora)
        moved = flux_traffic(case.path, policy, case.lora)
        computed, of_token = count.forward, moved.forward
        if case.work == "train":
            again = case.checkpointing != "none"
            computed, of_token = count.training(case.checkpointing)[1], moved.training(again)
        rate = 1e12 * self.ceiling if self.ceiling else MATMULS
        tokens = image_tokens + case.text_tokens
        return {"modelled_percent": number(100 * share(computed, tokens * of_token, rate))}

    def expected_s(self, case: Case) -> float:
        """By estimate, not yet by measurement."""
        if case.work == "weights":
            return 0.0
        compiling, each = {"sample": (40.0, 0.2), "train": (60.0, 0.7)}.get(case.work, (0.0, 1.0))
        return 2.0 + each * case.micro_batch + compiling * ("compiled" in case.path)

    # ---- where a block's time goes ---------------------------------------------------------------

    def profiled(self, case: Case, reps: int = 3) -> list[Row]:
        """A row a kind of op: its share of a block's forward and backward pass, and ms a call."""
        lists = self.policy.transformer
        blocks = {"double": lists.transformer_blocks, "single": lists.single_transformer_blocks}
        call = self.block_call(case, blocks[case.block][len(blocks[case.block]) // 2])
        for _ in range(2):
            call()
        activity = torch.profiler.ProfilerActivity
        seen = [activity.CPU, activity.CUDA] if self.machine.is_gpu else [activity.CPU]
        with torch.profiler.profile(activities=seen, record_shapes=True) as profile:
            for _ in range(reps):
                call()
            if self.machine.is_gpu:
                torch.cuda.synchronize()
        found = by_kind(
            profile.key_averages(group_by_input_shape=True), self.shape.rank, self.machine.is_gpu
        )
        total = sum(sum(ops.values()) for ops in found.values())
        return [
            {
                "kind": kind,
                "share_percent": number(100 * sum(ops.values()) / total),
                "ms": number(sum(ops.values()) / reps / 1e3),
                "reps": reps,
                "note": f"mostly {max(ops, key=ops.__getitem__)}" if ops else "",
            }
            for kind, ops in found.items()
        ]

    def block_call(self, case: Case, block: nn.Module) -> Callable[[], None]:
        """Forward and backward of one block on the numbers that reach it in the model."""
        policy, inputs = self.policy, {}
        rows = rows_of(policy, -(-case.micro_batch // TRAINED), case.text_tokens)
        hook = block.register_forward_pre_hook(
            lambda module, args, named: inputs.update(named), with_kwargs=True
        )
        with torch.no_grad():
            rows.velocity(policy, torch.arange(case.micro_batch, device=policy.device))
        hook.remove()
        names = ("hidden_states", "encoder_hidden_states")
        inputs |= {name: inputs[name].detach().clone().requires_grad_() for name in names}
        upstream = [torch.randn_like(inputs[name]) for name in reversed(names)]
        leaves = [inputs[name] for name in names] + list(block.parameters())

        def call() -> None:
            torch.autograd.backward(block(**inputs), upstream)
            for leaf in leaves:
                leaf.grad = None

        return call


def by_kind(averages: Any, rank: int, on_gpu: bool) -> dict[str, dict[str, float]]:
    """Microseconds of every op, under each of KINDS, over a profile grouped by input shapes.

    A kernel counts for the op that launched it, since only an op knows its shapes; kernels that no
    op is known to have launched are `other`. On a CPU it is the ops' own time.
    """
    found: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
    kernels = known = 0.0
    for event in averages:
        if event.device_type == DeviceType.CUDA:
            kernels += event.self_device_time_total
            continue
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if own > 0:
            ops = found[kind_of(event.key, event.input_shapes, rank)]
            ops[event.key] = ops.get(event.key, 0.0) + own
            known += own
    if kernels > known:
        found["other"]["kernels of no op"] = kernels - known
    return found


MOVES = ("copy", "cat", "clone", "fill_", "zero", "memcpy", "memset", "slice", "select", "split")


def kind_of(op: str, shapes: Any, rank: int) -> str:
    """One of KINDS; a matmul with LoRA's rank among its sizes is LoRA's."""
    name = op.removeprefix("aten::").lower()
    if name in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"):
        sizes = {size for shape in shapes or () if isinstance(shape, list) for size in shape}
        return "LoRA's matmuls" if rank in sizes else "matmul"
    if any(word in name for word in ("attention", "flash", "fmha", "sdpa")):
        return "attention"
    if any(word in name for word in MOVES) or not op.startswith("aten::"):
        return "other"
    return "norm and elementwise"


def report(table: Table) -> str:
    """A line a row: what, how fast, how full."""
    lines = [
        f"{'what':52} {'ms':>9} {'TFLOP/s':>8} {'% ceiling':>9} {'model':>6} {'GiB':>6}  status"
    ]
    for row in table.rows:
        r = {name: row.get(name) for name in table.columns}
        what = f"{r['work']} mb {r['micro_batch']} {r['path']} {r['checkpointing']}"
        what += f" {r['attention']} {r['text_tokens']}" + (" no LoRA" * (str(r["lora"]) == "False"))
        if r["work"] == "profile" and r["kind"]:
            what = f"{r['block']} block: {r['kind']} {r['share_percent']} %"
        names = "ms", "executed_tflop_s", "percent_of_ceiling", "modelled_percent", "peak_gib"
        ms, rate, percent, modelled, peak = (str(r[name] or "") for name in names)
        note = f"{r['status']} {r['note'] or ''}"[:70]
        lines.append(f"{what:52} {ms:>9} {rate:>8} {percent:>9} {modelled:>6} {peak:>6}  {note}")
    return "\n".join([*lines, f"{tally(table)}; micro-batches that fit: {fitting(table)}"])


def fitting(table: Table) -> str:
    """The largest eager micro-batch that trained, by checkpointing."""
    largest: dict[str, int] = {}
    for row in table.rows:
        if (row["work"], row["path"], row["status"]) == ("train", "eager", "done"):
            mode = row["checkpointing"]
            largest[mode] = max(largest.get(mode, 0), int(row["micro_batch"]))
    return ", ".join(f"{mode} {size}" for mode, size in largest.items())


def main(arguments: Sequence[str] | None = None) -> int:
    def start(options: argparse.Namespace) -> tuple[list[Case], Bench]:
        shape = SMALL if options.small else FULL
        return cases(shape), Bench(shape, this_place(), options.ceiling)

    ceiling = {"type": float, "help": "TFLOP/s of a large bf16 matmul here"}
    return run_script(
        "flux_full", __doc__, arguments, columns=COLUMNS, seconds=150.0,
        small="a tiny model, on any machine", start=start, report=report,
        options={"--ceiling": ceiling},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
