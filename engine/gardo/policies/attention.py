"""Which kernel computes attention: the backends that a recipe can name, and how a model is told.

diffusers' dispatcher runs them, asked by joint_attention.py. FlashAttention-4, which it lacks, is
here, out of its own package. No model of ours passes an attention mask, and none is dropped
silently: the dispatcher's flash backends refuse one.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any

import torch

from gardo.policies.joint_attention import FluxAttention, JointAttention


@dataclass(frozen=True)
class Backend:
    """A row of the table. `name` is the recipe's."""

    name: str
    dispatched: str  # its name in diffusers' dispatcher
    package: str | None = None  # on PyPI; None: torch has it
    extra: str = ""  # of ours, which installs the package
    gpu: range | None = None  # major compute capabilities; None: a CPU runs it too, backward also
    half: bool = False  # takes no fp32
    backward: bool = True
    deterministic: bool = True  # gradients of the same bits every time, where it is asked to
    kernel: str = ""  # module:function, handed to the dispatcher, which would ask the hub for it


EVER = 100  # no GPU is too new
AMPERE, HOPPER = range(8, EVER), range(9, 12)  # FlashAttention-4 has no deterministic pass on 12.x
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("native", "native"),
        Backend("_native_cudnn", "_native_cudnn", gpu=AMPERE, half=True, deterministic=False),
        Backend("_native_flash", "_native_flash", gpu=AMPERE, half=True),
        Backend("_native_efficient", "_native_efficient", gpu=range(5, EVER)),
        Backend("_native_math", "_native_math"),
        # one kernel where the caller is compiled; run eagerly, it makes the whole score matrix
        Backend("flex", "flex", gpu=AMPERE, deterministic=False),
        Backend("flash", "flash", package="flash-attn", extra="flash", gpu=AMPERE, half=True,
                deterministic=False),
        Backend("flash_4", "flash_4_hub", package="flash-attn-4", extra="flash4", gpu=HOPPER,
                half=True, kernel="flash_attn.cute:flash_attn_func"),
        # diffusers' op around FlashAttention-3 is registered without a gradient
        Backend("_flash_3", "_flash_3", package="flash-attn-3", gpu=HOPPER, half=True,
                backward=False),
        Backend("sage", "sage", package="sageattention", gpu=AMPERE, half=True, backward=False),
    )
}  # fmt: skip


# ---- is it any good for this recipe, on this machine ---------------------------------------------


def check_name(name: str) -> str:
    """The name. ValueError where it is no backend, or one that cannot train."""
    backend = BACKENDS.get(name)
    if backend is None:
        raise ValueError(f"no such attention; use one of {_listed()}")
    if not backend.backward:
        raise ValueError(f"has no backward pass, so it cannot train; use one of {_listed()}")
    return name


def check_settings(name: str, *, precision: str, deterministic: bool) -> None:
    """ValueError where the backend cannot do what the rest of the recipe asks for."""
    backend = BACKENDS[name]
    if backend.half and precision == "float32":
        raise ValueError(
            f"model.attention: {name} takes no float32; use distributed.precision: bfloat16, or "
            f"one of {_listed(half=False)}"
        )
    if deterministic and not backend.deterministic:
        raise ValueError(
            f"model.attention: {name} has no deterministic backward pass, and run.deterministic is "
            f"true; use one of {_listed(deterministic=True)}"
        )


def _listed(**columns: bool) -> str:
    """The backends that train, those with these values in the table."""
    return ", ".join(
        name
        for name, backend in BACKENDS.items()
        if backend.backward and all(getattr(backend, n) == v for n, v in columns.items())
    )


def missing(name: str, device: torch.device) -> str:
    """What this machine lacks for a backend, and what to do about it; "" where it runs.

    It is run once, forward and backward, which for `flash_4` compiles its kernels.
    """
    backend = BACKENDS[name]
    if not backend.backward:
        return "has no backward pass, so it cannot train"
    if backend.package and not _installed(backend.package):
        return f"{backend.package} is not installed; pip install -e '.[{backend.extra}]'"
    if backend.gpu and device.type != "cuda":
        return f"needs an NVIDIA GPU, this run is on the {device.type}"
    if backend.gpu and (has := torch.cuda.get_device_capability(device))[0] not in backend.gpu:
        most = "" if backend.gpu.stop == EVER else f" to {backend.gpu[-1]}.x"
        return f"needs compute capability {backend.gpu[0]}.0{most}, this GPU has {has[0]}.{has[1]}"
    try:
        _run_once(backend, device)
    except Exception as error:  # whatever a compiler or a driver can say
        return f"does not run here: {type(error).__name__}: {' '.join(str(error).split())}"
    return ""


def _installed(package: str) -> bool:
    """By its name on PyPI: two of them share the module `flash_attn`."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _run_once(backend: Backend, device: torch.device) -> None:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    dtype = torch.bfloat16 if backend.half else torch.float32
    q, k, v = (torch.ones(1, 128, 2, 64, device=device, dtype=dtype) for _ in range(3))
    member = _dispatched(backend, deterministic=False)
    dispatch_attention_fn(q.requires_grad_(), k, v, backend=member).sum().backward()


# ---- telling a model -----------------------------------------------------------------------------


def use_attention(transformer: Any, name: str, *, deterministic: bool = False) -> None:
    """Has every attention of a diffusers transformer go through a backend.

    `deterministic` asks for it where a backend takes that as an argument; torch's own follow
    torch.use_deterministic_algorithms. ValueError where an attention does not ask the dispatcher.
    """
    from diffusers.models.attention_processor import JointAttnProcessor2_0
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    ours = {JointAttnProcessor2_0: JointAttention, FluxAttnProcessor: FluxAttention}
    backend = _dispatched(BACKENDS[name], deterministic=deterministic)
    for module in transformer.modules():
        processor = getattr(module, "processor", None)
        if type(processor) in ours:
            processor = ours[type(processor)]()
            module.set_processor(processor)
        if processor is None:
            continue
        if not hasattr(processor, "_attention_backend"):
            raise ValueError(f"{type(processor).__name__} does not let its attention be chosen")
        processor._attention_backend = backend


def _dispatched(backend: Backend, *, deterministic: bool) -> Any:
    """The dispatcher's own member for a backend, ready to be called.

    ImportError or RuntimeError where its package is not usable.
    """
    from diffusers.models import attention_dispatch as dispatcher

    member = dispatcher.AttentionBackendName(backend.dispatched)
    if not backend.kernel:
        dispatcher._check_attention_backend_requirements(member)
        return member
    module, _, function = backend.kernel.partition(":")
    kernel = getattr(importlib.import_module(module), function)
    slot = dispatcher._HUB_KERNELS_REGISTRY[member]
    slot.kernel_fn = functools.partial(kernel, deterministic=deterministic)
    return member
