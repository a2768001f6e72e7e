"""What this machine can do for a run: versions, GPUs, which kernels run, attention.

Every fused op is run on a small input by the backend that a run here would take, and compared with
plain torch in fp64: a kernel that is compiled wrongly on this machine is named before it trains.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gardo.flow import flux_sigmas, transitions
from gardo_kernels import (
    Backend,
    awm_loss,
    kernels_run_on,
    nearest_cosine,
    nft_loss,
    policy_loss,
    random_normal,
    sde_step,
)

State = Literal["ok", "note", "problem"]
PACKAGES = ("torch", "triton", "deepspeed", "diffusers", "transformers", "peft")
OPTIONAL = {"bitsandbytes": "optimizer adamw_8bit", "flash_attn": "attention backend flash"}


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


def _kernels(device: torch.device, kernels: Backend) -> Iterator[Finding]:
    if kernels == "triton" and not kernels_run_on(device):
        yield Finding("kernels", "problem", "triton needs an NVIDIA GPU; use auto or torch")
        return
    on_gpu = device.type == "cuda" and kernels_run_on(device)
    takes = kernels == "triton" or (kernels == "auto" and on_gpu)
    for name, run in OPS.items():
        if not takes:
            yield Finding(f"kernel {name}", "ok", "plain torch")
            continue
        try:
            error = _error(run, device)
        except Exception as problem:  # whatever a compiler or a driver can say
            yield Finding(f"kernel {name}", "problem", f"does not run: {problem}")
            continue
        state: State = "ok" if error < TOLERANCE else "problem"
        yield Finding(f"kernel {name}", state, f"triton, off plain torch by {error:.1e}")


TOLERANCE = 1e-4  # fp32 arithmetic on numbers of order 1; a wrong kernel is off by that order


def _error(run: Callable[[Backend, torch.device], list[Tensor]], device: torch.device) -> float:
    """The largest difference of an op's results and gradient between its two backends."""
    pairs = zip(run("triton", device), run("torch", device), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


def _values(count: int, device: torch.device) -> list[Tensor]:
    """Random [4, 1500] inputs: more than one block, and not a whole number of them."""
    ids = torch.arange(4, device=device)
    return [random_normal(1, ids, n, (1500,), backend="torch") for n in range(count)]


def _with_gradient(out: Tensor, v: Tensor) -> list[Tensor]:
    out.backward()
    assert v.grad is not None
    return [out.detach(), v.grad * v.numel()]


def _random_normal(backend: Backend, device: torch.device) -> list[Tensor]:
    return [random_normal(1, torch.arange(4, device=device), 3, (1500,), backend=backend)]


def _sde_step(backend: Backend, device: torch.device) -> list[Tensor]:
    x, v = _values(2, device)
    table_TK = transitions(flux_sigmas(4, 1024), "flow", 0.7).table_TK.to(device)
    ids = torch.arange(4, device=device)
    return [sde_step(x, v, table_TK, ids, seed=1, sample_id=ids, backend=backend).x]


def _policy_loss(backend: Backend, device: torch.device) -> list[Tensor]:
    v, v_old, u, v_ref = _values(4, device)
    v = (v_old + 0.1 * v).requires_grad_()
    rows = torch.linspace(0.5, 1.5, 4, device=device)
    out = policy_loss(
        v, v_old, u, advantage=rows - 1, h=rows, B=-rows, v_ref=v_ref, beta=0.1, backend=backend
    )
    return _with_gradient(out.loss, v)


def _nft_loss(backend: Backend, device: torch.device) -> list[Tensor]:
    v, v_old, x_t, x0, v_ref = _values(5, device)
    v.requires_grad_()
    t = torch.linspace(0.2, 0.8, 4, device=device)
    out = nft_loss(
        v, v_old, x_t, x0, t, r=t, b=1.0, v_ref=v_ref, beta=0.1, policy_scale=1.0, backend=backend
    )
    return _with_gradient(out.loss, v)


def _awm_loss(backend: Backend, device: torch.device) -> list[Tensor]:
    v, v_old, target, v_ref = _values(4, device)
    v = (v_old + 0.1 * v).requires_grad_()
    t = torch.linspace(0.2, 0.8, 4, device=device)
    out = awm_loss(
        v, v_old, target, advantage=t - 0.5, t=t, transform="ghuber", v_ref=v_ref, beta=0.1,
        backend=backend,
    )  # fmt: skip
    return _with_gradient(out.loss, v)


def _nearest_cosine(backend: Backend, device: torch.device) -> list[Tensor]:
    (features,) = _values(1, device)
    groups = torch.tensor([0, 0, 0, 1], device=device)
    return list(nearest_cosine(features, groups, backend=backend))


OPS: Mapping[str, Callable[[Backend, torch.device], list[Tensor]]] = {
    "random_normal": _random_normal,
    "sde_step": _sde_step,
    "policy_loss": _policy_loss,
    "nft_loss": _nft_loss,
    "awm_loss": _awm_loss,
    "nearest_cosine": _nearest_cosine,
}
