"""`gardo doctor RECIPE`: models, licences, prompts, packages, batch, memory, disk; no hub asked."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from gardo.cli import app
from gardo.config import load
from gardo.doctor import recipe as needs
from gardo.doctor.finding import Finding, worst
from gardo.doctor.models import models
from gardo.rewards.base import Reward, RewardSettings
from gardo.settings import model_path
from tests import ROOT

TINY, FLUX = ROOT / "recipes/tiny_flux_gardo.yaml", ROOT / "recipes/flux_gardo_hpsv2.yaml"
ID, COMMIT = "some-owner/some-model", "0123456789abcdef0123456789abcdef01234567"


class NeedySettings(RewardSettings):
    pass


class Needy(Reward):
    """Of a package that nobody has."""

    Settings = NeedySettings
    packages = ("json", "no_such_package_anywhere")

    def score(self, images_B3HW, prompts):  # type: ignore[no-untyped-def]
        return images_B3HW.mean((1, 2, 3))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's, and nobody logged in."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "hub"


def found(
    recipe: Path, overrides: Sequence[str] = (), gpus: int | None = None, room: int | None = None
) -> dict[str, Finding]:
    asked = load(recipe, overrides, prompts=False)
    where = needs.Where.of(gpus, room)
    return {f.name: f for f in needs.examine(asked, str(recipe), where)}


def of_models(overrides: Sequence[str], recipe: Path = FLUX) -> dict[str, Finding]:
    return {f.name: f for f in models(load(recipe, overrides, prompts=False))}


def cached(cache: Path, name: str) -> Path:
    """A snapshot of a built-in model under a hub id, as a download leaves it."""
    repository = cache / f"models--{ID.replace('/', '--')}"
    folder = repository / "snapshots" / COMMIT
    shutil.copytree(model_path(name), folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return folder


def test_a_recipe_that_runs_here_has_no_problem() -> None:
    said = found(TINY)
    assert worst(said.values()) == "ok"
    assert said["model.path"].detail.endswith("ships with gardo")
    assert said["rewards.dinov3.path"].facts["bytes"] > 10_000
    assert "54 to train on, 54 to evaluate with" in said["data.prompts"].detail
    assert "8 prompts x 12 images on 1 rank: each 96 images" in said["batch"].detail
    assert said["disk"].facts["free_bytes"] > said["disk"].facts["bytes"] > 0


def test_a_model_that_is_nowhere_is_named_with_what_gets_it() -> None:
    said = of_models([])
    model = said["model.path"]
    assert model.state == "problem" and not model.facts["here"]
    assert (
        "accept its licence at https://huggingface.co/black-forest-labs/FLUX.1-dev, then `hf"
        in (model.detail)
    )
    assert model.facts["get"].startswith(
        "hf download black-forest-labs/FLUX.1-dev --include model_index.json --include 'sched"
    )
    assert said["licence"].state == "note" and "not be used commercially" in said["licence"].detail
    assert said["rewards.dinov3.path"].facts["gated"]
    one, several = said["rewards.hpsv2.path"], said["rewards.imagereward.path"]
    assert one.state == "note" and one.detail.endswith(
        "a run downloads it, or `hf download xswu/HPSv2 HPS_v2.1_compressed.pt`"
    )
    # one of the two is in the repository: named without an option, the other would be an error
    assert "--include ImageReward.safetensors --include ImageReward.pt" in several.facts["get"]
    assert said["hub token"].state == "note"


def test_whether_there_is_a_token_is_said_and_the_token_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    said = of_models([])
    assert said["model.path"].state == "note" and "is gated" in said["model.path"].detail
    assert (said["hub token"].state, said["hub token"].detail) == ("ok", "is here")
    assert not [f for f in said.values() if "secret" in f"{f.detail}{f.facts}"]


def test_without_a_hub_what_is_not_here_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    finding = of_models([])["rewards.hpsv2.path"]
    assert finding.state == "problem" and "HF_HUB_OFFLINE is set" in finding.detail


def test_a_model_in_the_cache_is_found_and_a_part_of_one_is_not_enough(cache: Path) -> None:
    asked = [f"model.path={ID}", "model.size=[32, 32]"]
    assert of_models(asked, TINY)["model.path"].state == "note"
    folder = cached(cache, "builtin:flux")
    whole = of_models(asked, TINY)["model.path"]
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert whole.state == "ok" and "in the hub's cache" in whole.detail
    assert whole.facts["bytes"] == size and whole.facts["get"] is None
    next((folder / "vae").glob("*.safetensors")).unlink()
    torn = of_models(asked, TINY)["model.path"]
    assert torn.state == "note" and "incomplete" in torn.detail and "weights" in torn.detail
    assert torn.facts["get"] == f"hf download {ID}"


def test_a_rewards_model_in_the_cache_must_have_its_weights(cache: Path) -> None:
    asked = [f"rewards.dinov3.path={ID}"]
    folder = cached(cache, "builtin:dinov3")
    assert of_models(asked, TINY)["rewards.dinov3.path"].state == "ok"
    (folder / "model.safetensors").unlink()
    torn = of_models(asked, TINY)["rewards.dinov3.path"]
    assert torn.state == "note" and "no model*.safetensors*" in torn.detail


def test_a_reward_that_is_scored_elsewhere_needs_nothing_here() -> None:
    asked = ["rewards.dinov3.where=http://localhost:9", "rewards.dinov3.path=some-owner/none"]
    assert "rewards.dinov3.path" not in of_models(asked, TINY)
    told = found(TINY, asked)["rewards.dinov3"]
    assert told.state == "note" and told.detail.endswith("`gardo rewards check` does")


def test_a_worker_needs_its_model_here() -> None:
    asked = ["rewards.dinov3.where=worker", "rewards.dinov3.path=some-owner/none"]
    assert of_models(asked, TINY)["rewards.dinov3.path"].state == "note"


@pytest.mark.parametrize(
    ("overrides", "name", "said"),
    [
        (["data.prompts=none.txt"], "data.prompts", "none.txt'; give a text file with one prompt"),
        (["evaluate.prompts=none.txt"], "evaluate.prompts", "give a text file"),
        (["train.weights.path=none"], "train.weights.path", "none"),
        (["data.prompts_per_step=7"], "batch", "Nearest that do: prompts_per_step"),
        (["rewards.n={kind: 'tests.engine.test_doctor_recipe:Needy', role: held_out}"],
         "rewards.n", "no_such_package_anywhere, not installed; pip install 'gardo-engine[rew"),
        (["model.attention=flex"], "device", "flex: needs an NVIDIA GPU"),
    ],
)  # fmt: skip
def test_each_problem_ends_with_its_mend(overrides: list[str], name: str, said: str) -> None:
    every = found(TINY, overrides, gpus=5 if name == "batch" else None)
    assert every[name].state == "problem" and said in every[name].detail
    assert every["model.path"].state == "ok", "the rest is said all the same"


@pytest.mark.parametrize(("room", "state"), [(80 * 10**9, "ok"), (9 * 10**8, "problem")])
def test_memory_is_planned_for_gpus_that_are_not_here(room: int, state: str) -> None:
    said = found(TINY, gpus=2, room=room)
    assert said["gpu memory"].state == state
    assert {"disk", "device", "host memory"}.isdisjoint(said), "they are other machines'"


def test_gpus_that_are_here_need_their_host_too() -> None:
    offload = ["distributed.offload=optimizer", "train.weights={kind: full}"]
    asked = load(TINY, offload, prompts=False)
    where = needs.Where(gpus=2, room=80 * 10**9, here=True)
    said = {f.name: f for f in needs.examine(asked, str(TINY), where)}
    assert said["host memory"].state == said["disk"].state == "ok"
    assert 0 < said["host memory"].facts["bytes"] < said["host memory"].facts["host_bytes"]


def test_a_data_set_of_the_hub_is_not_asked_for() -> None:
    told = found(TINY, ["data.prompts=hf:some-owner/prompts"])["data.prompts"]
    assert told.state == "note" and "from the hub or its cache" in told.detail


def test_a_disk_that_is_too_small_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2, 1, 1))
    finding = found(TINY)["disk"]
    assert finding.state == "problem" and finding.detail.endswith("a smaller checkpoint.keep")


def test_the_command_says_it_as_data() -> None:
    sets = ["--set", "kernels=torch", "--set", "data.prompts=none.txt"]
    said = CliRunner().invoke(app, ["doctor", str(TINY), *sets, "--gpus", "2", "--json"])
    told = json.loads(said.stdout)
    assert said.exit_code == 1 and told["worst"] == "problem"
    assert {f["about"] for f in told["findings"]} == {"machine", "recipe"}
    (wrong,) = [f for f in told["findings"] if f["state"] == "problem"]
    assert wrong["name"] == "data.prompts"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.yaml"], "none.yaml: no such recipe"),
        ([str(TINY), "--gpu-memory", "much"], "--gpu-memory 'much' is no memory size"),
        ([str(TINY), "--set", "run.stepps=3"], "Did you mean run.steps?"),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments: list[str], said: str) -> None:
    refused = CliRunner().invoke(app, ["doctor", *arguments])
    assert refused.exit_code == 2 and said in refused.output
