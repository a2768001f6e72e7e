"""Whole blocks of the published models: what they launch, move and compute, eager and compiled.

    ./run bench model [--out FILE] [--block KIND] [--weights lora|full]

On no GPU, and on none's clock: one block of each kind on fake tensors at its published width, bf16,
512 px, forward and backward as LoRA and as full fine-tuning ask for it. `eager` is counted as it
launches (core_ops/counting.py), `compiled` is read from the code that Inductor writes for an H100
(core_ops/inductor.py); both for the model as diffusers and PEFT make it, with the LoRA folded
(policies/lora_linear.py), and with our kernels between matmuls (policies/block_kernels.py). Bytes
are those of all that is neither a matmul nor attention.

The share of the matmul ceiling is A MODEL (block_traffic.py): FLOPs at the rate that `gardo plan`
assumes, beside bytes at a stated bandwidth, one after the other.

Writes results/model_counts.csv and the table of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # kernels as a compiler is shown them; none runs

import torch
from peft import inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from block_traffic import COUNTS, MATMULS, MEMORY, share
from core_ops import report
from core_ops.counting import Counter
from core_ops.host import without_launches
from core_ops.inductor import gpu_code
from core_ops.machine import this_machine
from gardo.policies.attention import use_attention
from gardo.policies.block_kernels import use_block_kernels
from gardo.policies.flux import FluxPolicy
from gardo.policies.lora_files import lora_config
from gardo.policies.lora_linear import fold_adapters
from gardo.policies.sd3 import SD3Policy
from gardo_kernels import _launch
from pages import ROOT, fill

ROWS, IMAGE, TEXT, RANK = 3, 1024, 512, 64
WAYS = {  # what is changed of the model: the LoRA folded, our kernels
    "as it is": (False, False),
    "folded": (True, False),
    "kernels": (False, True),
    "folded, kernels": (True, True),
}
FAKE = FakeTensorMode()
Row = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of block; `rotary` is the width of its rotary tables, 0 without."""

    name: str
    policy: Any
    width: int
    text: int = TEXT
    rotary: int = 0

    def block(self) -> nn.Module:
        from diffusers.models.attention import JointTransformerBlock
        from diffusers.models.transformers import transformer_flux as flux

        heads = self.width // (128 if self.rotary else 64)
        if self.name == "JointTransformerBlock":
            return JointTransformerBlock(
                self.width, heads, 64, qk_norm="rms_norm", use_dual_attention=True
            )
        return getattr(flux, self.name)(self.width, heads, 128)


KINDS = (
    Kind("FluxTransformerBlock", FluxPolicy, 3072, rotary=128),
    Kind("FluxSingleTransformerBlock", FluxPolicy, 3072, rotary=128),
    Kind("JointTransformerBlock", SD3Policy, 1536, text=TEXT + 77),
)


class Glue(Counter):
    """Counts beside matmuls and attention apart: launches, and bytes of all else."""

    def __init__(self) -> None:
        super().__init__()
        self.glue = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = self.bytes
        out = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        if not is_heavy(name):
            self.glue += self.bytes - before
        elif name == "addmm" and args[0].dim() == 2:  # the sum begins as a copy
            self.launches += 1
            self.glue += 2 * args[0].numel() * args[0].element_size()
        return out


def is_heavy(op: str) -> bool:
    return op in ("mm", "addmm", "addmm_", "bmm") or "scaled_dot_product" in op


@dataclass(frozen=True)
class Subject:
    kind: Kind
    weights: str  # lora or full
    way: str

    def made(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The block, and all tensors of a call by name; those that train ask for a gradient."""
        folded, kernels = WAYS[self.way]
        with torch.device("meta"):
            block = self.kind.block().requires_grad_(self.weights == "full")
            holder = nn.ModuleDict({"blocks": nn.ModuleList([block])})
            if self.weights == "lora":
                config = lora_config(rank=RANK, alpha=RANK, targets=self.kind.policy.lora_targets)
                inject_adapter_in_model(config, holder)
        if folded:
            fold_adapters([block], in_place=True)
        use_attention(holder, "native")
        if kernels:
            use_block_kernels([block], "triton")
        with FAKE:
            weights = {
                name: torch.empty(p.shape, dtype=torch.bfloat16, requires_grad=p.requires_grad)
                for name, p in block.named_parameters()
            }
            return block, weights | self._activations()

    def _activations(self) -> dict[str, Tensor]:
        """Their gradients go on to the block before; a LoRA leaves the time embedding alone."""

        def fake(*shape: int, trains: bool = True) -> Tensor:
            return torch.empty(*shape, dtype=torch.bfloat16, requires_grad=trains)

        width, full = self.kind.width, self.weights == "full"
        given = {
            "hidden_states": fake(ROWS, IMAGE, width),
            "encoder_hidden_states": fake(ROWS, self.kind.text, width),
            "temb": fake(ROWS, width, trains=full),
        }
        if self.kind.rotary:
            tokens = IMAGE + self.kind.text
            for name in ("cos", "sin"):
                given[name] = torch.empty(tokens, self.kind.rotary, dtype=torch.float32)
        return given


def call(block: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    names = dict(block.named_parameters()).keys()
    told = {name: value for name, value in given.items() if name not in names}
    if "cos" in told:
        told["image_rotary_emb"] = (told.pop("cos"), told.pop("sin"))
    return functional_call(block, {n: given[n] for n in names}, kwargs=told)


def eager(block: nn.Module, given: dict[str, Tensor]) -> Iterator[tuple[int, int]]:
    """Launches and bytes beside matmuls and attention, forward and backward."""
    leaves = [x for x in given.values() if x.requires_grad]
    with without_launches():
        with Glue() as forward:
            out = call(block, given)
        upstream = [torch.empty_like(x) for x in out]
        with Glue() as backward:
            torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    for count in (forward, backward):
        yield count.launches, count.glue


def compiled(block: nn.Module, given: dict[str, Tensor]) -> Iterator[tuple[int, int]]:
    """The same of Inductor's code."""

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return call(block, dict(zip(given, values, strict=True)))

    for code in gpu_code(function, list(given.values())):
        yield len(code.kernels), code.glue


def flops(block: nn.Module, given: dict[str, Tensor]) -> tuple[int, int]:
    """Of the forward and of the backward pass; attention as on a GPU."""
    leaves = [x for x in given.values() if x.requires_grad]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            out = call(block, given)
        with FlopCounterMode(display=False) as backward:
            upstream = [torch.empty_like(x) for x in out]
            torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    return forward.get_total_flops(), backward.get_total_flops()


def rows_of(kind: Kind, weights: str) -> Iterator[Row]:
    tokens = ROWS * (IMAGE + kind.text)
    plain = Subject(kind, weights, "as it is").made()
    with FAKE:
        computed = flops(*plain)
    for way, (folded, _) in WAYS.items():
        if folded and weights == "full":
            continue
        for mode, counts in (("eager", eager), ("compiled", compiled)):
            made = Subject(kind, weights, way).made()
            with FAKE:
                forward, backward = counts(*made)
            both = forward[1] + backward[1]
            yield {
                "block": kind.name, "weights": weights, "model": way, "mode": mode,
                "forward_launches": forward[0], "backward_launches": backward[0],
                "forward_kb_token": round(forward[1] / tokens / 1e3, 1),
                "backward_kb_token": round(backward[1] / tokens / 1e3, 1),
                "mflop_token": round(sum(computed) / tokens / 1e6, 1),
                "share_sampling": round(share(computed[0], forward[1]), 3),
                "share_training": round(share(sum(computed), both), 3),
            }  # fmt: skip


def table(rows: list[dict[str, str]]) -> str:
    names = [name for name in rows[0] if name not in ("torch", "triton", "revision", "date")]
    lines = [[row[name] for name in names] for row in rows]
    first = rows[0]
    return (
        f"{report.markdown([n.replace('_', ' ') for n in names], lines)}\n\nCounted, not timed "
        f"(torch {first['torch']}, triton {first['triton']}, revision {first['revision']}); the "
        f"last two columns are a model: {MATMULS / 1e12:.0f} TFLOP/s and {MEMORY / 1e12:.1f} TB/s, "
        "one after the other."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=COUNTS, help="the CSV file")
    parser.add_argument("--block", choices=[kind.name for kind in KINDS], help="of this kind alone")
    parser.add_argument("--weights", choices=["lora", "full"], help="these alone")
    options = parser.parse_args()
    if options.out == COUNTS and (options.block or options.weights):
        parser.error("--block and --weights count a part: say where it goes with --out")
    facts = this_machine("cpu").facts()
    names = ("torch", "triton", "revision", "date")
    rows: list[Row] = []
    with mock.patch.object(_launch, "kernels_run_on", lambda device: True):
        for kind in [kind for kind in KINDS if options.block in (None, kind.name)]:
            for weights in [options.weights] if options.weights else ["lora", "full"]:
                for row in rows_of(kind, weights):
                    rows.append(row | {name: facts[name] for name in names})
                    print(row, file=sys.stderr, flush=True)
    report.write(options.out, rows)
    if options.out == COUNTS:
        fill(ROOT / "benchmarks" / "README.md", "model counts", table(report.read(COUNTS)))
    print(table(report.read(options.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
