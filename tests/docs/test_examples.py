"""docs/examples/: the plug-ins of docs/plug-ins.md. Its commands train with those of own.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gardo.config import load
from gardo.planner.scorers import scorer
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


LABELS = ["cat", "dog", "fish"]


@pytest.fixture
def classifier(tmp_path: Path) -> Any:
    """A tiny ViT with random weights, and its folder."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)}, initializer_range=0.5,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "vit")
    return model


def classified(folder: Path, **fields: Any) -> dict[str, Any]:
    return {"kind": "classified:Classified", "role": "proxy", "path": str(folder), **fields}


def test_the_reward_with_a_model_says_what_the_model_says(classifier: Any, tmp_path: Path) -> None:
    from classified import Classified  # type: ignore[import-not-found]

    settings = Classified.Settings(**classified(tmp_path / "vit", label="fish", batch=2))
    reward = Classified(settings, torch.device("cpu"))
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    value_B = reward.score(images, [Prompt("a")] * 5)
    with torch.no_grad():
        logits_BC = classifier(2 * images - 1).logits
    assert value_B.dtype == torch.float32 and not value_B.requires_grad
    assert torch.allclose(value_B, logits_BC.log_softmax(1)[:, 2], atol=1e-6)
    assert value_B.std() > 1e-3
    grey = torch.full((1, 3, 24, 24), 0.25)  # of any size: they are resized to the model's
    small, large = (reward.score(grey[..., :n, :n], [Prompt("a")]) for n in (8, 24))
    assert torch.allclose(small, large, atol=1e-6)
    half = Classified.Settings(**classified(tmp_path / "vit", label="fish", dtype="bfloat16"))
    low_B = Classified(half, torch.device("cpu")).score(images, [Prompt("a")] * 5)
    assert low_B.dtype == torch.float32 and torch.allclose(low_B, value_B, atol=0.1)


@pytest.mark.usefixtures("classifier")
def test_the_reward_with_a_model_is_of_a_recipe(tmp_path: Path) -> None:
    """Its folder is looked into before anything loads; the plan says that it does not know it."""
    section = f"{{kind: 'classified:Classified', role: proxy, label: cat, path: {tmp_path}/%s}}"
    recipe = load(EXAMPLES / "own.yaml", [f"rewards.bright={section % 'vit'}"])
    assert recipe.rewards["bright"].batch == 32
    assert scorer(recipe.rewards["bright"]) is None
    with pytest.raises(RecipeError, match=r"rewards\.bright\.path"):
        load(EXAMPLES / "own.yaml", [f"rewards.bright={section % 'nothing'}"])


@pytest.mark.usefixtures("classifier")
def test_a_label_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    from classified import Classified

    settings = Classified.Settings(**classified(tmp_path / "vit", label="horse"))
    with pytest.raises(ValueError, match="label: 'horse' is none of cat, dog, fish"):
        Classified(settings, torch.device("cpu"))


def test_the_page_names_the_files() -> None:
    page = (ROOT / "docs/plug-ins.md").read_text(encoding="utf-8")
    files: set[Path] = {*EXAMPLES.glob("*.py")}
    assert len(files) == 4
    assert all(f"(examples/{file.name})" in page for file in files)
