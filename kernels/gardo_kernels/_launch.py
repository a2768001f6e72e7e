"""What every op does before its arithmetic: choose a backend, refuse inputs that do not fit."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from gardo_kernels._launch_shape import LaunchShape

Backend = Literal["auto", "triton", "torch"]

# Under Triton's interpreter (tests without a GPU) kernels run as Python; inline PTX cannot.
INTERPRETED: bool = triton.knobs.runtime.interpret
# Of every launch; written out because Triton's default is to change.
OPTIONS = {"enable_fp_fusion": True}
TICKETS = 2**16  # a MiB of a GPU's memory


def launch(kernel: Any, grid: tuple[int, ...], shape: LaunchShape, **arguments: Any) -> None:
    """Runs the kernel over the grid with the shape's warps, on the GPU that its tensors are on."""
    device = next(value for value in arguments.values() if isinstance(value, Tensor)).device
    with _current(device):
        kernel[grid](**arguments, num_warps=shape.warps, num_stages=shape.stages, **OPTIONS)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Inside, the GPU is the current one; on a CPU, and where it is so already, nothing is done."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def ticket(device: torch.device) -> Tensor:
    """An int32 that is 0, for one launch of a kernel that counts in it and leaves it at 0.

    Launches that could run at the same time never share one: it belongs to the stream, which runs
    its launches one after the other, or to this one launch of a CUDA graph. So no launch needs a
    memset before it; only a graph that is captured before anything was called, or after TICKETS
    launches were captured, has one. On a CPU it is a new one every time: where the interpreter
    stops with an error in a kernel, nothing is left behind.
    """
    if device.type != "cuda":
        return torch.frombuffer(bytearray(4), dtype=torch.int32)
    with _current(device):
        if not torch.cuda.is_current_stream_capturing():
            return _ticket_of_stream(device.index, torch.cuda.current_stream().cuda_stream)
        unused = next(_unused_tickets().get(device.index, iter(())), None)
        # what is allocated here belongs to the graph: it is not kept
        return torch.zeros(1, dtype=torch.int32, device=device) if unused is None else unused


@cache
def _ticket_of_stream(index: int, stream: int) -> Tensor:
    unused = _unused_tickets()
    found = next(unused.get(index, iter(())), None)
    if found is None:
        # 16 bytes each: kernels are compiled for pointers that are as aligned as a tensor's
        zeros = torch.zeros(TICKETS, 4, dtype=torch.int32, device=index)
        torch.cuda.current_stream().synchronize()  # the next may be taken by another stream
        unused[index] = map(zeros.__getitem__, range(TICKETS))
        found = next(unused[index])
    return found


@cache
def _unused_tickets() -> dict[int, Iterator[Tensor]]:
    """By the GPU's index; what was handed out does not come back."""
    return {}


def looked_on() -> bool:
    """Whether a compiler, fake tensors or another dispatch mode looks on.

    It is shown a custom op. Where nobody looks an op's own launches are called, because a custom op
    costs more Python than they do.
    """
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def cdiv(count: int, size: int) -> int:
    """How many of `size` hold `count`; on the host, where triton.cdiv takes microseconds."""
    return -(-count // size)


def grid_of_rows(rows: int, elements: int, block: int) -> tuple[int]:
    """A program for every block of every row, all on one axis: a GPU's others end at 65,535."""
    return (rows * cdiv(elements, block),)


@triton.jit
def block_and_row(elements, BLOCK: tl.constexpr):
    """Where in `grid_of_rows` this program is: its block of the row, and the row as int64."""
    blocks = (elements - 1) // BLOCK + 1  # tl.cdiv would overflow just below 2^31
    program = tl.program_id(0)
    row = program // blocks
    return program - row * blocks, row.to(tl.int64)


def kernels_run_on(device: torch.device) -> bool:
    """Whether the Triton kernels run on tensors there: an NVIDIA GPU, or the interpreter."""
    if device.type == "cuda":
        return torch.version.hip is None  # ROCm says "cuda" too, and has no PTX
    return INTERPRETED


def choose_backend(op: str, backend: Backend, *tensors: Tensor) -> str:
    """ "triton" or "torch" for a call with these tensors.

    `auto` takes the kernels for tensors on an NVIDIA GPU, the plain-torch reference for fp64 and
    for everything elsewhere. RuntimeError for `triton` where it cannot run, ValueError for fp64 and
    for a name that is none of the three.
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"{op}: backend {backend!r} is unknown; choose auto, triton or torch")
    if backend == "torch":
        return "torch"
    device = tensors[0].device
    is_fp64 = compute_dtype(*tensors) == torch.float64
    runs = kernels_run_on(device)
    if backend == "auto" and (is_fp64 or not runs or device.type != "cuda"):
        return "torch"
    if is_fp64:
        raise ValueError(f"{op}: the kernels work in fp32; use backend='torch' for fp64")
    if not runs:
        place = f"{device} (ROCm)" if device.type == "cuda" else device
        raise RuntimeError(
            f"{op}: the triton backend needs tensors on an NVIDIA GPU, these are on {place}; "
            "use 'auto' or 'torch'"
        )
    return "triton"


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, whatever the inputs, except that fp64 stays fp64 (gradient checks)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_samples(op: str, name: str, x: Tensor) -> None:
    """x must be a non-empty floating [R, ...] with at least one element dimension."""
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}; pass [rows, elements...], neither empty"
        )
    check_floating(op, name, x)


def check_floating(op: str, name: str, x: Tensor) -> None:
    """x must have a floating dtype."""
    if not x.is_floating_point():
        raise ValueError(f"{op}: {name} has dtype {x.dtype}; pass a floating one")


def check_like(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """x must have the shape and the device of `like`, and a floating dtype."""
    if x.shape != like.shape:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)} but {like_name} has {tuple(like.shape)}; "
            "pass them with equal shapes"
        )
    check_device(op, name, x, like_name, like)
    check_floating(op, name, x)


def check_rows(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """x must be [R] for the R rows of `like`, on its device."""
    if x.shape != like.shape[:1]:
        raise ValueError(
            f"{op}: {name} has shape {tuple(x.shape)}; pass one value for each row of {like_name}, "
            f"shape ({like.shape[0]},)"
        )
    check_device(op, name, x, like_name, like)


def check_device(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """x must lie on the device of `like`."""
    if x.device != like.device:
        raise ValueError(
            f"{op}: {name} is on {x.device} but {like_name} is on {like.device}; "
            "move them to one device"
        )
