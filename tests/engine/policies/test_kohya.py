"""kohya's layout: the names of the published models, and velocities through fused modules."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxPipeline
from safetensors.torch import load_file

from gardo.plugins import resolve
from gardo.policies.base import Policy
from gardo.policies.kohya import FLUX, kohya_parts, save_kohya, to_kohya
from gardo.policies.lora_files import halves
from gardo.settings import PUBLISHED
from tests.engine.policies.tiny import TRANSFORMERS, randomise, velocity

RANK, ALPHA = 4, 12
DOUBLE = ("img_attn_qkv", "img_attn_proj", "img_mlp_0", "img_mlp_2",
          "txt_attn_qkv", "txt_attn_proj", "txt_mlp_0", "txt_mlp_2")  # fmt: skip
JOINT = ("x_block_attn_qkv", "x_block_attn_proj", "context_block_attn_qkv")
# the modules of the family's own targets in the published models, as sd-scripts and ComfyUI name
# them: the last block of SD3.5 has no output for the text
EXPECTED = {
    ("flux", "black-forest-labs--FLUX.1-dev"): [
        *(f"double_blocks_{i}_{part}" for i in range(19) for part in DOUBLE),
        *(f"single_blocks_{i}_linear1" for i in range(38)),
    ],
    ("sd3", "stabilityai--stable-diffusion-3.5-medium"): [
        *(f"joint_blocks_{i}_{part}" for i in range(24) for part in JOINT),
        *(f"joint_blocks_{i}_context_block_attn_proj" for i in range(23)),
    ],
    ("sd3", "stabilityai--stable-diffusion-3.5-large"): [
        *(f"joint_blocks_{i}_{part}" for i in range(38) for part in JOINT),
        *(f"joint_blocks_{i}_context_block_attn_proj" for i in range(37)),
    ],
}


@pytest.mark.parametrize(("family", "model"), EXPECTED)
def test_the_published_models_modules_have_their_names(family: str, model: str) -> None:
    plugin, transformer = resolve("gardo.policies", family), TRANSFORMERS[family]
    config = transformer.load_config(PUBLISHED / model / "transformer")
    config |= {"pos_embed_max_size": 8} if family == "sd3" else {}  # seconds of sines otherwise
    with init_empty_weights():
        empty = transformer.from_config(config)
    ends = tuple(f".{target}" for target in plugin.lora_targets)
    hit = [n for n, m in empty.named_modules() if type(m) is torch.nn.Linear and n.endswith(ends)]
    names = {kohya_parts(module, plugin.kohya_layout)[0] for module in hit}
    assert names == {f"lora_unet_{name}" for name in EXPECTED[family, model]}


def named(policy: Policy) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Every linear module that the layout has a name for: that name, and what has it too."""
    found = {}
    for module, layer in policy.transformer.named_modules():
        with suppress(ValueError):
            if isinstance(layer, torch.nn.Linear):
                found[module] = kohya_parts(module, policy.kohya_layout)  # type: ignore[arg-type]
    return found


def with_lora(policy: Policy, targets: tuple[str, ...] | None = None) -> dict[str, torch.Tensor]:
    """The values of a LoRA that does something; of all that can have one, unless told."""
    policy.train_lora(rank=RANK, alpha=ALPHA, targets=targets or tuple(named(policy)), seed=5)
    return randomise(policy)


def saved(policy: Policy, weights: dict[str, torch.Tensor], folder: Path) -> Path:
    modules = dict(policy.transformer.named_modules())
    assert policy.kohya_layout is not None
    return save_kohya(weights, folder, alpha=ALPHA, layout=policy.kohya_layout,
                      rows=lambda module: modules[module].out_features)  # fmt: skip


def add_as_comfyui(policy: Policy, tensors: dict[str, torch.Tensor]) -> None:
    """Adds up @ down alpha / rank to the weight of each fused module, rows in their order."""
    parts_of = dict(named(policy).values())
    for name in {key.partition(".")[0] for key in tensors}:
        down, up = (tensors[f"{name}.lora_{half}.weight"] for half in ("down", "up"))
        delta = up @ down * (tensors[f"{name}.alpha"].item() / len(down))
        weights = [policy.transformer.get_parameter(f"{part}.weight") for part in parts_of[name]]
        rows = delta.split([len(weight) for weight in weights])
        for weight, add in zip(weights, rows, strict=True):
            weight.data += add


@pytest.mark.parametrize("targets", [None, ("attn.to_q", "attn.to_v")])
def test_fused_modules_give_the_same_velocities(make, family, tmp_path, targets):
    """Also where only queries and values of a fused module have adapters."""
    policy, fresh = make(family), make(family)
    weights, untrained = with_lora(policy, targets), velocity(fresh)
    add_as_comfyui(fresh, load_file(saved(policy, weights, tmp_path)))
    assert (velocity(policy) - untrained).abs().max() > 1e-2
    torch.testing.assert_close(velocity(fresh), velocity(policy), rtol=0, atol=1e-5)


def test_diffusers_reads_it_back_at_the_published_size():
    """Its converter knows the widths of FLUX.1-dev only, and needs no model."""
    generator, wide = torch.Generator().manual_seed(0), 3072
    sizes = {  # [in, out] of modules with an adapter
        "transformer_blocks.3.attn.to_q": (wide, wide),
        "transformer_blocks.3.attn.to_k": (wide, wide),
        "transformer_blocks.3.attn.to_v": (wide, wide),
        "transformer_blocks.18.attn.to_out.0": (wide, wide),
        "transformer_blocks.18.ff_context.net.0.proj": (wide, 4 * wide),
        "single_transformer_blocks.37.attn.to_q": (wide, wide),
        "single_transformer_blocks.37.attn.to_k": (wide, wide),
        "single_transformer_blocks.37.attn.to_v": (wide, wide),
        "single_transformer_blocks.37.proj_out": (5 * wide, wide),
    }
    weights = {}
    for module, (columns, rows) in sizes.items():
        for half, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            weights[f"{module}.lora_{half}.default.weight"] = torch.randn(
                shape, generator=generator
            )
    tensors = to_kohya(weights, alpha=ALPHA, layout=FLUX, rows=lambda _: 4 * wide)
    assert tensors["lora_unet_double_blocks_3_img_attn_qkv.lora_down.weight"].shape == (12, wide)
    assert tensors["lora_unet_single_blocks_37_linear1.lora_up.weight"].shape == (7 * wide, 12)
    theirs = FluxPipeline.lora_state_dict(tensors)
    idle = "transformer.single_transformer_blocks.37.proj_mlp.lora_B.weight"
    assert not theirs.pop(idle).any() and theirs.pop(idle.replace("_B", "_A")) is not None
    assert {n.partition(".lora")[0].removeprefix("transformer.") for n in theirs} == sizes.keys()
    for module, (a, b) in halves(weights).items():
        x = torch.randn(a.shape[1], generator=generator)
        down, up = (theirs[f"transformer.{module}.lora_{half}.weight"] for half in "AB")
        expected = b @ (a @ x) * (ALPHA / RANK)
        torch.testing.assert_close(up @ (down @ x), expected, rtol=1e-4, atol=1e-2)


def test_diffusers_gives_the_same_velocities(make, tmp_path):
    """Of the double blocks; single blocks of other widths than the published its loader refuses."""
    policy, fresh = make("flux"), make("flux")
    targets = ("attn.add_q_proj", "attn.to_out.0", "ff.net.0.proj", "ff_context.net.2",
               "norm1.linear", "transformer_blocks.0.attn.to_q")  # fmt: skip
    weights, untrained = with_lora(policy, targets), velocity(fresh)
    fresh.pipeline.load_lora_weights(saved(policy, weights, tmp_path))
    assert (velocity(policy) - untrained).abs().max() > 1e-2
    torch.testing.assert_close(velocity(fresh), velocity(policy), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "target"), [("flux", "x_embedder"), ("sd3", "norm1.linear"), ("sd3", "proj_out")]
)
def test_a_module_without_a_name_is_refused(make, family, target):
    policy = make(family)
    weights = with_lora(policy, (target,))
    message = rf"no name for .*{target}; export it as diffusers or peft"
    with pytest.raises(ValueError, match=message):
        to_kohya(weights, alpha=ALPHA, layout=policy.kohya_layout, rows=len)
