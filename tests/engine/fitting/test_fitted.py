"""The reward `fitted`: what the fit computed, its statistics, the gate, and wrong folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from gardo.algorithms.gardo import Gate, GateSettings
from gardo.config import load
from gardo.fitting.command import fit_reward
from gardo.planner.scorers import scorer
from gardo.rewards._files import find_files
from gardo.rewards._head_features import FEATURES
from gardo.rewards.assembly import load_rewards
from gardo.rewards.dinov3 import Dinov3Settings
from gardo.rewards.fitted import Fitted, FittedSettings, read_fit
from gardo.rewards.panel import Panel
from gardo.types import Prompt
from tests.engine.config.recipe import refusal, written
from tests.engine.fitting import drawn
from tests.engine.rewards.clip_models import PROMPTS

CPU = torch.device("cpu")


def settings(path: Path, role: str = "proxy", **fields: Any) -> FittedSettings:
    return FittedSettings(kind="fitted", role=role, path=str(path), **fields)  # type: ignore[arg-type]


def built(path: Path, **fields: Any) -> Fitted:
    return Fitted(settings(path, **fields), CPU)


def texts(count: int, text: str = "a") -> list[Prompt]:
    return [Prompt(text)] * count


def read(folder: Path, name: str) -> Tensor:
    with Image.open(folder / name) as picture:
        return torch.tensor(list(picture.tobytes())).view(32, 32, 3).permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
        initializer_range=0.3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(config).save_pretrained(path)
    return path


# ---- what it says --------------------------------------------------------------------------------


def test_the_reward_is_what_the_fit_measured(pairs: Path, fitted: Path):
    """Accuracy on all pairs, by pictures read again and a loop over heads."""
    reward, right = built(fitted), 0
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    state = load_file(fitted / "heads.safetensors")
    of = FEATURES["dinov3"].plugin(Dinov3Settings(path="builtin:dinov3", size=32), CPU)
    for line in lines:
        images = torch.cat([read(pairs.parent, line[name]) for name in ("first", "second")])
        first, second = reward.score(images, texts(2)).tolist()
        right += (first > second) == (line["preferred"] == "first")
        z = (of.score(images, []) - state["mean"]) / state["deviation"]
        by_hand = sum(z @ state["weight"][k, 0] + state["bias"][k, 0] for k in range(5)) / 5
        assert torch.allclose(torch.tensor([first, second]), by_hand, atol=1e-4)
    report = read_fit(str(fitted)).report
    counted = sum(report[part]["accuracy"]["mean"] * report[part]["pairs"] for part in report)
    assert right == pytest.approx(counted, abs=1.01)  # last bits of one pair


def test_the_statistics(fitted: Path):
    images, _ = drawn.pictures(6, 3)
    said_KB = built(fitted).scores(images, texts(6))
    assert said_KB.shape == (5, 6)
    lower = built(fitted, statistic="lower", pessimism=2.0).score(images, texts(6))
    spread = built(fitted, statistic="spread").score(images, texts(6))
    assert torch.allclose(lower, said_KB.mean(0) - 2 * said_KB.std(0), atol=1e-5)
    assert torch.allclose(spread, -said_KB.std(0), atol=1e-5)


def test_an_image_that_is_broken_has_no_value_and_the_others_have(fitted: Path):
    images, _ = drawn.pictures(5, 4)
    images[2, 0, 3, 3] = torch.nan
    for statistic in ("mean", "lower", "spread"):
        value = built(fitted, statistic=statistic, batch=2).score(images, texts(5))
        assert value.isfinite().tolist() == [True, True, False, True, True]


def fit_of(features: str, folder: Path, out: Path, **other: Any) -> Path:
    file = drawn.write(out / "pairs", 60, 10)
    own = {"features": features, "path": str(folder), "size": None, **other}
    fit_reward(file, drawn.wanted(out / "fit", **own))
    return out / "fit"


def test_of_clip_the_prompt_counts_and_gradients_reach_the_picture(
    clip_folder: Path, tmp_path: Path
):
    path = fit_of("clip", clip_folder, tmp_path)
    assert read_fit(str(path)).width == 32
    reward = built(path)
    images = drawn.pictures(3, 5)[0].requires_grad_()
    value = reward.score(images, [Prompt(text) for text in PROMPTS])
    same = reward.score(images, [Prompt(PROMPTS[0])] * 3)
    assert torch.allclose(value[[0, 2]], same[[0, 2]], atol=1e-5)
    assert abs(float(value[1] - same[1])) > 1e-4
    value.sum().backward()
    assert images.grad is not None and bool((images.grad.abs().sum((1, 2, 3)) > 0).all())


def test_dinov2_and_gradients(dinov2_folder: Path, tmp_path: Path):
    path = fit_of("dinov2", dinov2_folder, tmp_path, size=28, hidden=4)
    assert read_fit(str(path)).path == str(dinov2_folder)
    reward = built(path)
    images = drawn.pictures(3, 5)[0].requires_grad_()
    Panel({"mine": reward}).differentiable_score(images, texts(3)).sum().backward()
    assert images.grad is not None and bool((images.grad.abs().sum((1, 2, 3)) > 0).all())
    modules = (reward.heads, reward.model.model)
    assert not any(p.requires_grad for module in modules for p in module.parameters())


def test_one_copy_of_the_model_with_the_features_reward_and_with_itself(fitted: Path):
    loaded: dict[str, Any] = load_rewards(
        {
            "mine": settings(fitted),
            "low": settings(fitted, "auxiliary", statistic="lower"),
            "dinov3": Dinov3Settings(path="builtin:dinov3", size=32),
        },
        CPU,
    )
    mine, low, dino = loaded["mine"].model.model, loaded["low"].model.model, loaded["dinov3"].model
    for one, two, three in zip(mine.parameters(), low.parameters(), dino.parameters(), strict=True):
        assert one.data_ptr() == two.data_ptr() == three.data_ptr()
    images, _ = drawn.pictures(3, 6)
    assert torch.equal(
        loaded["mine"].score(images, texts(3)), built(fitted).score(images, texts(3))
    )


def test_the_planner_counts_its_model(fitted: Path):
    mine = scorer(settings(fitted))
    dino = scorer(Dinov3Settings(path="builtin:dinov3", size=32, batch=32))
    assert mine and dino and mine.towers == dino.towers
    assert mine.activations == pytest.approx(dino.activations, rel=0.01)


# ---- the gate ------------------------------------------------------------------------------------


def gated(path: Path, images: Tensor, statistic: str, fraction: float) -> list[int]:
    count = len(images)
    panel = Panel({"mine": built(path), "sure": built(path, role="auxiliary", statistic=statistic)})
    place = {"sample_B": torch.arange(count), "group_B": torch.zeros(count, dtype=torch.int64)}
    scores = panel(images, texts(count), **place)
    gate_B, _ = Gate(GateSettings(fraction=fraction)).select(scores)
    return [int(i) for i in gate_B.nonzero()[:, 0]]


def test_an_image_far_from_the_fit_that_the_proxy_likes_is_gated(fitted: Path):
    """A flat yellow among dim pictures: bright, and like nothing that the pairs had."""
    images, bright_B = drawn.pictures(40, 8)
    images = images[bright_B < 0.4]
    images[5] = torch.tensor([1.0, 1.0, 0.0])[:, None, None]
    said_KB = built(fitted).scores(images, texts(len(images)))
    assert len(images) > 10
    assert int(said_KB.mean(0).argmax()) == 5 and int(said_KB.std(0).argmax()) == 5
    assert gated(fitted, images, "lower", 1 / len(images)) == [5]
    assert gated(fitted, images, "spread", 1 / len(images)) == [5]


def test_beside_its_own_mean_lower_is_quiet_and_spread_is_not(fitted: Path):
    """On pictures like those of the fit: how far the auxiliary's ranks are from the proxy's."""
    images, _ = drawn.pictures(48, 9)
    said = {
        statistic: built(fitted, statistic=statistic).score(images, texts(48)).argsort().argsort()
        for statistic in ("mean", "lower", "spread")
    }
    near, far = ((said["mean"] - said[s]).abs().float().mean() for s in ("lower", "spread"))
    assert near < far / 2


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def copy(fitted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitted, tmp_path / "copy"))


def change(folder: Path, **fields: Any) -> None:
    file = folder / "fitted.json"
    said = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in said.items() if value != "gone"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 47}, "path: the dinov3 features of 'builtin:dinov3' are 48 wide, .* were 47"),
        ({"features": "vgg"}, "path: '.*fitted.json': features: .*'dinov3'"),
        ({"version": 2}, "path: '.*fitted.json': version: "),
        ({"heads": "gone"}, "path: '.*fitted.json': heads: Field required; write it with `gardo"),
        ({"path": "./none"}, "path: the model of the features: no folder with config.json: './n"),
        ({"heads": 1}, None),
    ],
)
def test_a_description_that_is_wrong(copy: Path, fields: dict[str, Any], message: str | None):
    change(copy, **fields)
    if message:
        with pytest.raises(ValidationError, match=message):
            settings(copy)
    else:  # sizes are those of the file of weights, when it loads
        with pytest.raises(ValueError, match=r"^path: heads.safetensors of .*: bias has the shape"):
            built(copy)


def test_what_a_folder_lacks(copy: Path):
    with pytest.raises(ValidationError, match=r"statistic: lower: .* has one head"):
        change(copy, heads=1)
        settings(copy, statistic="lower")
    (copy / "heads.safetensors").write_bytes(b"torn")
    with pytest.raises(ValidationError, match=r"heads.safetensors' cannot be read: "):
        settings(copy)
    (copy / "heads.safetensors").unlink()
    with pytest.raises(ValidationError, match=r"no folder with fitted.json and heads.safetensors"):
        settings(copy)
    with pytest.raises(ValidationError, match=r"no folder with fitted.json"):
        settings(copy / "none")


def test_another_model_for_the_features(copy: Path, clip_folder: Path, dinov2_folder: Path):
    change(copy, path="./moved/away")
    with pytest.raises(ValidationError, match="or say where it is with features_path"):
        settings(copy)
    reward = built(copy, features_path="builtin:dinov3")
    assert reward.score(drawn.pictures(2, 1)[0], texts(2)).isfinite().all()
    with pytest.raises(ValidationError, match=r"features_path: the dinov3 features of .* 24 wide"):
        settings(copy, features_path=str(dinov2_folder))
    with pytest.raises(ValueError, match="of type 'clip'; it must be dinov3_vit"):
        built(copy, features_path=str(clip_folder))


def test_tensors_that_are_not_finite(copy: Path):
    state = load_file(copy / "heads.safetensors")
    save_file(state | {"bias": state["bias"] * torch.nan}, copy / "heads.safetensors")
    with pytest.raises(ValueError, match=r"^path: heads.safetensors of .*: bias is not finite"):
        built(copy)


def test_in_a_recipe(copy: Path, tmp_path: Path):
    (tmp_path / "recipe").mkdir()
    added = f"rewards: {{mine: {{kind: fitted, role: auxiliary, statistic: lower, path: {copy}}}}}"
    recipe = load(written(tmp_path / "recipe", added), [])
    find_files(recipe.rewards["mine"], "rewards.mine")
    change(copy, width=47)
    message = refusal(written(tmp_path / "recipe", added))
    assert "rewards.mine.path: the dinov3 features" in message


def test_the_files_of_the_features_are_looked_for_at_the_start(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    change(copy, path="nobody/dino")
    with pytest.raises(ValueError, match=r"^rewards.a.features_path: 'nobody/dino' is not on this"):
        find_files(settings(copy), "rewards.a")
