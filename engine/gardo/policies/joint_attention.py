"""The attention of Flux and SD3 over text and image together: values of diffusers' own processors.

Unlike SD3's own it asks diffusers' dispatcher, so that a recipe can choose what computes it
(attention.py). Query, key and value are made by one call, which lets their adapters share a matmul
(lora_linear.py). The output, a value for each of them, has the bits of diffusers'.

Shapes: B rows, L tokens, D width, H heads, E = D / H.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gardo.policies.lora_linear import project

if TYPE_CHECKING:
    from torch import Tensor

IMAGE, TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


class JointAttention:
    """SD3's: image tokens come first, then text.

    The last block's text, and the second attention of a block that has two, need nothing of the
    other.
    """

    _attention_backend: Any = None
    # norm and rotation in one, of gardo_kernels; None: the model's own norms
    norm_and_turn: Callable[..., Tensor] | None = None

    def __init__(self) -> None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        self._dispatch = dispatch_attention_fn

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, L, D] of the image, or that and [B, L, D] of the text."""
        q, k, v = self._heads(attn, hidden_states, IMAGE, (attn.norm_q, attn.norm_k))
        if encoder_hidden_states is not None:
            norms = attn.norm_added_q, attn.norm_added_k
            text = self._heads(attn, encoder_hidden_states, TEXT, norms)
            q, k, v = (torch.cat(parts, 1) for parts in zip((q, k, v), text, strict=True))
        out_BLD = self._attend(q, k, v, attention_mask)
        image, text_out = out_BLD.tensor_split([hidden_states.shape[1]], dim=1)
        image = attn.to_out[1](attn.to_out[0](image))
        if encoder_hidden_states is None:
            return image
        return image, text_out if attn.context_pre_only else attn.to_add_out(text_out)

    def _heads(
        self,
        attn: Any,
        x_BLD: Tensor,
        layers: Sequence[str],
        norms: tuple[Any, Any],
        turn: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Query, key and value [B, L, H, E]; the first two normed where the model norms them.

        `turn` are the cos and sin [L, E] of the kernel that norms and turns.
        """
        made = project([getattr(attn, layer) for layer in layers], x_BLD)
        parts = [part.unflatten(-1, (attn.heads, -1)) for part in made]
        for index, norm in enumerate(norms):
            if norm is None:
                continue
            if self.norm_and_turn is None:
                parts[index] = norm(parts[index])
            else:
                parts[index] = self.norm_and_turn(parts[index], norm.weight, *turn, eps=norm.eps)
        return parts

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, D] of query, key and value [B, L, H, E]."""
        out_BLHE = self._dispatch(q, k, v, attn_mask=mask, backend=self._attention_backend)
        return out_BLHE.flatten(2).to(q.dtype)


class FluxAttention(JointAttention):
    """Flux's: text tokens come first, then the image, and queries and keys are rotated.

    A single block's has all tokens in one, and no projection of its own behind it.
    """

    def __call__(  # type: ignore[override]
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, L, D] of the image, and [B, L, D] of the text; or of all tokens."""
        from diffusers.models.embeddings import apply_rotary_emb

        first = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        tables = image_rotary_emb or () if self.norm_and_turn else ()  # cut for the kernel alone
        norms, turn = (attn.norm_q, attn.norm_k), [table[first:] for table in tables]
        q, k, v = self._heads(attn, hidden_states, IMAGE, norms, turn)
        if encoder_hidden_states is not None:
            norms, turn = (attn.norm_added_q, attn.norm_added_k), [t[:first] for t in tables]
            text = self._heads(attn, encoder_hidden_states, TEXT, norms, turn)
            q, k, v = (torch.cat(parts, 1) for parts in zip(text, (q, k, v), strict=True))
        if image_rotary_emb is not None and self.norm_and_turn is None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        out_BLD = self._attend(q, k, v, attention_mask)
        if encoder_hidden_states is None:
            return out_BLD
        text_out, image = out_BLD.tensor_split([first], dim=1)
        image = attn.to_out[1](attn.to_out[0](image.contiguous()))
        return image, attn.to_add_out(text_out.contiguous())
