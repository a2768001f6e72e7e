"""HPSv2's weights come in open_clip's names; its score is open_clip's forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from gardo.rewards import _pixels, hpsv2
from tests.engine.rewards.clip_models import (
    END,
    HEADS,
    LENGTH,
    PROMPTS,
    SIZE,
    WIDTH,
    build,
    pictures,
    to_open_clip,
)


def open_clip_cosine(state: dict[str, Tensor], pixels: Tensor, ids_BL: Tensor) -> Tensor:
    """open_clip's forward by hand, from its own names, with torch's MultiheadAttention."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    def blocks(x: Tensor, prefix: str, mask: Tensor | None) -> Tensor:
        for n in range(2):
            block = f"{prefix}transformer.resblocks.{n}"
            attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=x.dtype)
            own = f"{block}.attn."
            attention.load_state_dict(
                {k.removeprefix(own): v for k, v in state.items() if k.startswith(own)}
            )
            y = norm(x, f"{block}.ln_1")
            x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
            y = norm(x, f"{block}.ln_2")
            y = F.linear(y, state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"])
            y = F.gelu(y)
            y = F.linear(y, state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])
            x = x + y
        return x

    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=7).flatten(2).mT
    start = state["visual.class_embedding"].expand(len(pixels), 1, WIDTH)
    x = torch.cat([start, patches], 1) + state["visual.positional_embedding"]
    x = blocks(norm(x, "visual.ln_pre"), "visual.", None)
    image = norm(x[:, 0], "visual.ln_post") @ state["visual.proj"]

    x = state["token_embedding.weight"][ids_BL] + state["positional_embedding"]
    causal = torch.full((LENGTH, LENGTH), -torch.inf, dtype=x.dtype).triu(1)
    x = norm(blocks(x, "", causal), "ln_final")
    end_B = (ids_BL == END).int().argmax(-1)  # the end is the highest number in the real vocabulary
    text = x[torch.arange(len(x)), end_B] @ state["text_projection"]
    return F.cosine_similarity(image, text, dim=-1)


@pytest.mark.parametrize("settings", [{}, {"file": "hps.safetensors"}, {"version": "v2"}])
def test_hpsv2_is_open_clips_forward(clip_folder: Path, settings: dict[str, Any]) -> None:
    """Zero padding behind the end token as open_clip has it. v2 is stored in float16 here."""
    reward = build("hpsv2", clip_folder, **settings)
    stored = load_file(clip_folder / "hps.safetensors")
    half = settings.get("version") == "v2"
    state = {name: (t.half() if half else t).double() for name, t in stored.items()}
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    ids_BL = torch.zeros(3, LENGTH, dtype=torch.int64)
    for row, ids in zip(ids_BL, tokenizer(PROMPTS).input_ids, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    images = pictures(3)
    pixels = _pixels.for_clip(images.double(), SIZE, "pad")
    wanted = open_clip_cosine(state, pixels, ids_BL)
    assert torch.allclose(reward.score(images, PROMPTS).double(), wanted, atol=2e-6)


def test_renaming_gives_back_every_weight(clip_folder: Path) -> None:
    original = CLIPModel.from_pretrained(clip_folder).state_dict()
    renamed = hpsv2.from_open_clip(to_open_clip(CLIPModel.from_pretrained(clip_folder)))
    assert renamed.keys() == original.keys()
    loaded = build("hpsv2", clip_folder).clip.model.state_dict()
    for name, tensor in original.items():
        assert torch.equal(renamed[name], tensor), name
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    "extra", ["visual.attn_pool.q", "visual.transformer.resblocks.0.ls_1.gamma"]
)
def test_unknown_names_are_refused(clip_folder: Path, tmp_path: Path, extra: str) -> None:
    state = load_file(clip_folder / "hps.safetensors") | {extra: torch.zeros(2)}
    save_file(state, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=rf"path: more.safetensors of .*: {extra} is no name"):
        build("hpsv2", clip_folder, path=str(tmp_path), file="more.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.proj": None}, "lacks visual_projection.weight;"),
        (
            {"visual.transformer.resblocks.1.attn.in_proj_bias": None},
            r"lacks vision_model.encoder.layers.1.self_attn.k_proj.bias and 2 more;",
        ),
        ({"text_projection": torch.zeros(WIDTH, 8)}, "has another shape of text_projection.weight"),
        (
            {"transformer.resblocks.7.ln_1.bias": torch.zeros(WIDTH)},
            "also has text_model.encoder.layers.7.layer_norm1.bias",
        ),
    ],
)
def test_weights_must_be_exactly_the_models(
    clip_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    state: dict[str, Any] = load_file(clip_folder / "hps.safetensors") | change
    save_file({k: v for k, v in state.items() if v is not None}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=message):
        build("hpsv2", clip_folder, path=str(tmp_path), file="odd.safetensors")
