"""What the problems of a transformer block's ops share: diffusers' lines against one kernel.

A call is forward and backward, with the gradients that LoRA asks for; in the layout `trained` with
those of full fine-tuning. `eager` is what diffusers' blocks do, and what is compiled.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from gardo_kernels._launch_shape import LaunchShape

from ..cases import Call, Case, Outputs, Problem, TorchCall

TEXT = 512  # tokens, before those of the image
SIZES = ((1, 1024), (3, 1024), (1, 4096), (3, 4096), (9, 4096))  # samples, tokens of the image
EPS = 1e-6
Given = dict[str, Tensor]
Found = Tensor | tuple[Tensor, ...]


class Block(Problem):
    """A case is [samples, tokens, width]; `given` holds the op's inputs by name."""

    gates = ()
    width = 3072
    trained: tuple[str, ...]
    frozen: tuple[str, ...]  # of them, those that get a gradient under LoRA
    again: tuple[str, ...] = ("x",)  # what the backward pass reads too, or what is of its size
    results: tuple[str, ...] = ("result",)

    @classmethod
    def gpu_cases(cls, op: str) -> list[Case]:
        """Flux at 512 and 1024 px."""
        shapes = [(B, TEXT + L, cls.width) for B, L in SIZES]
        first = shapes[3]
        others = [Case(op, shape) for shape in shapes if shape != first]
        return [
            Case(op, first), Case(op, first, layout="trained"), *others,
            Case(op, shapes[1], torch.float32),
        ]  # fmt: skip

    @classmethod
    def cpu_cases(cls, op: str, quick: bool) -> list[Case]:
        return [cls.counted_case(op, quick)]

    @classmethod
    def counted_case(cls, op: str, quick: bool) -> Case:
        """A short sequence: bytes an element depend on its length by a row of D in L D."""
        return Case(op, (2, 4, 1536) if quick else (2, 128, cls.width))

    @classmethod
    def launch_shapes(cls, case: Case) -> list[LaunchShape]:
        first = cls.default_shape(case)
        sized = (
            first._replace(block=shape.block, warps=shape.warps)
            for shape in super().launch_shapes(case)
        )
        return list(dict.fromkeys([first, *sized]))

    @classmethod
    def default_shape(cls, case: Case) -> LaunchShape:
        raise NotImplementedError

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        self.given = self.draw()
        self.leaves = self.trained if case.layout == "trained" else self.frozen
        for name in self.leaves:
            self.given[name] = self.given[name].detach().requires_grad_()
        self.upstreams = [self.like_result() for _ in self.results]

    def draw(self) -> Given:
        raise NotImplementedError

    def op(self, given: Given, backend: str) -> Found:
        raise NotImplementedError

    def diffusers(self, given: Given) -> Found:
        raise NotImplementedError

    def like_result(self) -> Tensor:
        return self.randn(*self.case.shape).to(self.case.dtype)

    def modulation(self) -> Tensor:
        """[B, D], a part of the wider tensor that the time embedding's layer gives."""
        B, D = self.case.shape[0], self.case.shape[-1]
        return self.randn(B, 6 * D).to(self.case.dtype)[:, D : 2 * D]

    @property
    def least_bytes(self) -> int:
        """Every input, the results and their gradients once, and the gradients."""
        tensors = [*self.given.values(), *(self.given[name] for name in self.leaves)]
        return sum(t.numel() * t.element_size() for t in [*tensors, *2 * self.upstreams])

    @property
    def two_pass_bytes(self) -> int:
        return self.least_bytes + sum(self.given[name].numel() for name in self.again) * self.size

    def named(self, found: Found) -> Outputs:
        return dict(zip(self.results, outputs(found), strict=True))

    def with_gradients(self, given: Given, found: Outputs) -> Outputs:
        leaves, out = [given[name] for name in self.leaves], list(found.values())
        upstreams = [x.to(like.dtype) for x, like in zip(self.upstreams, out, strict=True)]
        grads = torch.autograd.grad(out, leaves, upstreams)
        return found | dict(zip(self.leaves, grads, strict=True))

    def torch_call(self, given: Given) -> Outputs:
        return self.named(self.diffusers(given))

    def ways(self, compiled: TorchCall | None = None, checked: bool = False) -> dict[str, Call]:
        forward: dict[str, TorchCall] = {
            "eager": self.torch_call,
            "triton": lambda given: self.named(self.op(given, "triton")),
        }
        if compiled is not None:
            forward["compiled"] = compiled

        def trained(call: TorchCall) -> Call:
            return lambda: self.with_gradients(self.given, call(self.given))

        return {name: trained(call) for name, call in forward.items()}

    def exact(self) -> Outputs:
        wide = {
            name: x.detach().double().requires_grad_(name in self.leaves)
            for name, x in self.given.items()
        }
        found = self.with_gradients(wide, self.named(self.op(wide, "torch")))
        return {name: t.detach() for name, t in found.items()}

    def tolerance(self, way: str, output: str) -> float:
        """A last place where it is stored (the interpreter cuts); eager rounds four times more."""
        if self.case.dtype == torch.float32:
            return 1e-5
        return 2.0**-7 if way == "triton" else 2.0**-6


def outputs(found: Found) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


def with_rows(first: LaunchShape) -> list[LaunchShape]:
    """Where a program's block is what holds a row: other warps, other chunks of tokens."""
    some = product((first.warps, 4, 8, 16), (first.rows, 8, 32))
    return list(dict.fromkeys(first._replace(warps=warps, rows=rows) for warps, rows in some))
