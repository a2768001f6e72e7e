"""`data.weights` and `data.held_out` in a recipe: what trains, what is evaluated and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from gardo.config import load
from gardo.tiny import world
from tests.engine.config.recipe import refusal, written


def test_a_share_is_kept_for_evaluations(tmp_path: Path) -> None:
    recipe = load(written(tmp_path, "data: {held_out: 0.25}"))
    trained, evaluated = recipe.prompts(), recipe.evaluation_prompts()
    assert trained and evaluated and not set(trained) & set(evaluated)
    assert sorted(trained + evaluated) == sorted(world.prompts())
    asked = load(tmp_path / "recipe.yaml", ["evaluate.prompts=held_out"])
    assert asked.evaluate.prompts == "held_out" and asked.evaluation_prompts() == evaluated
    few = load(tmp_path / "recipe.yaml", ["evaluate.prompt_count=2"])
    assert few.evaluation_prompts() == evaluated[:2]
    (tmp_path / "own.txt").write_text("one red circle\n")
    own = load(tmp_path / "recipe.yaml", ["evaluate.prompts=own.txt"])
    assert own.evaluation_prompts() == ["one red circle"] and own.prompts() == trained


def test_weights_of_the_lines_train(tmp_path: Path) -> None:
    written(tmp_path)
    lines = (
        '{"prompt": "one red circle", "weight": 4, "rare": 0.5}\n{"prompt": "one blue square"}\n'
    )
    (tmp_path / "prompts.jsonl").write_text(lines)
    path = tmp_path / "recipe.yaml"
    use = f"data.prompts={tmp_path / 'prompts.jsonl'}"
    assert [p.weight for p in load(path, [use]).prompts()] == [4, 1]
    assert [p.weight for p in load(path, [use, "data.weights=rare"]).prompts()] == [0.5, 1]
    assert [p.weight for p in load(path, [use, "data.weights=null"]).prompts()] == [1, 1]
    assert refusal(path, [use, "data.weights=common"]) == (
        "--set data.weights: 'common' is a field of no prompt; look at data.prompts"
    )
    (tmp_path / "prompts.jsonl").write_text(lines.replace("4", '"much"'))
    assert refusal(path, [use]).startswith(
        "--set data.prompts: prompt 1, 'one red circle': \"weight\" is 'much'; a weight is a number"
    )


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "evaluate.prompts=held_out",
            "held_out: data.held_out keeps none out of training; give it",
        ),
        ("data.held_out=1.0e-9", "1e-09 of 54 prompts is no prompt; use a larger share"),
        ("data.held_out=1.0", "1.0: input should be less than 1"),
        ("data.held_out=-0.1", "-0.1: input should be greater than or equal to 0"),
    ],
)
def test_what_cannot_be_held_out(tmp_path: Path, override: str, problem: str) -> None:
    field = override.partition("=")[0]
    assert refusal(written(tmp_path), [override]).startswith(f"--set {field}: {problem}")
