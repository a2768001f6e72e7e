"""What the problems of the losses share: a call is forward and backward.

Shapes: R rows, N elements of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from gardo_kernels._launch_shape import LaunchShape
from gardo_kernels._row_loss import default_shape

from ..cases import HERE, Call, Case, Outputs, Problem, TorchCall

BETA = 0.04


def gated_rows(case: Case) -> int:
    return math.ceil(case.gate * case.shape[0])


class Trained(Problem):
    """A loss of velocities: forward, backward, and the outputs that are compared."""

    inputs = 3  # tensors of the case's size, v_ref not among them
    inputs_again = 3  # those that the gradient needs once more

    @classmethod
    def launch_shapes(cls, case: Case) -> list[LaunchShape]:
        """Blocks of 4 to 16 elements a thread, in chunks of one or a few of them; then stages."""
        first = default_shape(*case.rows_and_elements, HERE)
        chunks = (1024, 4096, 8192, 16384)
        sized = [
            shape._replace(chunk=chunk)
            for shape, chunk in product(super().launch_shapes(case), chunks)
            if chunk >= shape.block
        ]
        more = (first._replace(stages=stages) for stages in (2, 4))
        return list(dict.fromkeys([first, *sized, *more]))

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device)
        R = case.shape[0]
        self.advantage_R = 2 * self.randn(R)
        self.gated_R = torch.arange(R, device=device) < gated_rows(case)
        # the releases average the KL over the gated rows
        self.gate_R = self.gated_R * (R / max(gated_rows(case), 1))
        self.v_old = self.like_case()
        self.v = self.moved(0.05 * self.randn(*case.shape))
        self.v_ref = self.laid_out(self.v_old.float() + 0.1 * self.randn(*case.shape))
        self.given_ref = self.v_ref if gated_rows(case) else None

    def moved(self, delta: Tensor) -> Tensor:
        return self.laid_out(self.v_old.float() + delta).detach().requires_grad_()

    def laid_out(self, values: Tensor) -> Tensor:
        out = self.like_case()
        out.copy_(values)
        return out

    @property
    def least_bytes(self) -> int:
        gated = gated_rows(self.case) / self.case.shape[0]
        return round(self.case.elements * self.size * (self.inputs + 1 + gated))

    @property
    def two_pass_bytes(self) -> int:
        gated = gated_rows(self.case) / self.case.shape[0]
        return round(
            self.case.elements * self.size * (self.inputs + self.inputs_again + 1 + 2 * gated)
        )

    def loss(self, v: Tensor, *, backend: str, dtype: torch.dtype | None = None) -> Outputs:
        raise NotImplementedError

    def released_loss(self, v: Tensor) -> Outputs:
        raise NotImplementedError

    def torch_call(self, v: Tensor) -> Outputs:
        return self.loss(v, backend="torch")

    def trained(self, forward: Callable[[Tensor], Outputs], v: Tensor) -> Call:
        def call() -> Outputs:
            out = forward(v)
            (gradient,) = torch.autograd.grad(out["loss"], v)
            return {**out, "gradient": gradient}

        return call

    def ways(self, compiled: TorchCall | None = None, checked: bool = False) -> dict[str, Call]:
        forward: dict[str, TorchCall] = {
            "released": self.released_loss,
            "eager": self.torch_call,
            "triton": lambda v: self.loss(v, backend="triton"),
        }
        if compiled is not None:
            forward["compiled"] = compiled
        return {name: self.trained(call, self.v) for name, call in forward.items()}

    def exact(self) -> Outputs:
        v = self.v.detach().double().requires_grad_()
        call = self.trained(lambda v: self.loss(v, backend="torch", dtype=torch.float64), v)
        return {name: t.detach() for name, t in call().items()}

    def wide(self, dtype: torch.dtype | None, *some: Tensor | None) -> Iterator[Tensor | None]:
        return (t if t is None or dtype is None else t.to(dtype) for t in some)

    def tolerance(self, way: str, output: str) -> float:
        """fp32 sums for the loss; the gradient is written in the dtype of v: half a last place.

        A difference of log-probabilities of size one leaves 1e-6 of a log-ratio of 1e-4. The
        released matching loss mixes its velocities in their own dtype before it widens them.
        """
        if way == "released":
            if self.case.layout == "tiny" and output == "log_ratio":
                return math.inf
            return 0.05 if self.case.dtype == torch.bfloat16 or output == "log_ratio" else 1e-3
        if output == "gradient":
            # Triton's interpreter cuts where a GPU rounds
            return 2.0**-7 if self.case.dtype == torch.bfloat16 else 1e-5
        return 1e-4
