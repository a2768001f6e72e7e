"""Recipes that load, those of the repository among them, and what they then say."""

from __future__ import annotations

from pathlib import Path

import pytest

from gardo.config import check, dump, load, read_yaml
from gardo.planner import geometry
from gardo.recipe import reward_settings
from gardo.tiny import world
from tests.engine.config.recipe import RECIPES, refusal, values, written

TINY = [p for p in RECIPES if p.stem.startswith("tiny_")]
FULL_SIZE = [p for p in RECIPES if p not in TINY]


def test_there_are_recipes() -> None:
    assert len(TINY) >= 6 and len(FULL_SIZE) >= 6


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda p: p.stem)
def test_every_full_size_recipe_loads_and_fits(path: Path) -> None:
    """With prompts that lie beside it, of which its rewards know every line."""
    recipe = load(path)
    for ranks in (1, 2, 4, 8):
        plan = geometry(recipe, rank=0, world=ranks)
        assert plan.rows == plan.micro_batch * plan.accumulation
    stage = {"lora": 1, "full": 3}[recipe.train.weights.kind]  # a LoRA's base is whole everywhere
    assert recipe.distributed.precision == "bfloat16" and recipe.distributed.stage == stage
    trained, evaluated = recipe.prompts(), recipe.evaluation_prompts()
    assert len(trained) == len(set(trained)) >= 1000 > len(evaluated) > 1
    assert not set(trained) & set(evaluated)
    for field in ("data.prompts", "evaluate.prompts"):
        assert refusal(path, [f"{field}=nowhere.txt"]).startswith(f"--set {field}: no such file")


# The scripts of DanceGRPO and MixGRPO take FluxPipeline's default, the others name their number.
TEXT_TOKENS = {"flux_dance_hpsv2": 512, "flux_mix_hpsv2": 512}


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda p: p.stem)
def test_every_full_size_recipe_has_its_sources_text_tokens(path: Path) -> None:
    model = read_yaml(path.read_text(encoding="utf-8"), path.name)["model"]
    assert model["text_tokens"] == TEXT_TOKENS.get(path.stem, 128)


@pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
def test_every_tiny_recipe_loads_and_fits_two_ranks(path: Path) -> None:
    recipe = load(path)
    if path.stem != "tiny_flux_ocr":  # numbers
        assert recipe.prompts() == world.prompts()
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


def test_a_recipe_means_what_it_says(tmp_path: Path) -> None:
    recipe = load(written(tmp_path))
    assert recipe.algorithm.name == "gardo" and recipe.algorithm.base.name == "flow_grpo"
    assert recipe.algorithm.base.clip_range == 1e-3
    assert recipe.algorithm.gate.limits == (0.02, 0.2)
    assert recipe.model.size == (32, 32)
    assert recipe.train.weights.kind == "lora" and recipe.train.weights.rank == 16
    roles = {name: s.role for name, s in reward_settings(recipe).items()}
    assert roles == {
        "tiny_count": "proxy",
        "tiny_shape": "auxiliary",
        "tiny_purity": "auxiliary",
        "dinov3": "features",
        "tiny_fidelity": "held_out",
    }
    assert recipe.run_folder == Path("runs/good-run")


def test_refl_needs_a_differentiable_proxy(tmp_path: Path) -> None:
    path = RECIPES[0].parent / "tiny_flux_refl.yaml"
    message = refusal(path, ["rewards.tiny_count.role=proxy"])
    assert message == (
        f"{path}: rewards.tiny_count: tiny_count has no gradient, and the algorithm needs one"
    )


def test_nft_cannot_train_more_times_than_there_are() -> None:
    path = RECIPES[0].parent / "tiny_flux_nft_gardo.yaml"
    assert load(path, ["sampler.train_steps=8"]).sampler.train_steps == 8
    message = refusal(path, ["sampler.train_steps=9"])
    assert message == "--set sampler.train_steps: 9 times of 8 steps; at most 8"


# ---- what follows from another section -----------------------------------------------------------

FULL = "train: {weights: {kind: full, rank: null, alpha: null}}"


@pytest.mark.parametrize(
    ("fragment", "stage"),
    [
        ("distributed: {stage: null}", 1),
        ("distributed: null", 1),
        ("distributed: {stage: 2}", 2),
        (f"{{{FULL}, distributed: {{stage: null}}}}", 3),
        (f"{{{FULL}, distributed: null}}", 3),
        (f"{{{FULL}, distributed: {{stage: 1}}}}", 1),
    ],
)
def test_a_loras_base_is_whole_on_every_rank_unless_asked_otherwise(
    tmp_path: Path, fragment: str, stage: int
) -> None:
    """A null takes the field out of the recipe. What is settled stands in the dump."""
    recipe = load(written(tmp_path, fragment))
    assert recipe.distributed.stage == stage
    assert read_yaml(dump(recipe), "dump")["distributed"]["stage"] == stage


# ---- prompts -------------------------------------------------------------------------------------


def test_prompt_files_are_found_beside_the_recipe_then_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    path = written(elsewhere)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.txt").write_text("one red circle\n")
    assert load(path).prompts() == world.prompts()
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
