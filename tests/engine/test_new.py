"""`gardo new`: what it writes loads, plans, and starts from the recipes that ship."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from gardo import plugins
from gardo.cli import app
from gardo.config import load, read_yaml
from gardo.new.values import starts
from gardo.planner import geometry
from gardo.recipe import Recipe
from tests import ROOT

TINY = ("--model", "builtin:flux", "--reward", "tiny_count")
ALGORITHMS = plugins.names("gardo.algorithms")


def new(out: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["new", str(out), *words])


def written(folder: Path, *words: str, code: int = 0) -> Recipe:
    out = folder / "mine.yaml"
    said = new(out, *words)
    assert said.exit_code == code, said.output
    return load(out)


def shipped(name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_yaml((ROOT / f"recipes/{name}.yaml").read_text(), name)
    return found


def differences(start: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What a start's section says other than a recipe's."""
    return {name: value for name, value in start.items() if recipe.get(name) != value}


@pytest.mark.parametrize("model", starts()["models"])
def test_models_start_from_a_recipe_that_ships(model: str) -> None:
    start = dict(starts()["models"][model])
    recipe, rewards = shipped(start.pop("recipe")), start.pop("rewards")
    assert start.pop("path") == recipe["model"]["path"]
    for name, of in start.items():
        assert not differences(of, recipe[name]), name
    for role, its in rewards.items():
        for name, said in its.items():
            given = recipe["rewards"].get(name, {"role": role, **said})
            assert given == {**said, "role": given["role"]}, name


@pytest.mark.parametrize("name", starts()["algorithms"])
def test_algorithms_start_from_a_recipe_that_ships(name: str) -> None:
    start = dict(starts()["algorithms"][name])
    recipe = shipped(start.pop("recipe"))
    recipe["algorithm"] = recipe["algorithm"].get("base", recipe["algorithm"])
    for section, of in start.items():
        assert not differences(of, recipe[section]), section


def test_full_fine_tuning_starts_from_a_recipe_that_ships() -> None:
    start = starts()["full"]
    assert not differences(start["train"], shipped(start["recipe"])["train"])


def test_a_demo_is_the_demo(tmp_path: Path) -> None:
    """All but its name and where its prompts are."""
    mine = written(tmp_path, *TINY, "--gpus", "2").model_dump(mode="json")
    demo = load(ROOT / "recipes/tiny_flux_gardo.yaml").model_dump(mode="json")
    demo["rewards"].pop("tiny_patches")
    assert (mine["run"].pop("name"), demo["run"].pop("name")) == ("mine", "tiny-flux-gardo")
    assert mine["data"].pop("prompts") == str(tmp_path / "mine_prompts.jsonl")
    demo["data"].pop("prompts")
    assert mine == demo


def test_every_field_has_its_comment_and_the_next_commands_are_said(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    said = new(out, *TINY, "--gpus", "2")
    text = out.read_text()
    assert text.startswith(
        f"# Written by\n#     gardo new {out} --model builtin:flux --reward tiny_count --gpus 2 "
    )
    assert "  prompts_per_step: 8  # prompts an iteration, over all ranks\n" in text
    assert "# eq. 7: the KL for uncertain samples alone" in text
    assert max(map(len, text.splitlines()[3:])) <= 100
    assert said.output.splitlines()[-4:] == [
        "next:",
        f"  gardo doctor {out} --gpus 2",
        f"  gardo train {out} --gpus 2 --dry-run",
        f"  gardo train {out} --gpus 2",
    ]


@pytest.mark.parametrize("gpus", [1, 2, 3, 5, 8, 16, 64])
def test_the_batch_splits_over_any_number_of_gpus(gpus: int, tmp_path: Path) -> None:
    recipe = written(tmp_path, *TINY, "--gpus", str(gpus))
    assert geometry(recipe, rank=0, world=gpus).samples >= 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_has_a_recipe(algorithm: str, tmp_path: Path) -> None:
    reward = "tiny_shape" if algorithm == "refl" else "tiny_count"
    words = ("--model", "builtin:flux", "--reward", reward, "--gpus", "2")
    recipe = written(tmp_path, *words, "--algorithm", algorithm)
    assert recipe.algorithm.name == algorithm
    roles = {name: its.role for name, its in recipe.rewards.items()}
    assert roles.pop(reward) == "proxy"
    assert ("auxiliary" in roles.values()) is (algorithm == "gardo")


def test_the_first_reward_is_the_proxy_and_the_others_check_it(tmp_path: Path) -> None:
    others = ("--reward", "sharpness", "--reward", "dinov3", "--reward", "jpeg_size")
    recipe = written(tmp_path, *TINY, *others)
    assert {name: its.role for name, its in recipe.rewards.items()} == {
        "tiny_count": "proxy", "sharpness": "auxiliary", "dinov3": "features",
        "jpeg_size": "auxiliary", "tiny_fidelity": "held_out",
    }  # fmt: skip


def test_a_reward_of_ones_own(tmp_path: Path) -> None:
    recipe = written(
        tmp_path, "--model", "builtin:flux", "--reward", "tests.engine.test_doctor_recipe:Needy"
    )
    assert recipe.rewards["needy"].kind == "tests.engine.test_doctor_recipe:Needy"


def test_all_weights(tmp_path: Path) -> None:
    recipe = written(tmp_path, *TINY, "--weights", "full")
    assert recipe.train.weights.kind == "full" and recipe.distributed.stage == 3
    assert recipe.train.optimizer.lr == 1e-5


def test_prompts_are_those_that_the_reward_asks_for(tmp_path: Path) -> None:
    out = tmp_path / "text.yaml"
    said = new(out, "--model", "builtin:sd3", "--reward", "ocr", "--reward", "sharpness")
    assert said.exit_code == 0, said.output
    first = json.loads((tmp_path / "text_prompts.jsonl").read_text().splitlines()[0])
    assert first["text"] in first["prompt"]
    assert "tiny_fidelity" not in load(out).rewards, "it judges the tiny world's captions alone"


def test_given_prompts_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "own.txt").write_text("two red circles\none blue square\n")
    monkeypatch.chdir(tmp_path)
    said = new(Path("deep/mine.yaml"), *TINY, "--prompts", "own.txt")
    assert said.exit_code == 0, said.output
    assert os.listdir("deep") == ["mine.yaml"]
    assert load(Path("deep/mine.yaml")).prompts() == ["two red circles", "one blue square"]


@pytest.mark.full
def test_a_full_size_recipe_fits_where_it_is_to_run(tmp_path: Path) -> None:
    """Where it does not as it stands, the plan's advice is in it."""
    out = tmp_path / "small.yaml"
    words = ("--model", "sd3", "--reward", "ocr", "--gpus", "1", "--gpu-memory", "24GB")
    said = new(out, *words)
    assert said.exit_code == 0 and ": fits\n" in said.output, said.output
    recipe = load(out)
    assert recipe.data.held_out == 0.1 and recipe.evaluate.prompts == "held_out"
    assert recipe.train.micro_batch < 9 or recipe.train.activation_checkpointing != "none"
    assert recipe.data.prompts_per_step == 12, "a GPU's worth"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "flux", "--reward", "hps"), "rewards.hps.kind: 'hps' is none of aesthetic"),
        (("--model", "no/such", "--reward", "ocr"), "--model no/such: no folder of Flux or SD3"),
        ((*TINY, "--algorithm", "grpo"), "algorithm.name: 'grpo' is none of awm"),
        ((*TINY, "--weights", "some"), "Invalid value for '--weights'"),
        ((*TINY, "--gpu-memory", "big"), "'big' is no memory size"),
        ((*TINY, "--prompts", "none.txt"), "data.prompts: no such file"),
        ((*TINY, "--reward", "yes_no"), "rewards.yes_no.path: is missing"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    refused = new(tmp_path / "mine.yaml", *words)
    assert refused.exit_code == 2 and said in refused.output, refused.output
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["mine.yaml", "mine_prompts.jsonl"])
def test_nothing_is_written_over(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    refused = new(tmp_path / "mine.yaml", *TINY)
    assert refused.exit_code == 2
    assert refused.output == (
        f"{tmp_path / name}: is there already, and nothing is written over; give another name, or "
        "remove it\n"
    )
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"
