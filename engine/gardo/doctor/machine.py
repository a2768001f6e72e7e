"""What this machine can do for a run: versions, driver, GPUs, compiler, caches, attention, kernels.

Every fused op's examples are run by the backend that a run here would take, and compared with plain
torch: a kernel that is compiled wrongly on this machine is named before it trains.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

import gardo_kernels
from gardo.doctor.finding import Finding, State
from gardo.machine import PACKAGES
from gardo.nvidia import (
    ALLOCATOR,
    cuda_trouble,
    devices,
    driver_version,
    kernels_lacking,
    unwanted,
)
from gardo.policies.attention import BACKENDS, missing

if TYPE_CHECKING:
    from gardo_kernels import Backend
    from gardo_kernels._examples import Examples, On

SHARED_MEMORY = 2**30  # bytes of /dev/shm; Docker's 64 MiB are too few for NCCL
OPTIONAL = {"bitsandbytes": "model.base nf4 and int8, its optimizers:"}


def examine(kernels: Backend = "auto") -> Iterator[Finding]:
    """All findings for this process's device; `kernels` is the recipe's setting."""
    yield from _packages()
    trouble = cuda_trouble()
    cuda = not trouble and torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    device = torch.device("cuda" if cuda else "cpu")
    yield _driver(trouble)
    yield from _devices(device)
    yield from _surroundings(torch.cuda.device_count() if cuda else 0)
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


def _driver(trouble: str | None) -> Finding:
    version, built = driver_version(), torch.version.cuda
    torch_is = f"torch is built for CUDA {built}" if built else "torch is built without CUDA"
    if trouble:
        return Finding("driver", "problem", trouble)
    if version is None:
        return Finding("driver", "note", f"no NVIDIA driver; {torch_is}")
    if unwanted():
        return Finding("driver", "note", f"{version}; {torch_is}; the environment hides its GPUs")
    if not devices():
        mend = "none of its GPUs is here: in a container, docker run --gpus all"
        return Finding("driver", "note", f"{version}; {torch_is}; {mend}")
    return Finding("driver", "ok", f"{version}; {torch_is}")


def _devices(device: torch.device) -> Iterator[Finding]:
    if device.type == "cpu":
        detail = f"none used; CPU with {len(os.sched_getaffinity(0))} cores"
        yield Finding("gpu", "note", detail)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = properties.total_memory / 2**30
        capability = f"{properties.major}.{properties.minor}"
        lacking = kernels_lacking(index)
        detail = f"{properties.name}, {size:.0f} GiB, sm {capability}"
        yield Finding(f"gpu {index}", "problem" if lacking else "ok", lacking or detail)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    lacks = "not on this GPU, which only emulates it; use distributed.precision: float32"
    yield Finding("bfloat16", "ok" if bf16 else "problem", "yes" if bf16 else lacks)


def _surroundings(gpus: int, root: Path = Path("/")) -> Iterator[Finding]:
    """What else of the machine decides whether a run starts, on `gpus` GPUs (0: on a CPU)."""
    if (seen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        every = max(gpus, len(devices(root)))  # Windows has one device file for all
        detail = f"{seen!r} leaves {gpus} of the {every} GPUs here"
        yield Finding("CUDA_VISIBLE_DEVICES", "note", detail)
    allocator = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    yield Finding("PYTORCH_ALLOC_CONF", "ok", allocator or _allocator())
    # notes: without Triton `kernels: auto` is plain torch, and only a hub id needs the hub's cache
    from gardo_kernels._trial import cache_trouble, compiler_trouble

    compiler, cache, hub = compiler_trouble(), cache_trouble(), _hub_trouble()
    yield Finding("C compiler", "note" if compiler else "ok", compiler or "works, with Python.h")
    yield Finding("triton cache", "note" if cache else "ok", cache or "can be written")
    yield Finding("hub cache", "note" if hub else "ok", hub or "can be written")
    shared = root / "dev/shm"
    size = shutil.disk_usage(shared).total if shared.is_dir() else 0
    small = gpus > 1 and size < SHARED_MEMORY
    mend = "; too little for NCCL between GPUs; in a container: docker run --shm-size=16g"
    detail = f"{size / 2**20:.0f} MiB" + small * mend
    yield Finding("/dev/shm", "problem" if small else "ok", detail)
    yield _environment()
    yield Finding("memory", "ok", f"{psutil.virtual_memory().total / 2**30:.0f} GiB of the host")
    pdsh = shutil.which("pdsh")
    yield Finding("pdsh", "ok" if pdsh else "note", pdsh or "not on the PATH; --hostfile needs it")
    if (root / "job/hostfile").exists():
        detail = "a deepspeed without --hostfile follows it; gardo train does not"
        yield Finding("/job/hostfile", "note", detail)


def _allocator() -> str:
    return f"not set; a run takes {ALLOCATOR}" if ALLOCATOR else "not set"


def _environment() -> Finding:
    """Whose Python this is, and whether its user has a home for caches."""
    made_by = "conda" if (Path(sys.prefix) / "conda-meta").is_dir() else "Python"
    where, home = f"{made_by}, {sys.prefix}", Path.home()
    if os.access(home, os.W_OK | os.X_OK):
        return Finding("environment", "ok", where)
    mend = "set HOME, or TRITON_CACHE_DIR and HF_HOME"
    return Finding("environment", "note", f"{where}; the home {home} cannot be written; {mend}")


def _hub_trouble() -> str:
    """Why downloads cannot be kept, and what to do; "" where they can."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return ""
    return f"{folder} cannot be written; name a folder that can with HF_HOME"


def _attention(device: torch.device) -> Iterator[Finding]:
    for name in BACKENDS:
        lacks = missing(name, device)
        runs = "runs, forward and backward"
        yield Finding(f"attention {name}", "note" if lacks else "ok", lacks or runs)


def _kernels(device: torch.device, kernels: Backend) -> Iterator[Finding]:
    from gardo_kernels._examples import op_modules

    if kernels == "triton" and not gardo_kernels.kernels_run_on(device):
        yield Finding("kernels", "problem", "triton needs an NVIDIA GPU; use auto or torch")
        return
    on_gpu = device.type == "cuda" and gardo_kernels.kernels_run_on(device)
    takes = kernels == "triton" or (kernels == "auto" and on_gpu)
    if takes and (trouble := gardo_kernels.triton_trouble(device)):
        yield Finding("kernels", "problem" if kernels == "triton" else "note", trouble)
        takes = False
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
    from gardo_kernels._examples import On

    runs = (examples(On(backend, device)) for backend in ("triton", "torch"))
    errors = [
        (mine.double() - theirs.double()).abs().max()
        for (_, ours), (_, plain) in zip(*runs, strict=True)
        for mine, theirs in zip(ours, plain, strict=True)
    ]
    return float(torch.stack(errors).max())  # NaN, if there is one
