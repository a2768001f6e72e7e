"""LoRA files: what diffusers and PEFT load of ours, what is read of theirs, what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gardo.policies.base import Policy
from gardo.policies.lora_files import open_lora, save_diffusers, save_peft
from tests.engine.policies.tiny import images, randomise, velocity

ALPHA, RANK = 12, 4


def trained(make: Any, family: str, targets: tuple[str, ...] | None = None) -> tuple[Policy, Any]:
    """A policy whose LoRA does something, and its values."""
    policy = make(family)
    policy.train_lora(rank=RANK, alpha=ALPHA, targets=targets, seed=5)
    return policy, randomise(policy)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(t, right[n]) for n, t in left.items())


# ---- what others load ----------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [None, ("attn.to_q", "attn.to_v")])
def test_diffusers_loads_the_lora_with_its_metadata(make, family, tmp_path, targets):
    policy, weights = trained(make, family, targets)
    fresh = make(family)
    file = save_diffusers(weights, policy.lora, tmp_path)
    untrained, expected = images(fresh), images(policy)
    assert (expected - untrained).abs().max() > 1e-2
    fresh.pipeline.load_lora_weights(tmp_path)
    assert torch.equal(images(fresh), expected)

    wanted = set(targets or policy.lora_targets)
    (loaded,) = fresh.transformer.peft_config.values()
    with safe_open(file, "pt") as opened:
        kept = json.loads(opened.metadata()["lora_adapter_metadata"])
    kept = {n.removeprefix("transformer."): value for n, value in kept.items()}
    for config in (loaded.to_dict(), kept):
        assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
        assert set(config["target_modules"]) == wanted


def test_the_file_is_the_one_that_diffusers_writes(make, family, tmp_path):
    policy, weights = trained(make, family)
    ours = save_diffusers(weights, policy.lora, tmp_path)
    policy.transformer.save_lora_adapter(tmp_path, weight_name="theirs.safetensors")
    theirs = load_file(tmp_path / "theirs.safetensors")
    assert equal({n.removeprefix("transformer."): t for n, t in load_file(ours).items()}, theirs)


def test_peft_loads_its_folder_and_so_does_the_transformer(make, family, tmp_path):
    policy, weights = trained(make, family)
    expected, untrained = velocity(policy), make(family)
    save_peft(weights, policy.lora, tmp_path)
    PeftModel.from_pretrained(untrained.transformer, tmp_path)  # wraps its layers in place
    assert torch.equal(velocity(untrained), expected)

    fresh = make(family)
    fresh.transformer.load_lora_adapter(
        tmp_path, prefix="base_model.model", weight_name="adapter_model.safetensors",
        network_alphas={f"base_model.model.{m}.alpha": torch.tensor(float(ALPHA))
                        for m in {n.partition(".lora_")[0] for n in weights}},
    )  # fmt: skip
    torch.testing.assert_close(velocity(fresh), expected, rtol=0, atol=1e-6)


# ---- what is read of others' ---------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_diffusers, save_peft])
def test_what_is_written_is_read_again(make, family, tmp_path, save):
    policy, weights = trained(make, family)
    written = save(weights, policy.lora, tmp_path)
    for path in (written, str(tmp_path)):
        lora = open_lora(path)
        assert (lora.rank, lora.alpha) == (RANK, ALPHA)
        assert set(lora.targets) == set(policy.lora_targets)
        assert equal(lora.read(), weights)
        lora.check(rank=RANK, alpha=ALPHA, targets=policy.lora_targets)
    policy.start_from(open_lora(tmp_path))


def peft_folder(make: Any, folder: Path, **options: Any) -> Any:
    """A PEFT model of the tiny Flux whose adapter PEFT has saved in `folder`."""
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["attn.to_q", "attn.to_v"]}
    model = get_peft_model(make("flux").transformer, LoraConfig(**(config | options)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_that_peft_wrote_says_the_same_here(make, tmp_path, rslora):
    theirs = make("flux")
    theirs.pipeline.transformer = peft_folder(make, tmp_path, use_rslora=rslora).base_model.model
    lora = open_lora(tmp_path)
    assert lora.alpha == (ALPHA * math.sqrt(RANK) if rslora else ALPHA)
    ours = make("flux")
    ours.train_lora(rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=0)
    ours.start_from(lora)
    for name, tensor in lora.read().items():
        ours.transformer.get_parameter(name).data.copy_(tensor)
    assert (velocity(make("flux")) - velocity(ours)).abs().max() > 1e-2
    torch.testing.assert_close(velocity(ours), velocity(theirs), rtol=0, atol=1e-6)


def test_names_with_the_adapters_name_are_read(make, tmp_path):
    """As a state_dict has them that PEFT did not save."""
    peft_folder(make, tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    renamed = {n.replace(".weight", ".default.weight"): t for n, t in stored.items()}
    (tmp_path / "adapter_config.json").write_bytes(
        (tmp_path / "theirs" / "adapter_config.json").read_bytes()
    )
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    assert equal(open_lora(tmp_path).read(), open_lora(tmp_path / "theirs").read())


def test_a_diffusers_file_without_metadata_has_alpha_as_its_rank(make, tmp_path):
    policy, weights = trained(make, "flux", ("attn.to_q", "ff.net.0.proj"))
    save_diffusers(weights, policy.lora, tmp_path)
    bare = tmp_path / "sub" / "any_name.safetensors"
    bare.parent.mkdir()
    save_file(load_file(tmp_path / "pytorch_lora_weights.safetensors"), bare)
    lora = open_lora(bare.parent)
    assert (lora.path, lora.rank, lora.alpha) == (bare, RANK, RANK)
    assert lora.targets == ("attn.to_q", "ff.net.0.proj")
    assert equal(lora.read(), weights)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora: True: DoRA also trains magnitudes"),
        ({"bias": "lora_only"}, "bias: lora_only: biases were trained too"),
        ({"modules_to_save": ["x_embedder"]}, "whole modules were trained too"),
        ({"rank_pattern": {"attn.to_v": 2}}, "rank_pattern: ranks .*this trains one rank"),
        ({"alpha_pattern": {"attn.to_v": 2}}, "alpha_pattern: modules differ in alpha"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa: it changed the base"),
    ],
)
def test_more_than_lora_is_refused_by_name(make, tmp_path, options, message):
    peft_folder(make, tmp_path, **options)
    with pytest.raises(ValueError, match=message) as raised:
        open_lora(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}/adapter_model.safetensors: ")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("text_encoder.layers.0.q.lora_A.weight", "not a LoRA tensor of the transformer"),
        ("transformer.x_embedder.lora_A.bias", "not a LoRA tensor of the transformer"),
        ("transformer.x_embedder.lora_A.weight", r"lora_A \[4, 8\] and lora_B \[\] do not"),
        ("lora_unet_double_blocks_0_img_mlp_0.lora_down.weight", "kohya's layout"),
        ("transformer.x_embedder.lora_magnitude_vector", "DoRA"),
    ],
)
def test_unknown_tensors_are_refused_by_name(tmp_path, key, message):
    file = tmp_path / "lora.safetensors"
    save_file({key: torch.zeros(4, 8)}, file)
    with pytest.raises(ValueError, match=message) as raised:
        open_lora(file)
    assert key.removeprefix("transformer.").partition(".lora_A.weight")[0] in str(raised.value)


def test_what_is_not_there_is_said(tmp_path):
    for name, message in (
        ("nowhere", "no such file; give a LoRA file"),
        ("a.bin", "a pickle, which can run code; save it again as safetensors"),
        (".", "needs one adapter_model.safetensors or pytorch_lora_weights.safetensors; it has"),
    ):
        with pytest.raises(ValueError, match=message):
            open_lora(tmp_path / name)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model\.bin: a pickle"):
        open_lora(tmp_path)
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"torn\.safetensors cannot be read"):
        open_lora(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"adapter_config\.json cannot be read"):
        open_lora(tmp_path)


def test_another_model_is_refused_by_the_first_module(make, tmp_path):
    policy, weights = trained(make, "flux", ("attn.to_q",))
    name = "single_transformer_blocks.0.attn.to_q.lora_A.default.weight"
    save_diffusers({n: t for n, t in weights.items() if n.startswith("tr")}, policy.lora, tmp_path)
    with pytest.raises(ValueError, match=f"has nothing for {name}, this model trains"):
        policy.start_from(open_lora(tmp_path))
