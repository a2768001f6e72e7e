"""Recipes: what loads, and what bad ones are told: file (or --set), field, value, mend."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gardo import cli, config
from gardo.algorithms.base import plugin_of
from gardo.algorithms.flow_grpo import FlowGRPO
from gardo.config import Recipe, check, dump, load, read_yaml
from gardo.planner import geometry
from gardo.recipe_errors import RecipeError
from gardo.tiny import world
from tests import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
TINY = [p for p in RECIPES if p.stem.startswith("tiny_")]
FULL_SIZE = [p for p in RECIPES if p not in TINY]
GOOD = """\
model: {family: flux, path: "builtin:flux", size: [32, 32], guidance: 3.5, text_tokens: 8}
train:
  weights: {kind: lora, rank: 16, alpha: 32}
  optimizer: {name: adamw, lr: 1.0e-3}
  updates_per_step: 2
  micro_batch: 72
data: {prompts: prompts.txt, prompts_per_step: 8, images_per_prompt: 12}
sampler: {steps: 8, train_steps: 6, sde: flow, noise_level: 0.7}
algorithm:
  name: gardo
  base:
    name: flow_grpo
    clip_range: 1e-3
    beta: 3.0
    advantage: {std: none, scale: 6.0}
  gate: {fraction: 0.1, limits: [0.02, 0.2]}
  diversity: {features: dinov3}
  reference: {reset_updates: 50}
rewards:
  tiny_count: {role: proxy}
  tiny_shape: {role: auxiliary}
  tiny_purity: {role: auxiliary}
  dinov3: {role: features, path: "builtin:dinov3", size: 32}
  tiny_fidelity: {role: held_out}
evaluate: {every: 20, images_per_prompt: 8, steps: 8, batch: 48, diversity: attributes}
distributed: {engine: zero, stage: 3}
run: {name: good-run, steps: 80, seed: 42}
"""
SECTIONS = ("model", "train", "data", "sampler", "algorithm", "rewards", "run")


def written(folder: Path, *changes: tuple[str, str]) -> Path:
    """The good recipe in `folder` with pieces of its text replaced; each must occur once."""
    text = GOOD
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    (folder / "prompts.txt").write_text("\n".join(world.prompts()))
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return written(tmp_path)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as raised:
        load(path, overrides)
    return str(raised.value)


def values(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain values: each load makes classes of its own, so recipes differ."""
    return recipe.model_dump(mode="json")


# ---- what loads ----------------------------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert len(TINY) >= 6 and len(FULL_SIZE) >= 6


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda p: p.stem)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_full_size_recipe_loads_and_fits(path: Path, ranks: int, tmp_path: Path) -> None:
    """With prompts that its rewards know; without, it says which file is missing."""
    prompt = 'a sign that says "OPEN"' if "ocr" in path.stem else "a photo of a bench"
    (tmp_path / "prompts.txt").write_text(f"{prompt}\n")
    recipe = load(path, [f"data.prompts={tmp_path / 'prompts.txt'}"])
    plan = geometry(recipe, rank=0, world=ranks)
    assert plan.rows == plan.micro_batch * plan.accumulation
    assert recipe.distributed.precision == "bfloat16" and recipe.distributed.stage == 3
    assert "data.prompts: no such file" in refusal(path)


# The scripts of DanceGRPO and MixGRPO take FluxPipeline's default, the others name their number.
TEXT_TOKENS = {"flux_dance_hpsv2": 512, "flux_mix_hpsv2": 512}


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda p: p.stem)
def test_every_full_size_recipe_has_its_sources_text_tokens(path: Path) -> None:
    model = read_yaml(path.read_text(encoding="utf-8"), path.name)["model"]
    assert model["text_tokens"] == TEXT_TOKENS.get(path.stem, 128)


@pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
def test_every_tiny_recipe_loads_and_fits_two_ranks(path: Path) -> None:
    recipe = load(path)
    assert len(recipe.prompts()) == 54
    for ranks in (1, 2):
        plan = geometry(recipe, rank=ranks - 1, world=ranks)
        assert plan.samples * ranks == recipe.data.prompts_per_step * recipe.data.images_per_prompt
        assert plan.first == (ranks - 1) * plan.samples
        assert plan.rows == plan.micro_batch * plan.accumulation


@pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
def test_a_dump_loads_to_the_same_recipe(path: Path) -> None:
    recipe = load(path)
    again = check(read_yaml(dump(recipe), "dump"), "dump")
    assert values(again) == values(recipe)
    assert dump(again) == dump(recipe)


def test_a_recipe_means_what_it_says(good: Path) -> None:
    recipe = load(good)
    assert recipe.algorithm.name == "gardo" and recipe.algorithm.base.name == "flow_grpo"
    assert recipe.algorithm.base.clip_range == 1e-3
    assert recipe.algorithm.gate.limits == (0.02, 0.2)
    assert recipe.model.size == (32, 32)
    assert recipe.train.weights.kind == "lora" and recipe.train.weights.rank == 16
    roles = {name: s.role for name, s in config.reward_settings(recipe).items()}
    assert roles == {
        "tiny_count": "proxy",
        "tiny_shape": "auxiliary",
        "tiny_purity": "auxiliary",
        "dinov3": "features",
        "tiny_fidelity": "held_out",
    }
    assert recipe.run_folder == Path("runs/good-run")


def test_prompt_files_are_found_beside_the_recipe_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = written(elsewhere)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("one red circle\n")
    assert len(load(path).prompts()) == 54
    here = load(path, ["data.prompts=here.txt", "evaluate.prompt_count=1"])
    assert here.prompts() == here.evaluation_prompts() == ["one red circle"]
    (elsewhere / "here.txt").write_text("two red circles\n\n  three red circles \n")
    assert load(path, ["data.prompts=here.txt"]).prompts() == [
        "two red circles",
        "three red circles",
    ]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfone red circle\n")
    assert load(path).prompts() == ["one red circle"]


# ---- bad input -----------------------------------------------------------------------------------

NAME, STEPS = "name: good-run", "steps: 80"
FLUX = 'path: "builtin:flux"'
FEATURES = '  dinov3: {role: features, path: "builtin:dinov3", size: 32}\n'
BASE = "name: flow_grpo"

BAD_VALUES = {
    # unknown fields
    "unknown section": (("evaluate: {", "evaluates: {"), "evaluates: unknown field",
                        "Did you mean evaluate?"),
    "unknown field": (("noise_level: 0.7", "noise_levle: 0.7"), "sampler.noise_levle: unknown",
                      "Did you mean sampler.noise_level?"),
    "unknown field of the model": (("guidance: 3.5", "guidence: 3.5"), "model.guidence: unknown",
                                   "Did you mean model.guidance?"),
    "unknown field of the algorithm": (("{fraction: 0.1", "{fractoin: 0.1"),
                                       "algorithm.gate.fractoin: unknown",
                                       "Did you mean algorithm.gate.fraction?"),
    "unknown field of the base": (("clip_range: 1e-3", "clip_rage: 1e-3"),
                                  "algorithm.base.clip_rage: unknown",
                                  "Did you mean algorithm.base.clip_range?"),
    "unknown field of a reward": (("tiny_count: {", "tiny_count: {wieght: 3, "),
                                  "rewards.tiny_count.wieght: unknown",
                                  "Did you mean rewards.tiny_count.weight?"),
    "unknown field far from any": (("seed: 42", "colour: 42"), "run.colour: unknown field",
                                   "Known here: deterministic, folder, name, seed, steps."),
    "rank of a full fine-tuning": (("kind: lora, rank: 16, alpha: 32", "kind: full, rank: 16"),
                                   "train.weights.rank: unknown field", "Known here: kind."),
    # types and ranges
    "text for a number": ((STEPS, "steps: eighty"), "run.steps: 'eighty'", "valid integer"),
    "fraction for a whole number": ((STEPS, "steps: 80.5"), "run.steps: 80.5", "valid integer"),
    "truth for a number": (("seed: 42", "seed: yes"), "run.seed: True", "valid integer"),
    "number for text": ((NAME, "name: 5"), "run.name: 5", "valid string"),
    "section for a number": ((STEPS, "steps: {a: 1}"), "run.steps: input", "valid integer"),
    "number for a section": (("{steps: 8, train_steps: 6, sde: flow, noise_level: 0.7}", "5"),
                             "sampler: 5", "valid dictionary"),
    "one size for two": (("size: [32, 32]", "size: 32"), "model.size: 32", "valid tuple"),
    "three sizes": (("size: [32, 32]", "size: [32, 32, 3]"), "model.size", "at most 2"),
    "negative size": (("size: [32, 32]", "size: [32, -32]"), "model.size.1: -32", "than 0"),
    "zero rank": (("rank: 16", "rank: 0"), "train.weights.rank: 0", "equal to 1"),
    "NaN": (("lr: 1.0e-3", "lr: .nan"), "train.optimizer.lr: nan", "finite number"),
    "infinity": (("noise_level: 0.7", "noise_level: .inf"), "sampler.noise_level: inf",
                 "finite number"),
    "NaN in a pair": (("limits: [0.02, 0.2]", "limits: [.nan, 0.2]"),
                      "algorithm.gate.limits.0: nan", "finite number"),
    "limits upside down": (("limits: [0.02, 0.2]", "limits: [0.2, 0.02]"),
                           "algorithm.gate.limits: [0.2, 0.02]", "low <= high"),
    "unknown sampler": (("sde: flow", "sde: fast"), "sampler.sde: 'fast'", "'dance'"),
    "other optimizer": (("name: adamw", "name: sgd"), "train.optimizer.name: 'sgd'", "adamw"),
    "run outside its folder": ((NAME, "name: ../elsewhere"), "run.name: '../elsewhere'", "A-Z"),
    # plug-ins
    "unknown algorithm": (("name: gardo\n", "name: grado\n"), "algorithm.name: 'grado' is none of",
                          "diffusion_nft, flow_grpo, "),
    "unknown base": ((BASE, "name: grpo"), "algorithm.base.name: 'grpo'", "flow_grpo"),
    "no base": (("  base:\n", "  bass:\n"), "algorithm.base.name: missing", "flow_grpo"),
    "unknown reward": (("tiny_count:", "tiny_cuont:"), "rewards.tiny_cuont.kind: 'tiny_cuont'",
                       "preference, tiny_count, tiny_fidelity, tiny_patches, tiny_purity"),
    "unknown family": (("family: flux", "family: fluks"), "model.family: 'fluks'", "flux, sd3"),
    "no family": (("family: flux, ", ""), "model.family: missing", "flux, sd3"),
    "module that is not there": (("name: gardo\n", 'name: "no_such_module:Name"\n'),
                                 "algorithm.name: 'no_such_module:Name'", "cannot be imported"),
    "no plug-in": (("name: gardo\n", 'name: "os:getcwd"\n'), "algorithm.name: 'os:getcwd'",
                   "no plug-in"),
    "reward that is no name": (("tiny_count:", "_count:"), "rewards._count", "a letter"),
    "unknown weights": (("kind: lora", "kind: lorra"), "train.weights:", "'lora', 'full'"),
    "weights without a kind": (("kind: lora, ", ""), "train.weights: kind", "lora, full"),
    # files
    "missing model folder": ((FLUX, "path: ./no/such/model"), "model.path: no such folder",
                             "'./no/such/model'; give a diffusers folder or a hub id"),
    "missing built-in model": ((FLUX, 'path: "builtin:nothing"'), "model.path:",
                               "'builtin:nothing'"),
    "folder of something else": ((FLUX, 'path: "."'), "model.path: '.'", "no model_index.json"),
    "missing features model": (('"builtin:dinov3"', "./no/dinov3"), "rewards.dinov3.path",
                               "'./no/dinov3'; give one, or a hub id"),
    "missing prompt file": (("prompts: prompts.txt", "prompts: nowhere.txt"),
                            "data.prompts: no such file", "one prompt a line"),
    "missing evaluation prompts": (("every: 20", "every: 20, prompts: nowhere.txt"),
                                   "evaluate.prompts: no such file", "one prompt a line"),
    # rules between sections
    "no proxy": (("tiny_count: {role: proxy}", "tiny_count: {role: held_out}"),
                 "rewards: none has role proxy", "`role: proxy`"),
    "no features": ((FEATURES, ""), "algorithm.diversity.features: 'dinov3'",
                    "add `dinov3: {role: features}` to rewards"),
    "features of another name": (("{features: dinov3}", "{features: dino}"),
                                 "algorithm.diversity.features: 'dino'", "add `dino:"),
    "two features": ((FEATURES, FEATURES + FEATURES.replace("dinov3:", "two: {kind: dinov3}", 1)
                      .replace("kind: dinov3} {", "kind: dinov3, ")),
                     "rewards: dinov3, two all have role features", "keep one"),
    "every step trained": (("train_steps: 6", "train_steps: 8"), "sampler.train_steps: 8 of 8",
                           "at most 7"),
    "more steps trained than made": (("train_steps: 6", "train_steps: 9"),
                                     "sampler.train_steps: 9 of 8", "at most 7"),
    "log-probabilities of an ODE": (("sde: flow", "sde: ode"), "sampler.sde: 'ode'",
                                    "'flow', 'dance' or 'cps'"),
    "an SDE without noise": (("noise_level: 0.7", "noise_level: 0"), "sampler.noise_level:",
                             "greater than 0"),
    "more noise than CPS can add": (("sde: flow, noise_level: 0.7", "sde: cps, noise_level: 1.5"),
                                    "sampler.noise_level: 1.5", "up to 1"),
    "shift of the model's schedule": (("noise_level: 0.7", "noise_level: 0.7, shift: 3"),
                                      "sampler: shift 3.0 has no effect", "schedule: shifted"),
    "gate without a KL": (("beta: 3.0", "beta: 0.0"), "algorithm.base.beta: flow_grpo has no KL",
                          "a beta above 0"),
    "group of one": (("images_per_prompt: 12", "images_per_prompt: 1"), "data.images_per_prompt: 1",
                     "at least 2"),
    "bfloat16 at stage 0": (("stage: 3", "stage: 0, precision: bfloat16"),
                            "distributed.precision: bfloat16 at stage 0", "use stage 1, 2 or 3"),
    "bfloat16 masters in fp32": (("stage: 3", "stage: 3, masters: bfloat16"),
                                 "distributed.masters: bfloat16", "needs precision: bfloat16"),
    "offload of nothing": (("stage: 3", "stage: 0, offload: optimizer"),
                           "distributed.offload: stage 0", "use stage 1, 2 or 3"),
    "offload of whole weights": (("stage: 3", "stage: 2, offload: parameters"),
                                 "distributed.offload: parameters", "use stage: 3"),
    "persistence with slots": (("stage: 3", "stage: 3, persistence_threshold: 1000"),
                               "distributed.persistence_threshold: 1000", "use 0"),
    "hpZ with slots": (("stage: 3", "stage: 3, hpz: 2"), "distributed.hpz: 2", "use 1"),
    "no such stage": (("stage: 3", "stage: 4"), "distributed.stage: 4", "0, 1, 2 or 3"),
    "bfloat16 in one process": (("engine: zero, stage: 3", "engine: local, precision: bfloat16"),
                                "distributed.precision: bfloat16", "use engine zero"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_are_explained(case: str, tmp_path: Path) -> None:
    change, field, mend = BAD_VALUES[case]
    path = written(tmp_path, change)
    message = refusal(path)
    assert message.startswith(f"{path}: {field}"), message
    assert mend in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("grpo_guard", ["sampler.sde=cps"], "--set sampler.sde: cps has no ratio that grpo_guard"),
        (
            "flow_grpo_fast",
            [],
            "{path}: sampler.train_steps: a window of 6 does not fit into the first half of 8",
        ),
        (
            "mix_grpo",
            ["algorithm.base.window={kind: frozen, at: 4}"],
            "{path}: sampler.train_steps: a frozen window of 6 has no place before the last of 8",
        ),
        (
            "mix_grpo",
            ["algorithm.base.window={kind: frozen, start: 4}"],
            "--set algorithm.base.window: algorithm.base.window.start: unknown field. Known here: ",
        ),
        (
            "mix_grpo",
            ["algorithm.base.window={at: 4}"],
            "--set algorithm.base.window: kind is missing; one of progressive, random, decay, exp",
        ),
        (
            "mix_grpo",
            ["algorithm.base.window={kind: decay, most: 0}"],
            "--set algorithm.base.window: algorithm.base.window.most: 0: input should be greater",
        ),
        ("ddpo", [], "{path}: algorithm.base.clip_range: unknown field"),
        ("dance_grpo", ["sampler.train_steps=8"], "--set sampler.train_steps: 8 of 8 steps"),
    ],
)
def test_the_policy_gradient_family_is_explained(
    name: str, overrides: list[str], expected: str, good: Path
) -> None:
    message = refusal(good, f"algorithm.base.name={name}", *overrides)
    assert message.startswith(expected.format(path=good)), message
    assert "\n" not in message


BAD_TEXTS = {
    "empty": ("", "a recipe is a mapping of sections"),
    "list": ("- one\n- two\n", "a recipe is a mapping of sections; this is list"),
    "text": ("a recipe\n", "a recipe is a mapping of sections; this is str"),
    "no YAML": ("model: [\n", "not valid YAML"),
    "key twice": ("run: {seed: 1, steps: 2, seed: 3}\n", "the key 'seed' stands twice"),
    "section twice": ("run: {}\ndata: {}\nrun: {}\n", "the key 'run' stands twice"),
    "Python object": ("run: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_texts_are_explained(case: str, tmp_path: Path) -> None:
    text, expected = BAD_TEXTS[case]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    message = refusal(path)
    assert message.startswith(f"{path}: ") and expected in message
    assert "\n" not in message


def test_a_key_that_stands_twice_is_located(tmp_path: Path) -> None:
    path = written(tmp_path, ("seed: 42", "seed: 42, seed: 43"))
    message = refusal(path)
    assert "'seed' stands twice" in message and "line 27" in message


def test_bytes_that_are_no_text_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"run: {name: caf\xe9}\n")
    assert refusal(path) == f"{path}: not UTF-8 (byte 15); save it as UTF-8"


def test_a_missing_recipe_is_explained(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no.yaml").startswith(f"{tmp_path / 'no.yaml'}: no such recipe")
    assert "no such recipe" in refusal(tmp_path)


@pytest.mark.parametrize("section", SECTIONS)
def test_missing_sections_are_named(section: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    raw = yaml.safe_load(GOOD)
    del raw[section]
    path.write_text(yaml.safe_dump(raw))
    message = refusal(path)
    assert re.match(rf"{re.escape(str(path))}: {section}\b[^:]*: missing", message), message


def test_all_bad_fields_are_told_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, (STEPS, "steps: -1"), ("rank: 16", "rank: many"))
    lines = refusal(path).split("\n")
    assert [line.removeprefix(f"{path}: ").split(":")[0] for line in lines] == [
        "train.weights.rank",
        "run.steps",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty; write one prompt a line"),
        (b" \n\n\t\n", "is empty; write one prompt a line"),
        (b"one red circle\ntwo caf\xe9 circles\n", "is not UTF-8 (byte 22); save it as UTF-8"),
        (b"one red circle\ntwo pink circles\n", "prompt 2: prompt 'two pink circles': 'pink'"),
    ],
    ids=["empty", "blank", "not UTF-8", "unknown word"],
)
@pytest.mark.parametrize("field", ["data.prompts", "evaluate.prompts"])
def test_bad_prompt_files_are_explained(
    field: str, content: bytes, expected: str, tmp_path: Path
) -> None:
    path = written(tmp_path, ("every: 20", "every: 20, prompts: prompts.txt"))
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    message = refusal(path, f"{field}=bad.txt")
    assert message.startswith(f"--set {field}: ") and expected in message
    assert str(bad) in message or "pink" in message
    path.write_text(path.read_text().replace("prompts: prompts.txt", "prompts: bad.txt"))
    assert f"{path}: data.prompts: " in refusal(path)


def test_a_prompt_that_cannot_be_scored_names_the_reward(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "prompts.txt").write_text("one red circle\nfour red circles\n")
    assert "(rewards.tiny_count)" in refusal(path)


def test_a_gate_needs_auxiliaries(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        ("tiny_shape: {role: auxiliary}", "tiny_shape: {role: held_out}"),
        ("tiny_purity: {role: auxiliary}", "tiny_purity: {role: held_out}"),
    )
    message = refusal(path)
    assert message.startswith(f"{path}: algorithm.gate: needs rewards with role auxiliary")
    assert "or leave the gate out" in message
    assert load(path, ["algorithm.gate=null"]).algorithm.gate is None


def test_diversity_of_features_needs_features(tmp_path: Path) -> None:
    path = written(tmp_path, (FEATURES, ""))
    message = refusal(path, "algorithm.diversity=null", "evaluate.diversity=features")
    assert message == ("--set evaluate.diversity: features needs a reward with role features")


def test_refl_needs_a_differentiable_proxy() -> None:
    path = ROOT / "recipes/tiny_flux_refl.yaml"
    message = refusal(path, "rewards.tiny_count.role=proxy")
    assert message == (
        f"{path}: rewards.tiny_count: tiny_count has no gradient, and the algorithm needs one"
    )


def test_nft_cannot_train_more_times_than_there_are() -> None:
    path = ROOT / "recipes/tiny_flux_nft_gardo.yaml"
    assert load(path, ["sampler.train_steps=8"]).sampler.train_steps == 8
    message = refusal(path, "sampler.train_steps=9")
    assert message == "--set sampler.train_steps: 9 times of 8 steps; at most 8"


# ---- geometry ------------------------------------------------------------------------------------


def nearest(message: str) -> list[int]:
    """The numbers that a message about geometry offers."""
    return [int(n) for n in re.findall(r"\d+", message.split("Nearest that do: ")[1])]


@pytest.mark.parametrize(
    ("prompts", "images", "updates", "ranks"),
    [(8, 12, 2, 5), (7, 3, 2, 4), (1, 2, 1, 64), (48, 24, 2, 7)],
)
def test_batches_that_do_not_split_are_told_what_would(
    good: Path, prompts: int, images: int, updates: int, ranks: int
) -> None:
    sizes = [
        f"data.images_per_prompt={images}",
        f"train.updates_per_step={updates}",
        "train.micro_batch=null",
    ]
    recipe = load(good, [*sizes, f"data.prompts_per_step={prompts}"])
    with pytest.raises(RecipeError) as raised:
        geometry(recipe, rank=0, world=ranks, source="some.yaml")
    message = str(raised.value)
    assert message.startswith(f"some.yaml: data.prompts_per_step: {prompts} prompts x {images} ")
    assert f"{ranks} ranks" in message and f"{updates} updates" in message
    offered = nearest(message)
    assert len(offered) == 2
    for better in offered:
        plan = geometry(
            load(good, [*sizes, f"data.prompts_per_step={better}"]), rank=0, world=ranks
        )
        assert plan.samples * ranks == better * images
    closest = min(abs(prompts - better) for better in offered)
    closer = range(max(1, prompts - closest + 1), prompts + closest)
    assert all(p * images % (ranks * updates) for p in closer)


@pytest.mark.parametrize("micro_batch", [5, 71, 200, 1000])
def test_micro_batches_that_do_not_divide_are_told_what_would(good: Path, micro_batch: int) -> None:
    with pytest.raises(RecipeError) as raised:
        geometry(load(good, [f"train.micro_batch={micro_batch}"]), rank=1, world=2)
    message = str(raised.value)
    assert f"recipe: train.micro_batch: {micro_batch} does not divide the 144 rows" in message
    assert "(24 samples x 6 steps)" in message
    offered = nearest(message)
    assert len(offered) == 2
    for better in offered:
        plan = geometry(load(good, [f"train.micro_batch={better}"]), rank=1, world=2)
        assert plan.micro_batch == better and plan.accumulation * better == 144


def test_all_of_an_update_goes_at_once_without_micro_batch(good: Path) -> None:
    plan = geometry(load(good, ["train.micro_batch=null"]), rank=1, world=2)
    assert (plan.samples, plan.first, plan.rows, plan.micro_batch) == (48, 48, 144, 144)


# ---- --set ---------------------------------------------------------------------------------------


def test_overrides_have_yaml_types(good: Path) -> None:
    recipe = load(
        good,
        [
            "train.optimizer.lr=1e-4",
            "run.steps=3",
            "run.name=again",
            "sampler.same_initial_noise=true",
            "train.weights.targets=[attn.to_q, attn.to_k]",
            "algorithm.diversity=null",
            "algorithm.reference.reset_kl=5E-1",
            "train.optimizer.betas=[0.9, 0.95]",
            "rewards.tiny_count.weight=2",
        ],
    )
    assert recipe.train.optimizer.lr == 1e-4 and isinstance(recipe.train.optimizer.lr, float)
    assert recipe.run.steps == 3 and recipe.run.name == "again"
    assert recipe.sampler.same_initial_noise is True
    assert recipe.train.weights.targets == ["attn.to_q", "attn.to_k"]
    assert recipe.algorithm.diversity is None
    assert recipe.algorithm.reference.reset_kl == 0.5
    assert recipe.algorithm.reference.reset_updates == load(good).algorithm.reference.reset_updates
    assert recipe.train.optimizer.betas == (0.9, 0.95)
    assert recipe.rewards.tiny_count.weight == 2


def test_the_last_override_wins(good: Path) -> None:
    assert load(good, ["run.steps=3", "run.steps=5"]).run.steps == 5


def test_overrides_leave_the_rest_alone(good: Path) -> None:
    expected = values(load(good))
    expected["run"]["steps"] = 3
    assert values(load(good, ["run.steps=3"])) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "algorithm.gate.fractoin=0.2",
            "--set algorithm.gate.fractoin: unknown field. Did you mean algorithm.gate.fraction?",
        ),
        ("run.steps=many", "--set run.steps: 'many': input should be a valid integer"),
        ("run.steps=-1", "--set run.steps: -1: input should be greater than or equal to 1"),
        ("train.optimizer.lr=.nan", "--set train.optimizer.lr: nan: input should be a finite"),
        ("model.size=[32, x]", "--set model.size: model.size.1: 'x': input should be"),
        ("run={}", "--set run: run.name: missing"),
        ("run.steps", "--set run.steps: expected FIELD=VALUE, such as"),
        ("=3", "--set =3: expected FIELD=VALUE, such as"),
        ("run.steps.more=1", "--set run.steps.more: 'steps' is a value, not a section"),
        ("model.size=[32", "--set model.size: not valid YAML"),
        ("algorithm.name=grado", "--set algorithm.name: 'grado' is none of awm, dance_grpo, "),
        ("sampler.train_steps=8", "--set sampler.train_steps: 8 of 8 steps"),
        ("data.prompts=nowhere.txt", "--set data.prompts: no such file: "),
        ("model.path=builtin:none", "--set model.path: no such folder: 'builtin:none'"),
    ],
)
def test_errors_of_overrides_name_the_override(good: Path, override: str, expected: str) -> None:
    assert refusal(good, override).startswith(expected)


# ---- plug-ins of the user ------------------------------------------------------------------------

PLUGINS = """
from typing import Literal
from pydantic import Field
from gardo.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from gardo.rewards.base import Reward, RewardSettings

class MineSettings(FlowGRPOSettings):
    name: Literal["mine"] = "mine"
    strength: float = Field(1.0, gt=0)

class Mine(FlowGRPO):
    Settings = MineSettings

class LengthSettings(RewardSettings):
    longest: int = 20

class Length(Reward):
    Settings = LengthSettings

    @classmethod
    def check_prompt(cls, prompt):
        if "yellow" in prompt:
            raise ValueError(f"prompt {prompt!r} is yellow")
"""


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "gardo_test_plugins.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gardo_test_plugins", raising=False)
    return "gardo_test_plugins"


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_algorithm_by_dotted_path_loads(
    wrapped: bool, users_module: str, tmp_path: Path
) -> None:
    name = f'name: "{users_module}:Mine"'
    path = written(tmp_path, (BASE, f"{name}\n    strength: 2.0"))
    if not wrapped:
        raw = yaml.safe_load(path.read_text())
        raw["algorithm"] = raw["algorithm"]["base"]
        path.write_text(yaml.safe_dump(raw))
    recipe = load(path)
    settings = recipe.algorithm.base if wrapped else recipe.algorithm
    section = "algorithm.base" if wrapped else "algorithm"
    assert settings.strength == 2.0 and settings.clip_range == 1e-3
    plugin = plugin_of(settings)
    assert plugin.__name__ == "Mine" and issubclass(plugin, FlowGRPO)
    assert geometry(recipe, rank=0, world=2).rows == 144
    assert values(check(read_yaml(dump(recipe), "dump"), "dump")) == values(recipe)
    message = refusal(path, f"{section}.strenght=1.0")
    assert message.endswith(f"unknown field. Did you mean {section}.strength?")
    assert "greater than 0" in refusal(path, f"{section}.strength=0")


def test_a_reward_by_dotted_path_loads(users_module: str, tmp_path: Path) -> None:
    kind = f"kind: '{users_module}:Length'"
    prompts = tmp_path / "red.txt"
    prompts.write_text("one red circle\n")
    path = written(
        tmp_path,
        ("tiny_count: {role: proxy}", f"length: {{role: proxy, {kind}, longest: 7}}"),
        ("prompts: prompts.txt", "prompts: red.txt"),
    )
    recipe = load(path)
    settings = config.reward_settings(recipe)["length"]
    assert config.reward_plugin(settings).__name__ == "Length"
    assert (settings.longest, settings.role, settings.weight) == (7, "proxy", 1.0)
    assert values(check(read_yaml(dump(recipe), "dump"), "dump")) == values(recipe)
    assert "Did you mean rewards.length.longest?" in refusal(path, "rewards.length.longst=1")
    prompts.write_text("one red circle\none yellow circle\n")
    assert "prompt 2: prompt 'one yellow circle' is yellow (rewards.length)" in refusal(path)


def test_a_name_that_the_module_lacks_is_explained(users_module: str, tmp_path: Path) -> None:
    path = written(tmp_path, (BASE, f'name: "{users_module}:Nothing"'))
    message = refusal(path)
    assert f"algorithm.base.name: '{users_module}:Nothing' cannot be imported" in message
    assert "has no attribute 'Nothing'" in message


# ---- the command line ----------------------------------------------------------------------------


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Our modules in a new process in `folder`."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels"))
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("module", ["gardo.cli train", "gardo.train"])
def test_a_bad_recipe_ends_with_2_before_anything_is_made(module: str, tmp_path: Path) -> None:
    path = written(tmp_path, (FLUX, "path: ./no/such/model"))
    before = sorted(tmp_path.rglob("*"))
    done = run(tmp_path, *module.split(), "recipe.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    ours = [line for line in done.stderr.splitlines() if not line.startswith("[transformers]")]
    assert ours == [
        "recipe.yaml: model.path: no such folder: './no/such/model'; "
        "give a diffusers folder or a hub id owner/name"
    ]
    assert sorted(tmp_path.rglob("*")) == before
    assert path in before


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command in this process says on stderr as it ends with 2."""
    with pytest.raises(SystemExit) as raised:
        cli.app(list(arguments))
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.strip()


def test_geometry_is_refused_before_launching(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    message = refused(capsys, "train", str(path), "--gpus", "5")
    assert message.startswith(f"{path}: data.prompts_per_step: 8 prompts x 12 images = 96 do not")
    local = "distributed.engine=local"
    message = refused(capsys, "train", str(path), "--gpus", "2", "--set", local)
    assert message.startswith(f"{path}: distributed.engine: local runs in one process")
    message = refused(capsys, "train", str(path), "--set", "run.stepz=1")
    assert message == "--set run.stepz: unknown field. Did you mean run.steps?"
    assert list(empty.iterdir()) == []


def test_folders_without_a_run_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "export", str(tmp_path))
    assert message.startswith(f"{tmp_path}: no checkpoints; name the folder")
    message = refused(capsys, "report", str(tmp_path))
    assert message.startswith(f"{tmp_path}: no metrics.jsonl; name the folder")
    assert list(tmp_path.iterdir()) == []


def test_the_schema_knows_every_plug_in(capsys: pytest.CaptureFixture[str]) -> None:
    cli.schema()
    schema = json.loads(capsys.readouterr().out)
    names = {
        definition["properties"][key]["const"]
        for definition in schema["$defs"].values()
        for key in ("name", "kind", "family")
        if "const" in definition.get("properties", {}).get(key, {})
    }
    packages = ("gardo.algorithms", "gardo.rewards", "gardo.policies")
    built_in = {n for package in packages for n in config.plugins.names(package)}
    assert {"gardo", "flow_grpo", "diffusion_nft", "refl", "flux", "sd3"} <= built_in
    assert built_in <= names
    windows = {"progressive", "random", "decay", "exp_decay", "frozen"}
    assert names - built_in == {"lora", "full"} | windows


def test_the_schema_has_the_shape_of_a_recipe() -> None:
    schema = config.full_schema()
    assert set(SECTIONS) == set(schema["required"])
    optional = {"checkpoint", "kernels", "rollout"}
    assert set(yaml.safe_load(GOOD)) == set(schema["properties"]) - optional
    strict = [d for d in schema["$defs"].values() if d.get("type") == "object"]
    assert strict and all(d["additionalProperties"] is False for d in [schema, *strict])
    sampler = schema["$defs"]["SamplerSettings"]["properties"]
    assert sampler["sde"]["enum"] == ["flow", "dance", "cps"]
    assert sampler["steps"]["description"] == "denoise steps T"
    if importlib.util.find_spec("jsonschema"):
        import jsonschema

        for path in RECIPES:
            jsonschema.validate(yaml.safe_load(path.read_text()), schema)
