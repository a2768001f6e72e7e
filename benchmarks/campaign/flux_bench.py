"""What a call of the model of flux_model.py costs: time, FLOP/s and memory, on GPU or CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from core_ops.machine import Machine
from gardo.policies.flux import FluxPolicy
from gardo_kernels import policy_loss

from .flux_model import TRAINED, Shape, flops, free, rows_of
from .table import Row, number

PEAK = 989.0  # TFLOP/s
GIB = 2**30


@dataclass(frozen=True)
class Call:
    """A call of the model; the cases of a script say more."""

    work: str
    micro_batch: int
    text_tokens: int
    checkpointing: str = "none"
    lora: bool = True


class FluxBench:
    """A policy on the device, and how its calls are measured."""

    policy: FluxPolicy | None = None

    def __init__(self, shape: Shape, machine: Machine, ceiling: float | None) -> None:
        self.shape, self.machine, self.ceiling = shape, machine, ceiling

    def free(self) -> None:
        if self.policy is not None:
            free(self.policy)

    def reset_peak(self) -> None:
        if self.machine.is_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> Row:
        """GiB of tensors, at the most since the last reset and now, and of the whole device;
        nothing on a CPU."""
        if not self.machine.is_gpu:
            return {}
        torch.cuda.synchronize()
        there = {
            "peak_gib": torch.cuda.max_memory_allocated(),
            "held_gib": torch.cuda.memory_allocated(),
            "gpu_gib": torch.cuda.get_device_properties(self.machine.device).total_memory,
        }
        return {name: number(count / GIB) for name, count in there.items()}

    def made(self, start: float) -> Row:
        """Of weights that were begun at `start`, monotonic seconds, on a reset peak."""
        return self.memory() | {"first_call_s": number(time.monotonic() - start)}

    # ---- calls -----------------------------------------------------------------------------------

    def loss_of(self, case: Call) -> Callable[[], Tensor]:
        """The forward pass of a micro-batch of training, and `policy_loss`."""
        policy, size = self.policy, case.micro_batch
        rows = rows_of(policy, -(-size // TRAINED), case.text_tokens)
        first = torch.arange(size, device=policy.device)
        advantage = torch.ones(size, device=policy.device)

        def loss() -> Tensor:
            v = rows.velocity(policy, first)
            return policy_loss(
                v, v.detach(), rows.u_RX[:size], advantage=advantage, h=rows.h_R[:size],
                B=rows.B_R[:size], backend="triton" if self.machine.is_gpu else "torch",
            ).loss  # fmt: skip

        return loss

    def call_of(self, case: Call) -> Callable[[], Any]:
        """What is timed: a model call of the sampler, or a micro-batch of training."""
        policy, size = self.policy, case.micro_batch
        if case.work == "sample":
            rows = rows_of(policy, -(-size // TRAINED), case.text_tokens)
            first = torch.arange(size, device=policy.device)
            return torch.no_grad()(lambda: rows.velocity(policy, first))
        loss, trained = self.loss_of(case), list(policy.trainable().values())

        def train() -> None:
            loss().backward()
            for parameter in trained:
                parameter.grad = None

        return train

    # ---- what they cost --------------------------------------------------------------------------

    def timed(self, case: Call, reps: int = 5, most_s: float = 4) -> Row:
        call = self.call_of(case)
        first_ms = self.machine.microseconds(call, flush=False) / 1e3
        self.reset_peak()
        times: list[float] = []
        while len(times) < 3 or (len(times) < reps and sum(times) < 1e3 * most_s):
            times.append(self.machine.microseconds(call, flush=False) / 1e3)
        return {
            "ms": number(median(times)), "least_ms": number(min(times)), "reps": len(times),
            "first_call_s": number(first_ms / 1e3), **self.memory(),
            **self.rates(case, median(times)),
        }  # fmt: skip

    def rates(self, case: Call, ms: float) -> Row:
        tokens = self.policy.latent_shape[0]
        count = flops(self.policy.transformer, tokens, case.text_tokens, case.lora)
        each = (count.forward, count.forward)
        if case.work != "sample":
            each = count.training(case.checkpointing)
        model, executed = (case.micro_batch * f / 1e12 for f in each)
        rates = {
            "model_tflop": model, "executed_tflop": executed,
            "model_tflop_s": 1e3 * model / ms, "executed_tflop_s": 1e3 * executed / ms,
            "percent_of_peak": 1e5 * model / ms / PEAK,
        }  # fmt: skip
        if self.ceiling:
            rates["ceiling_tflop_s"] = self.ceiling
            rates["percent_of_ceiling"] = 1e5 * executed / ms / self.ceiling
        return {name: number(value) for name, value in rates.items()}
