"""What `gardo plan` has a Qwen2-VL or Qwen2.5-VL do: on fake tensors, which have no values.

Shapes: B images, P patches of a picture, L tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gardo.rewards.judging.qwen_vl import Pixels

if TYPE_CHECKING:
    from torch import Tensor

TEXT = 640  # tokens of a question; HPSv3's are about 560 and a prompt's


def embedded(model: Any, images_B3HW: Tensor, most_pixels: int, text: int = TEXT) -> Tensor:
    """Turns about a picture each, [B, L, D], of a Qwen2VLModel or Qwen2_5_VLModel.

    Where a picture ends, the vision tower is told in an array that is no tensor. Attention windows,
    which take no memory of their own, are whole pictures.
    """
    B, vision = len(images_B3HW), model.config.vision_config
    patches_BPV, _ = Pixels.of(vision, most_pixels, most_pixels).patches(images_B3HW)
    P = patches_BPV.shape[1]
    where: dict[str, Any] = {"cu_seqlens": np.arange(B + 1) * P, "max_seqlen": P}
    if hasattr(vision, "window_size"):
        order = torch.arange(B * P // vision.spatial_merge_size**2)
        where |= {"window_index": order, "cu_window_seqlens": where["cu_seqlens"]}
    seen = model.visual(
        patches_BPV.flatten(0, 1), grid_thw=None,
        position_ids=torch.zeros(B * P, 2, dtype=torch.int64), **where,
    ).pooler_output  # fmt: skip
    width = model.config.text_config.hidden_size
    words_BLD = torch.zeros(B, text, width, dtype=seen.dtype)
    return torch.cat([seen.unflatten(0, (B, -1)), words_BLD], 1)


def answered(
    model: Any, images_B3HW: Tensor, *, pictures: int, most_pixels: int, tokens: int
) -> Tensor:
    """B questions about so many `pictures` each, to a Qwen2(_5)VLForConditionalGeneration whose
    answers may have so many `tokens`: logits [B, 1, K], beside the keys and values that it keeps.
    """
    shown = images_B3HW.repeat_interleave(pictures, 0)
    embeddings_BLD = embedded(model.model, shown, most_pixels)
    embeddings_BLD = embeddings_BLD.unflatten(0, (-1, pictures)).flatten(1, 2)
    text, (B, L) = model.config.text_config, embeddings_BLD.shape[:2]
    heads = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    kept = embeddings_BLD.new_zeros(2, text.num_hidden_layers, B, L + tokens, heads)
    hidden_BLD = model.model.language_model(
        inputs_embeds=embeddings_BLD, position_ids=torch.arange(L).expand(3, B, L), use_cache=False
    ).last_hidden_state
    logits_B1K: Tensor = model.lm_head(hidden_BLD[:, -1:]) + 0 * kept.sum()
    return logits_B1K
