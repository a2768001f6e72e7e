"""`train.weights.path`: what a recipe is told of the LoRA that it starts from, before any model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gardo.config import load
from gardo.policies.flux import FluxPolicy
from gardo.policies.lora_files import lora_config, save_diffusers
from tests.engine.config.recipe import refusal, written


def lora(folder: Path, *, targets: tuple[str, ...] = FluxPolicy.lora_targets) -> Path:
    """A file of rank 16 and alpha 32, as the good recipe has them."""
    weights = {}
    for target in targets:
        name = f"transformer_blocks.0.{target}.lora_"
        weights |= {f"{name}A.default.weight": torch.zeros(16, 8),
                    f"{name}B.default.weight": torch.zeros(8, 16)}  # fmt: skip
    folder.mkdir(exist_ok=True)
    return save_diffusers(weights, lora_config(rank=16, alpha=32, targets=targets), folder)


@pytest.mark.parametrize("beside", [True, False])
def test_it_is_looked_for_beside_the_recipe_then_here(tmp_path, monkeypatch, beside):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    lora((tmp_path if beside else here) / "start")
    recipe = load(written(tmp_path, "train: {weights: {path: start}}"))
    assert recipe.train.weights.path == str((tmp_path if beside else here) / "start")


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ("rank: 32", "rank", "32, but FILE has 16; set rank: 16"),
        ("alpha: 16.5", "alpha", "16.5, but FILE has 32; set alpha: 32"),
        ("targets: [attn.to_q]", "targets", "attn.to_q, but FILE has attn.add_k_proj, "),
        ("targets: [norm1.linear]", "targets", "norm1.linear, but FILE has attn.add_k_proj, "),
        ("path: nowhere", "path", "HERE/nowhere: no such file; give a LoRA file of diffusers or a "
                                  "PEFT folder"),
        ("path: 5", "path", "5: input should be a valid string"),
    ],
)  # fmt: skip
def test_another_lora_is_refused(tmp_path, monkeypatch, change, field, message):
    monkeypatch.chdir(tmp_path)
    file = lora(tmp_path / "start")
    recipe = written(tmp_path, f"train: {{weights: {{path: start, {change}}}}}"
                     if "path" not in change else f"train: {{weights: {{{change}}}}}")  # fmt: skip
    said = refusal(recipe)
    message = message.replace("FILE", str(file)).replace("HERE", str(tmp_path))
    assert said.startswith(f"{recipe}: train.weights.{field}: {message}")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("targets", "wrong"),
    [
        ("[attn.to_q]", "transformer_blocks.0.proj_out is not among them"),
        ("[attn.to_q, proj_out, attn.to_k]", "attn.to_k is not in it"),
    ],
)
def test_both_ways_that_targets_differ_are_named(tmp_path, targets, wrong):
    lora(tmp_path / "start", targets=("attn.to_q", "proj_out"))
    said = refusal(written(tmp_path, f"train: {{weights: {{path: start, targets: {targets}}}}}"))
    assert said.endswith(f"({wrong}); set targets: [attn.to_q, proj_out]")
    load(written(tmp_path, "train: {weights: {path: start, targets: [proj_out, attn.to_q]}}"))


def test_a_plan_needs_no_file(tmp_path):
    load(written(tmp_path, "train: {weights: {path: /not/here}}"), prompts=False)


@pytest.mark.parametrize(
    ("fragment", "message"),
    [
        ("train: {ema: {decay: 1.0}}", "train.ema.decay: 1.0: input should be less than 1"),
        ("train: {ema: {every: 0}}", "train.ema.every: 0: input should be greater than or equal"),
        ("train: {ema: {rate: 0.5}}", "train.ema.rate: unknown field."),
        (
            "{train: {ema: {}}, distributed: {persistence_threshold: 5}, algorithm: {base: "
            "{beta: 0}, gate: null, reference: null}}",
            "distributed.persistence_threshold: 5 keeps copies of weights that do not see the "
            "exchange with slot 'average'; use 0",
        ),
    ],
)
def test_an_average_that_cannot_be_is_refused(tmp_path, fragment, message):
    assert message in refusal(written(tmp_path, fragment))


def test_the_average_has_flow_grpos_values(tmp_path):
    recipe = load(written(tmp_path, "train: {ema: {}}"))
    assert recipe.train.ema.model_dump() == {"decay": 0.9, "every": 8, "evaluate": True}
    assert recipe.slots == ("reference", "average") and recipe.evaluated == "average"
    recipe = load(written(tmp_path))
    assert recipe.slots == ("reference",) and recipe.evaluated == "train"
