"""The files of rewards are looked for before anything loads: in folders, and in the hub's cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from pydantic import ValidationError
from safetensors.torch import save_file

from gardo import plugins
from gardo.config import load
from gardo.loading import build_panel
from gardo.recipe_errors import RecipeError
from gardo.rewards._files import Files, ModelRewardSettings, find_files
from gardo.rewards.catalogue import default_weights
from gardo.session import open_session
from gardo.settings import BUILTIN
from gardo.train import main
from gardo.types import Prompt
from tests import ROOT
from tests.engine.config.recipe import refusal, written
from tests.engine.rewards.clip_models import CPU, PROMPTS, pictures

FOREIGN = {"weight": torch.zeros(1)}
REWARDS = {n: plugins.resolve("gardo.rewards", n) for n in plugins.names("gardo.rewards")}
MODELS = [n for n, r in REWARDS.items() if issubclass(r.Settings, ModelRewardSettings)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no way to the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put(cache: Path, name: str, *files: Path, revision: str = "main") -> None:
    """Files as a download leaves them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for folder in ("refs", "snapshots/0123abc"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text("0123abc")
    for file in files:
        shutil.copy(file, repository / "snapshots/0123abc")


def settings(kind: str, **fields: Any) -> Any:
    reward = REWARDS[kind]
    role = "features" if reward.gives_features else "proxy"
    return reward.Settings(kind=kind, role=role, **fields)


@pytest.mark.parametrize("kind", REWARDS)
def test_the_fields_of_a_model_and_of_what_is_none(kind: str) -> None:
    """`find_files` relies on the names: each field of files has its revision."""
    fields = REWARDS[kind].Settings.model_fields
    named = [n for n, about in fields.items() if any(isinstance(m, Files) for m in about.metadata)]
    assert bool(named) == ("dtype" in fields) == ("path" in fields) == (kind in MODELS)
    for name in named:
        assert ("revision" if name == "path" else f"{name}_revision") in fields
        assert fields["batch"].annotation is int


def test_there_are_models_and_others() -> None:
    assert {"hpsv2", "dinov2", "geneval"} <= {*MODELS} < {*REWARDS}


@pytest.mark.parametrize(
    "kind", [kind for kind in MODELS if default_weights(REWARDS[kind].Settings)]
)
def test_a_model_that_is_not_in_the_cache_is_named_with_its_command(kind: str, cache: Path) -> None:
    of_ones_own = not REWARDS[kind].Settings.model_fields["path"].default  # a judge has no default
    wanted = settings(kind, **({"path": "some/judge"} if of_ones_own else {}))
    with pytest.raises(ValueError, match="hf download") as raised:
        find_files(wanted, f"rewards.{kind}")
    said = str(raised.value)
    place, _, rest = said.partition(": ")
    field = place.removeprefix(f"rewards.{kind}.")
    assert rest.startswith(repr(getattr(wanted, field)))
    assert f"`hf download {getattr(wanted, field)} " in said and "\n" not in said


def test_what_is_in_the_cache_is_found(cache: Path, clip_folder: Path) -> None:
    put(cache, "some/clip", *(f for f in clip_folder.iterdir() if f.suffix != ".pt"))
    find_files(settings("clipscore", path="some/clip"), "rewards.a")
    put(cache, "some/hps", clip_folder / "HPS_v2.1_compressed.pt", revision="v7")
    at = {"path": "some/hps", "base": "some/clip"}
    find_files(settings("hpsv2", **at, revision="v7"), "rewards.a")
    with pytest.raises(ValueError, match=r"^rewards.a.path: 'some/hps' .* --revision v8`"):
        find_files(settings("hpsv2", **at, revision="v8"), "rewards.a")


def test_half_a_model_in_the_cache_is_not_enough(cache: Path, clip_folder: Path) -> None:
    put(cache, "some/clip", clip_folder / "config.json", clip_folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"no model\*.safetensors\* in .*hf download some/clip"):
        find_files(settings("clipscore", path="some/clip"), "rewards.a")


def test_a_folder_without_weights_is_known_at_the_start(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copy(clip_folder / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"^rewards.a.path: .* holds no model\*.safetensors\*"):
        find_files(settings("aesthetic", path=str(tmp_path)), "rewards.a")


def test_a_file_that_another_field_names_is_looked_for(clip_folder: Path) -> None:
    with pytest.raises(ValidationError, match=r"no folder with other\.pth"):
        settings("aesthetic", head=str(clip_folder), head_file="other.pth")
    with pytest.raises(ValidationError) as raised:  # a wrong file name says so itself, alone
        settings("aesthetic", head=str(clip_folder), head_file=3)
    assert [error["loc"] for error in raised.value.errors()] == [("head_file",)]


# ---- in a recipe ---------------------------------------------------------------------------------


def test_a_reward_is_looked_for_before_the_model_loads(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model's weights are another's, and the reward speaks first."""
    model = shutil.copytree(ROOT / "engine/gardo/tiny/weights/flux", tmp_path / "flux")
    save_file(FOREIGN, model / "transformer" / "diffusion_pytorch_model.safetensors")
    recipe = written(tmp_path, "distributed: {engine: local}")
    judge = "rewards.best={kind: preference, role: held_out, judge: {kind: clipscore}}"
    sets = [f"model.path={model}", judge, f"run.folder={tmp_path / 'runs'}"]
    assert main([str(recipe), *(part for s in sets for part in ("--set", s))]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{recipe}: rewards.best.judge.path: 'openai/cli")
    assert said.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_reward_that_does_not_load_is_named(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "clip")
    save_file(FOREIGN, tmp_path / "clip" / "model.safetensors")
    added = f"{{kind: clipscore, role: held_out, path: {tmp_path / 'clip'}}}"
    for reward, place in (
        (added, "rewards.extra.path: "),
        (f"{{kind: preference, role: held_out, judge: {added.replace('role: held_out, ', '')}}}",
         "rewards.extra.judge.path: "),
    ):  # fmt: skip
        recipe = load(
            written(tmp_path, "distributed: {engine: local}"), [f"rewards.extra={reward}"]
        )
        with pytest.raises(RecipeError, match=f": {place}"):
            open_session(recipe, quiet=True)


def test_the_model_of_a_reward_is_replaced_and_a_reward_is_added(
    clip_folder: Path, tmp_path: Path
) -> None:
    recipe = load(
        written(tmp_path),
        ["rewards.clipscore={role: held_out}", f"rewards.clipscore.path={clip_folder}"],
    )
    scores = (
        build_panel(recipe, CPU).rewards["clipscore"].score(pictures(3), [*map(Prompt, PROMPTS)])
    )
    assert scores.shape == (3,) and bool(scores.isfinite().all())


def test_a_file_of_a_folder_that_is_torn_is_refused_with_the_recipe(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(BUILTIN / "dinov3", tmp_path / "dinov3"))
    path = written(tmp_path, f"rewards: {{dinov3: {{path: '{folder}'}}}}")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    message = refusal(path)
    assert message.startswith(f"{path}: rewards.dinov3.path: ")
    assert "model.safetensors' cannot be read: " in message
    (folder / "config.json").write_text("[]")
    assert "config.json' holds a list, no object; get it again" in refusal(path)
