"""rollout.overlap: the same images, the same scores, and a run that trains on them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from gardo.config import load
from gardo.phases import sampled, scored
from gardo.recipe_errors import RecipeError
from gardo.report.metrics_log import step_records
from gardo.rewards.base import Reward, RewardSettings
from gardo.rewards.serving.wire import TOKEN
from gardo.session import Session, open_session
from gardo.train import train
from gardo.types import Rollout, Scores
from tests import ROOT
from tests.engine.rewards.serving import served

SETS = (
    "distributed.engine=local", "run.name=run", "run.steps=2", "data.prompts_per_step=2",
    "data.images_per_prompt=4", "sampler.steps=3", "sampler.train_steps=2", "rollout.batch=3",
    "train.micro_batch=4", "evaluate.every=9", "evaluate.prompt_count=1",
    "evaluate.images_per_prompt=1", "evaluate.steps=1", "evaluate.batch=1",
    "rewards.dinov3.dtype=float32",
)  # fmt: skip


def opened(folder: Path, overlap: bool) -> Session:
    recipe = load(
        ROOT / "recipes" / "tiny_flux_gardo.yaml",
        [*SETS, f"run.folder={folder}", f"rollout.overlap={str(overlap).lower()}"],
    )
    return open_session(recipe, quiet=True)


def first_scores(folder: Path, overlap: bool) -> tuple[Rollout, Scores]:
    with opened(folder, overlap) as session:
        rollout = sampled(session, 0)
        return rollout, scored(session, rollout)


def test_images_and_scores_are_those_of_one_after_the_other(tmp_path: Path) -> None:
    plain, of_plain = first_scores(tmp_path / "plain", overlap=False)
    beside, of_beside = first_scores(tmp_path / "beside", overlap=True)
    assert not plain.values and set(beside.values) == {*of_plain.rewards, "dinov3"}
    assert torch.equal(plain.images_B3HW, beside.images_B3HW)
    for name, value in of_plain.rewards.items():  # a matmul over fewer images may round otherwise
        assert torch.allclose(value, of_beside.rewards[name], rtol=1e-5, atol=1e-6)


def test_a_run_overlaps(tmp_path: Path) -> None:
    with opened(tmp_path, overlap=True) as session:
        train(session)
    steps = step_records(tmp_path / "run")
    assert len(steps) == 2
    assert steps[1]["rows"]["decode"] == 8 and steps[1]["rows"]["features"] == 8
    # scored while sampling: nothing was left for the loop's own thread to ask
    assert steps[1]["seconds"]["features"] == 0.0


def test_products_in_tf32_do_not_reach_a_model_in_float32() -> None:
    with pytest.raises(RecipeError, match=r"rollout.overlap: rewards.dinov3 in TF32 would have"):
        load(ROOT / "recipes" / "tiny_flux_gardo.yaml", ["rollout.overlap=true"])


QUESTION = 0.1  # seconds


class Slow(Reward):
    """Takes its time for a question, as a large model on another machine does."""

    Settings = RewardSettings

    def score(self, images_B3HW, prompts):
        time.sleep(QUESTION)
        return images_B3HW.mean((1, 2, 3))


def test_what_is_elsewhere_is_computed_while_images_are_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight questions, one at a time at the server, take their seconds; few are waited for."""
    monkeypatch.setenv(TOKEN, served.TOKEN)
    settings = RewardSettings(kind=f"{__name__}:Slow", role="held_out")
    with served.running({"slow": Slow(settings, served.CPU)}) as url:
        far = f"rewards.slow={{kind: '{settings.kind}', role: held_out, where: '{url}'}}"
        more = ["rollout.batch=1", "sampler.steps=24", "rollout.overlap=true", far]
        recipe = load(
            ROOT / "recipes" / "tiny_flux_gardo.yaml", [*SETS, *more, f"run.folder={tmp_path}"]
        )
        with open_session(recipe, quiet=True) as session:
            train(session)
    for step in step_records(tmp_path / "run"):
        assert step["rows"]["remote"] == 8 and step["rewards"]["slow"]["valid"] == 8
        assert step["seconds"]["remote"] < 0.5 * 8 * QUESTION
