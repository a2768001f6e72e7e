"""The LoRA layout of kohya's sd-scripts, which ComfyUI and most other programs read.

Modules have the names of the models' first releases, where one matrix makes queries, keys and
values (in Flux's single blocks also the MLP's input). Adapters of such parts become one adapter of
the whole, exactly: with parts P of ranks r_p, B_p A_p the adapter of each,

    A = [A_1; A_2; ...]  [sum r_p, in],    B = block-diagonal(B_1, B_2, ...)  [sum out_p, sum r_p]

and alpha grows with the rank, so that alpha / rank stays. Rows of B for a part without adapter are
zero. Sources: kohya-ss/sd-scripts, networks/convert_flux_lora.py and networks/lora_sd3.py;
ComfyUI, comfy/lora.py and comfy/utils.py (mmdit_to_diffusers, flux_to_diffusers).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gardo.policies.lora_files import halves

if TYPE_CHECKING:
    from torch import Tensor

FILE = "kohya_lora.safetensors"
# the transformer's list of blocks -> its name here, and what its blocks' modules are made of
Layout = Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]

FLUX: Layout = {
    "transformer_blocks": ("double_blocks", {
        "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "img_attn_proj": ("attn.to_out.0",),
        "txt_attn_proj": ("attn.to_add_out",),
        "img_mlp_0": ("ff.net.0.proj",),
        "img_mlp_2": ("ff.net.2",),
        "txt_mlp_0": ("ff_context.net.0.proj",),
        "txt_mlp_2": ("ff_context.net.2",),
        "img_mod_lin": ("norm1.linear",),
        "txt_mod_lin": ("norm1_context.linear",),
    }),
    "single_transformer_blocks": ("single_blocks", {
        "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation_lin": ("norm.linear",),
    }),
}  # fmt: skip
# Without the modulations: the last block's has its scale and shift the other way round.
SD3: Layout = {
    "transformer_blocks": ("joint_blocks", {
        "x_block_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "context_block_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        "x_block_attn_proj": ("attn.to_out.0",),
        "context_block_attn_proj": ("attn.to_add_out",),
        "x_block_attn2_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
        "x_block_attn2_proj": ("attn2.to_out.0",),
        "x_block_mlp_fc1": ("ff.net.0.proj",),
        "x_block_mlp_fc2": ("ff.net.2",),
        "context_block_mlp_fc1": ("ff_context.net.0.proj",),
        "context_block_mlp_fc2": ("ff_context.net.2",),
    }),
}  # fmt: skip


def kohya_parts(module: str, layout: Layout) -> tuple[str, tuple[str, ...]]:
    """The name here of what a module belongs to, and the modules that this is made of, in order.

    ValueError where the layout has no name for it.
    """
    match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", module)
    if match and match[1] in layout:
        blocks, number = f"{match[1]}.{match[2]}", match[2]
        name, groups = layout[match[1]]
        for group, parts in groups.items():
            if match[3] in parts:
                whole = tuple(f"{blocks}.{part}" for part in parts)
                return f"lora_unet_{name}_{number}_{group}", whole
    raise ValueError(f"kohya's layout has no name for {module}; export it as diffusers or peft")


def to_kohya(
    weights: Mapping[str, Tensor], *, alpha: float, layout: Layout, rows: Callable[[str], int]
) -> dict[str, Tensor]:
    """A LoRA's tensors in this layout; `rows` gives the out features of a module."""
    adapters = halves(weights)
    groups = dict(kohya_parts(module, layout) for module in adapters)
    tensors = {}
    for name, parts in groups.items():
        trained = [adapters[part] for part in parts if part in adapters]
        ups = [adapters[p][1] if p in adapters else torch.zeros(rows(p), 0) for p in parts]
        tensors[f"{name}.lora_down.weight"] = torch.cat([a for a, _ in trained])
        tensors[f"{name}.lora_up.weight"] = torch.block_diag(*ups)
        tensors[f"{name}.alpha"] = torch.tensor(alpha * len(trained))
    return tensors


def save_kohya(
    weights: Mapping[str, Tensor],
    folder: Path,
    *,
    alpha: float,
    layout: Layout,
    rows: Callable[[str], int],
) -> Path:
    """Writes the file and returns it. ValueError where a module has no name in the layout."""

    from safetensors.torch import save_file

    file = folder / FILE
    save_file(to_kohya(weights, alpha=alpha, layout=layout, rows=rows), file, {"format": "pt"})
    return file
