"""What the forward pass of a block keeps for its backward pass, and what runs again.

| mode | kept of a block | run again |
|---|---|---|
| none | all that the backward pass reads | nothing |
| matmuls | its input, outputs of attention and of matmuls | norms, RoPE, GELU, LoRA's B |
| selective | its input, outputs of attention | all but attention |
| full | its input | all |

What runs again computes the same bits, so losses and gradients do not depend on the mode.

Ops are seen below autograd, by their names: torch's own attention, flash-attn 2's op, and flex. A
kernel that is launched without an op (flash_4's) is not seen: its attention runs again in
every mode but `none`, as does `_native_math`'s with `selective`, which is matmuls and a softmax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from torch.utils.checkpoint import CheckpointPolicy

Checkpointing = Literal["none", "selective", "matmuls", "full"]

ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "flash_attn::_flash_attn_forward",
)
MATMULS = ("aten::mm", "aten::addmm", "aten::bmm")
QUANTISED = ("bitsandbytes::gemm_4bit", "bitsandbytes::int8_scaled_mm")  # of a base in few bits
THIN = 8  # a product over fewer features than 1 / THIN of those it makes costs little to run again


def checkpoint_blocks(transformer: Any, mode: Checkpointing) -> None:
    """Has the blocks of a diffusers transformer keep what `mode` says; `none` changes nothing."""

    from torch.utils.checkpoint import checkpoint

    if mode == "none":
        return
    inside = kept_inside(mode)
    more: dict[str, Any] = {"context_fn": inside} if inside else {}

    def run(block: Any, *args: Any) -> Any:
        return checkpoint(
            block.__call__, *args, use_reentrant=False, preserve_rng_state=False, **more
        )

    transformer.enable_gradient_checkpointing(run)


@functools.cache
def kept_inside(mode: Checkpointing) -> Callable[[], Any] | None:
    """`context_fn` of torch's checkpoint for what a mode keeps inside a block; None: nothing is."""

    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    if mode in ("none", "full"):
        return None
    keeps = _policy(matmuls=mode == "matmuls")
    return functools.partial(create_selective_checkpoint_contexts, keeps)


def _policy(*, matmuls: bool) -> Callable[..., CheckpointPolicy]:
    from torch.utils.checkpoint import CheckpointPolicy

    whole = frozenset([*attention_ops(), *(_named(QUANTISED) if matmuls else ())])
    products = frozenset(_named(MATMULS) if matmuls else ())

    def keeps(_context: Any, op: Any, *args: Any, **_kwargs: Any) -> CheckpointPolicy:
        if op in whole or (op in products and not _thin(*args)):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return keeps


def attention_ops() -> list[Any]:
    """The ops that compute attention, those that this torch and the imported packages have."""
    return [torch.ops.higher_order.flex_attention, *_named(ATTENTION)]


def _named(names: Iterable[str]) -> Iterator[Any]:
    """Those of the ops that are there."""
    for name in names:
        namespace, _, op = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), op, None)
        if packet is not None:
            yield packet.default


def _thin(*operands: torch.Tensor) -> bool:
    """Whether a product [.., K] x [K, N] has K far below N: LoRA's B, whose output beside that of
    the layer that it is added to would be kept twice; the scores of attention by matmuls."""
    features, outputs = operands[-1].shape[-2:]
    return THIN * features <= outputs
