"""What this machine can do for a run: versions, GPUs, which kernels run, attention.

Every fused op's examples are run by the backend that a run here would take, and compared with plain
torch: a kernel that is compiled wrongly on this machine is named before it trains.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from gardo.policies.attention import BACKENDS, missing
from gardo_kernels import Backend, kernels_run_on
from gardo_kernels._examples import Examples, On, op_modules

State = Literal["ok", "note", "problem"]
PACKAGES = ("torch", "triton", "deepspeed", "diffusers", "transformers", "peft")
OPTIONAL = {"bitsandbytes": "model.base nf4 and int8, its optimizers:"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; a problem keeps recipes from running."""

    name: str
    state: State
    detail: str


def examine(kernels: Backend = "auto") -> Iterator[Finding]:
    """All findings for this process's device; `kernels` is the recipe's setting."""
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    yield from _packages()
    yield from _devices(device)
    yield from _attention(device)
    yield from _kernels(device, kernels)


def _packages() -> Iterator[Finding]:
    yield Finding("python", "ok", sys.version.split()[0])
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "problem", f"not installed; pip install {name}")
    for name, use in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            yield Finding(name, "note", f"not installed; {use} needs it")
        else:
            yield Finding(name, "ok", importlib.metadata.version(name))


def _devices(device: torch.device) -> Iterator[Finding]:
    if device.type == "cpu":
        detail = f"none used; CPU with {len(os.sched_getaffinity(0))} cores"
        yield Finding("gpu", "note", detail)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        yield Finding(f"gpu {index}", "ok", f"{properties.name}, {size:.0f} GiB, sm {capability}")
    bf16 = torch.cuda.is_bf16_supported()
    yield Finding("bfloat16", "ok" if bf16 else "problem", "yes" if bf16 else "not on this GPU")


def _attention(device: torch.device) -> Iterator[Finding]:
    for name in BACKENDS:
        lacks = missing(name, device)
        runs = "runs, forward and backward"
        yield Finding(f"attention {name}", "note" if lacks else "ok", lacks or runs)


def _kernels(device: torch.device, kernels: Backend) -> Iterator[Finding]:
    if kernels == "triton" and not kernels_run_on(device):
        yield Finding("kernels", "problem", "triton needs an NVIDIA GPU; use auto or torch")
        return
    on_gpu = device.type == "cuda" and kernels_run_on(device)
    takes = kernels == "triton" or (kernels == "auto" and on_gpu)
    for name, op in op_modules().items():
        if not takes:
            yield Finding(f"kernel {name}", "ok", "plain torch")
            continue
        try:
            error = _error(op.examples, device)
        except Exception as problem:  # whatever a compiler or a driver can say
            yield Finding(f"kernel {name}", "problem", f"does not run: {problem}")
            continue
        state: State = "ok" if error < TOLERANCE else "problem"
        yield Finding(f"kernel {name}", state, f"triton, off plain torch by {error:.1e}")


TOLERANCE = 1e-4  # fp32 arithmetic on numbers of order 1; a wrong kernel is off by that order


def _error(examples: Callable[[On], Examples], device: torch.device) -> float:
    """The largest difference of an op's results and gradients between its two backends."""
    runs = (examples(On(backend, device)) for backend in ("triton", "torch"))
    errors = [
        (mine.double() - theirs.double()).abs().max()
        for (_, ours), (_, plain) in zip(*runs, strict=True)
        for mine, theirs in zip(ours, plain, strict=True)
    ]
    return float(torch.stack(errors).max())  # NaN, if there is one
