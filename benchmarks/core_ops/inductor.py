"""The code that Inductor writes for a GPU, on a machine that has none: read, never run.

A function is traced forward and backward on fake tensors of the CPU by AOTAutograd, as
`torch.compile` does it; the graphs are moved to a fake GPU and lowered by Inductor with the
properties of an H100 in the place of a driver's. Launches are the kernels that its code calls,
bytes those that Inductor counts for its own kernels: every buffer that one reads or writes, once.
(Of a kernel of ours it counts what is written twice, as read and written.)

What differs from a machine with a GPU: nothing is tuned (Inductor tunes block sizes, not fusions),
and where a decomposition asks for the device it has seen a CPU: LayerNorm's mean and deviation are
then kept in the dtype of its input, 4 bytes a token less than on a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._inductor import compile_fx, ir, scheduler
from torch._inductor.codecache import CacheBase
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

CUDA = torch.device("cuda", 0)
H100 = DeviceProperties(
    type="cuda", index=0, multi_processor_count=132, cc=90, major=9, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
)  # fmt: skip
KERNEL = re.compile(r"^\s+(?!raw_stream)(\w+)\.run\(", re.MULTILINE)
EXTERN = re.compile(r"^\s+(?:\w+ = )?(?:extern_kernels|torch\.ops)\.([\w.]+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """Of one pass."""

    kernels: tuple[str, ...]
    bytes: int
    glue: int  # of the bytes, those of neither matmuls nor attention
    text: str


class _Driver:
    """What Triton asks a driver for before anything is launched."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return CUDA


@contextmanager
def gpu_in_name() -> Iterator[None]:
    """Inductor and Triton believe in an H100; only what they ask while they write code."""
    cuda = torch.cuda
    answers: dict[tuple[Any, str], Any] = {
        (cuda, "is_available"): True, (cuda, "device_count"): 1, (cuda, "current_device"): 0,
        (cuda, "get_device_capability"): (9, 0), (cuda, "get_device_properties"): H100,
        (DeviceProperties, "create"): H100, (scheduler, "has_triton"): True,
        # where the choices of a tuned machine would be looked up
        (CacheBase, "get_system"): {"hash": "none", "device": {"name": "H100"}, "version": {}},
    }  # fmt: skip
    with ExitStack() as stack:
        for (owner, name), value in answers.items():
            stack.enter_context(mock.patch.object(owner, name, lambda *_, v=value, **__: v))
        yield


def gpu_code(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Code, Code]:
    """Of the forward and of the backward pass of a function with one tensor or a tuple of them.

    inputs: fake tensors of the CPU, those with a gradient being the ones that get one.
    """
    graphs: list[tuple[GraphModule, list[Tensor]]] = []

    def keep(graph: GraphModule, given: list[Tensor]) -> Any:
        graphs.append((graph, given))
        return make_boxed_func(graph)

    compiled = aot_function(
        function, keep, keep, partition_fn=compile_fx.partition_fn,
        decompositions=select_decomp_table(),
    )  # fmt: skip
    with mock.patch.object(driver, "_active", _Driver()):  # for what a Triton kernel writes to
        out = compiled(*inputs)
        results = (out,) if isinstance(out, Tensor) else out
        leaves = [x for x in inputs if x.requires_grad]
        torch.autograd.grad(results, leaves, [torch.empty_like(x) for x in results])
        with _disable_current_modes():  # a lowering has its own
            forward, backward = (_lowered(*graph) for graph in graphs)
    return forward, backward


def _lowered(graph: GraphModule, inputs: list[Tensor]) -> Code:
    mode = FakeTensorMode()
    with mode:
        on_cpu = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in inputs]
        on_gpu = [
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA) for x in inputs
        ]
    FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*on_cpu)
    with V.set_fake_mode(mode):
        compile_fx._recursive_post_grad_passes(graph, is_inference=False)
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": CUDA}
    with gpu_in_name():
        FakeTensorProp(graph, mode).propagate_dont_convert_inputs(*on_gpu)
        lowering = GraphLowering(graph, example_inputs=on_gpu, is_inference=False)
        with (
            V.set_graph_handler(lowering), V.set_fake_mode(mode),
            V.set_debug_handler(DebugContext()),
        ):  # fmt: skip
            lowering.run(*on_gpu)
            text = lowering.codegen()[0].value
            moved, nodes, _ = lowering.count_bytes()
            heavy = sum(4 * size for node, size in nodes if _is_library(node))  # told in words
    kernels = (*KERNEL.findall(text), *EXTERN.findall(text))
    return Code(kernels, int(moved), int(moved - heavy), text)


def _is_library(node: Any) -> bool:
    """A matmul or attention, of a library: not a kernel of Inductor's, nor one of ours."""
    return node.is_extern() and not isinstance(node.node, ir.UserDefinedTritonKernel)
