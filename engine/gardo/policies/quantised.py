"""A frozen base in few bits, on which a LoRA trains (bitsandbytes).

    nf4     16 levels of a normal distribution in blocks of 64 weights, whose scales are 8-bit in
            blocks of 256 (QLoRA, arXiv 2305.14314): 4.13 bits a weight
    int8    a scale for each row of the weights, and for each row of the input, which is rounded to
            8 bits too (LLM.int8(), arXiv 2208.07339): 8 bits a weight

The linear layers of the transformer's blocks are kept so; embeddings, norms and the last projection
stay as they are. Every forward pass, of sampling, teachers or training, reads the same rounded
base. A weight is rounded as soon as it is read, so never more than one is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any, Protocol

import torch

from gardo.policies.weights import Place
from gardo.settings import FieldError

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK = 64  # weights that share a scale in nf4
NESTED = 256  # of these scales share one


class Base(Protocol):
    """A way to keep the weights of a linear layer [rows, columns]."""

    flag: str  # of a model that has such layers, for PEFT and diffusers

    def empty(self, linear: nn.Linear, dtype: torch.dtype) -> Any:
        """A layer like `linear` that has no weights yet and computes in `dtype`."""

    def holds(self, layer: nn.Module) -> bool:
        """Whether it is one of these layers."""

    def set(self, layer: Any, weight_RC: Tensor) -> None:
        """Rounds the weights, on their device, into the layer."""

    def stored_bytes(self, rows: int, columns: int) -> int: ...


class NF4:
    flag = "is_loaded_in_4bit"

    def empty(self, linear: nn.Linear, dtype: torch.dtype) -> Any:
        """ValueError where rows are not whole blocks, which CPUs would read wrongly."""
        from bitsandbytes.nn import Linear4bit

        if linear.in_features % BLOCK:
            raise ValueError(
                f"rows of {linear.in_features} weights are no whole blocks of {BLOCK}; use int8"
            )
        layer = Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None,
            compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        # Where the CPU has bf16 it would repack the weights at the first sampling, compute in bf16
        # whatever the dtype, and give training no gradient from then on.
        layer.support_avx512bf16_for_cpu = False
        return layer

    def holds(self, layer: nn.Module) -> bool:
        from bitsandbytes.nn import Linear4bit

        return isinstance(layer, Linear4bit)

    def set(self, layer: Any, weight_RC: Tensor) -> None:
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn import Params4bit

        packed, state = quantize_4bit(
            weight_RC, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        layer.weight = Params4bit(
            packed, requires_grad=False, quant_state=state, blocksize=BLOCK,
            compress_statistics=True, quant_type="nf4", module=layer, bnb_quantized=True,
        )  # fmt: skip
        layer.quant_state = state

    def stored_bytes(self, rows: int, columns: int) -> int:
        count = rows * columns
        scales = ceil(count / BLOCK)
        tables = 4 * (16 + NESTED + 1)  # fp32: both codes, and the mean of the scales
        return ceil(count / 2) + scales + 4 * ceil(scales / NESTED) + tables


class Int8:
    flag = "is_loaded_in_8bit"

    def empty(self, linear: nn.Linear, dtype: torch.dtype) -> Any:
        from bitsandbytes.nn import Linear8bitLt

        layer = Linear8bitLt(
            linear.in_features, linear.out_features, linear.bias is not None,
            has_fp16_weights=False, device="meta",
            # Above 0, columns are outliers if any row of the batch has one: rows would depend on
            # each other, and the velocities of training would not be those of sampling.
            threshold=0.0,
        )  # fmt: skip
        layer.register_forward_hook(_forget_input)
        return layer

    def holds(self, layer: nn.Module) -> bool:
        from bitsandbytes.nn import Linear8bitLt

        return isinstance(layer, Linear8bitLt)

    def set(self, layer: Any, weight_RC: Tensor) -> None:
        from bitsandbytes.functional import int8_vectorwise_quant
        from bitsandbytes.nn import Int8Params

        weight, scale_R, _ = int8_vectorwise_quant(weight_RC.to(torch.float16))
        layer.weight = Int8Params(
            weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=scale_R
        )

    def stored_bytes(self, rows: int, columns: int) -> int:
        return rows * columns + 4 * rows


BASES: dict[str, Base] = {"nf4": NF4(), "int8": Int8()}


def _forget_input(layer: nn.Module, inputs: Any, output: Tensor) -> None:
    """The backward pass does not read the input, which bitsandbytes keeps past checkpointing."""
    if output.grad_fn is not None:
        output.grad_fn.tensors = (None, None, None)  # type: ignore[attr-defined]


def linears(transformer: nn.Module, block_lists: Sequence[str]) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that a quantised base keeps in few bits, with their names.

    Whether they are so already or not, on any device, and wrapped by an adapter or not.
    """
    for name in block_lists:
        for place, module in transformer.get_submodule(name).named_modules(prefix=name):
            if isinstance(module, torch.nn.Linear) and ".lora_" not in place:
                yield place, module


def stored_bytes(base: str, linear: nn.Linear) -> int:
    """Bytes that the weights of a layer take in `base` (of `BASES`), its bias left out."""
    return BASES[base].stored_bytes(linear.out_features, linear.in_features)


def quantise(
    transformer: nn.Module, block_lists: Sequence[str], base: Base, dtype: torch.dtype
) -> None:
    """Puts layers without weights in place of the blocks' linear layers, before an adapter wraps
    them; `placing` fills them. FieldError where a layer does not fit."""
    for name, linear in list(linears(transformer, block_lists)):
        try:
            layer = base.empty(linear, dtype)
        except ValueError as error:
            raise FieldError(f"model.base: {name}: {error}") from None
        layer.bias = linear.bias
        transformer.set_submodule(name, layer.train(linear.training).requires_grad_(False))
    setattr(transformer, base.flag, True)


def placing(base: Base, place: Place) -> Place:
    """As `place`, but the weights of the layers of `base` are rounded first."""

    def rounded(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if name == "weight" and base.holds(module):
            base.set(module, parameter.detach())
        else:
            place(module, name, parameter)

    return rounded


def check_base(
    base: str | None, *, trains_all: bool, precision: str, partitions_weights: bool, offload: str
) -> None:
    """ValueError where the base does not go with the rest of a recipe."""
    if base == "bf16" and precision != "bfloat16":
        raise ValueError(
            f"model.base: bf16, but distributed.precision is {precision}; use bfloat16, or leave "
            "base out"
        )
    if base not in BASES:
        return
    if trains_all:
        raise ValueError(
            f"model.base: {base} is frozen, and train.weights.kind full trains it; use kind lora, "
            "or leave base out"
        )
    if offload == "parameters":
        raise ValueError(
            f"model.base: {base} stays on the device, distributed.offload: parameters would move "
            "it; use offload: optimizer with stage: 2"
        )
    if partitions_weights:
        raise ValueError(
            f"model.base: {base} is whole on every rank, distributed.stage: 3 would take it apart; "
            "use stage: 2 or less"
        )
