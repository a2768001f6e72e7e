"""docs/examples/: the plug-ins of docs/plug-ins.md. That page's commands train with all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gardo.config import load
from gardo.recipe_errors import RecipeError
from gardo.types import Prompt
from tests import ROOT

EXAMPLES = ROOT / "docs/examples"


@pytest.fixture(autouse=True)
def in_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_the_recipe_knows_the_fields_of_all_three() -> None:
    recipe = load(EXAMPLES / "own.yaml")
    assert recipe.model.damping == 0.8
    assert recipe.algorithm.base.of_bad == 0.25
    assert recipe.rewards["bright"].wanted == 0.7


@pytest.mark.parametrize(
    "field", ["model.damping", "algorithm.base.of_bad", "rewards.bright.wanted"]
)
def test_their_limits_are_checked(field: str) -> None:
    with pytest.raises(RecipeError, match=field):
        load(EXAMPLES / "own.yaml", [f"{field}=2"])


def test_the_reward_scores_and_has_a_gradient() -> None:
    from brightness import Brightness, BrightnessSettings  # type: ignore[import-not-found]

    settings = BrightnessSettings(kind="brightness:Brightness", role="proxy", wanted=0.5)
    reward = Brightness(settings, torch.device("cpu"))
    images = torch.full((2, 3, 4, 4), 0.25, requires_grad=True)
    prompts = [Prompt("a"), Prompt("b", {"brightness": 0.25})]
    value_B = reward.score(images, prompts)
    assert value_B.tolist() == pytest.approx([-0.25, 0.0])
    value_B[0].backward()
    assert images.grad is not None and (images.grad[0] > 0).all()
    with pytest.raises(ValueError, match="brightness"):
        Brightness.check_prompt(Prompt("c", {"brightness": 2}))


def test_the_page_names_the_files() -> None:
    page = (ROOT / "docs/plug-ins.md").read_text(encoding="utf-8")
    files: set[Path] = {*EXAMPLES.glob("*.py")}
    assert len(files) == 3
    assert all(f"(examples/{file.name})" in page for file in files)
