"""Blocks of Flux and SD3 whose work between matmuls is done by `gardo_kernels`.

What diffusers writes as LayerNorm, scale, shift, gate, sum and GELU is one kernel each here, as are
the residual behind an attention with the norm behind that, and an attention's norm and rotation
(joint_attention.py). Modules, names and parameters stay. The values are diffusers', rounded once an
op where diffusers rounds in between; fp16, which diffusers clips at the end of a block, is not for
this.

Source: diffusers' FluxTransformerBlock, FluxSingleTransformerBlock and JointTransformerBlock.

Shapes: B rows, L tokens, D width.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gardo.policies.joint_attention import JointAttention
from gardo_kernels import Backend
from gardo_kernels.adaln_modulate import adaln_modulate
from gardo_kernels.gated_residual import gated_residual
from gardo_kernels.gelu import gelu
from gardo_kernels.qk_norm_rope import qk_norm_rope
from gardo_kernels.residual_adaln import residual_adaln

Streams = tuple[Tensor | None, Tensor]  # text, image; no text behind the last block of SD3
Rotation = tuple[Tensor, Tensor] | None


def use_block_kernels(blocks: Iterable[nn.Module], backend: Backend) -> None:
    """Has the blocks and their attentions, which `use_attention` was told of, take the kernels."""
    for block in blocks:
        forward = _forwards()[type(block).__name__]
        block.forward = types.MethodType(forward, block)
        block.kernels = backend  # type: ignore[assignment]
        for module in block.modules():
            processor = getattr(module, "processor", None)
            if isinstance(processor, JointAttention):
                processor.norm_and_turn = functools.partial(qk_norm_rope, backend=backend)


def _forwards() -> dict[str, Callable[..., Streams]]:
    return {
        "FluxTransformerBlock": _flux_double,
        "FluxSingleTransformerBlock": _flux_single,
        "JointTransformerBlock": _sd3_joint,
    }


def _flux_double(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotation = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Streams:
    image, after = _modulated(self, self.norm1, hidden_states, temb)
    text, text_after = _modulated(self, self.norm1_context, encoder_hidden_states, temb)
    image, text = self.attn(
        hidden_states=image,
        encoder_hidden_states=text,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    image = _fed_forward(self, self.norm2, self.ff, hidden_states, image, *after)
    text = _fed_forward(
        self, self.norm2_context, self.ff_context, encoder_hidden_states, text, *text_after
    )
    return text, image


def _flux_single(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rotation = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Streams:
    tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, (gate,) = _modulated(self, self.norm, tokens, temb)
    attended = self.attn(
        hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    both = gelu(self.proj_mlp(normed), attended, backend=self.kernels)
    tokens = gated_residual(tokens, self.proj_out(both), gate, backend=self.kernels)
    text_tokens = encoder_hidden_states.shape[1]
    return tokens[:, :text_tokens], tokens[:, text_tokens:]


def _sd3_joint(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Streams:
    options = joint_attention_kwargs or {}
    image, after = _modulated(self, self.norm1, hidden_states, temb)
    text_after: list[Tensor] = []
    if self.context_pre_only:
        text = self.norm1_context(encoder_hidden_states, temb)
    else:
        text, text_after = _modulated(self, self.norm1_context, encoder_hidden_states, temb)
    image, text = self.attn(hidden_states=image, encoder_hidden_states=text, **options)
    if self.use_dual_attention:
        *after, shift, scale, gate = after
        eps = self.norm1.norm.eps
        second = adaln_modulate(hidden_states, scale, shift, eps=eps, backend=self.kernels)
        second = self.attn2(hidden_states=second, **options)
        hidden_states = gated_residual(hidden_states, image, after[0], backend=self.kernels)
        image, after[0] = second, gate
    image = _fed_forward(self, self.norm2, self.ff, hidden_states, image, *after)
    if self.context_pre_only:
        return None, image
    text = _fed_forward(
        self, self.norm2_context, self.ff_context, encoder_hidden_states, text, *text_after
    )
    return text, image


def _modulated(block: Any, norm: Any, x_BLD: Tensor, temb: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What an adaLN makes of x, and the rest of its modulation [B, D]: gates, shifts, scales."""
    modulation = norm.linear(norm.silu(temb))
    shift, scale, *rest = modulation.chunk(modulation.shape[-1] // x_BLD.shape[-1], 1)
    y_BLD = adaln_modulate(x_BLD, scale, shift, eps=norm.norm.eps, backend=block.kernels)
    return y_BLD, rest


def _fed_forward(
    block: Any, norm: Any, ff: Any, x_BLD: Tensor, attended_BLD: Tensor, gate: Tensor,
    shift: Tensor, scale: Tensor, gate_ff: Tensor,
) -> Tensor:  # fmt: skip
    """x with what its attention says, and then with what the feed-forward makes of that."""
    x_BLD, h_BLD = residual_adaln(
        x_BLD, attended_BLD, gate, scale, shift, eps=norm.eps, backend=block.kernels
    )
    h_BLD = ff.net[2](gelu(ff.net[0].proj(h_BLD), backend=block.kernels))
    return gated_residual(x_BLD, h_BLD, gate_ff, backend=block.kernels)
