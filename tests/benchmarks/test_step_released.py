"""The released procedure, restated: that it is theirs, and where its arithmetic is ours too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gardo.algorithms.base import build
from gardo.config import load
from gardo.loading import build_policy
from gardo.recipe import Recipe
from gardo.rewards.base import Gathering
from gardo.session import world_of
from gardo.types import Scores
from step import models, released
from step.released_credit import Controller, gated, group_advantages, rows_kept, zero_std_ratio
from step.released_families import same_noise
from step.released_setup import held, prepare
from tests import ROOT

CPU = torch.device("cpu")
STEP = ROOT / "benchmarks/step"
SMALL = ("sampler.steps=3", "sampler.train_steps=2", "data.images_per_prompt=2",
         "train.micro_batch=5", "rollout.batch=5", "train.updates_per_step=2",
         "train.optimizer.lr=1e-3", "algorithm.base.kl_micro_batch=5")  # fmt: skip
SAMPLES, STEPS, TRAINED = 10, 3, 2


def recipe_of(family: str, *sets: str) -> Recipe:
    return load(STEP / f"{family}.yaml", [*SMALL, *sets])


@pytest.fixture(scope="module", params=["flux", "sd3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def run(family: str) -> Iterator[tuple[released.Released, list[dict[str, Any]]]]:
    """Two iterations of the step benchmark's recipe, on the built-in model."""
    recipe = recipe_of(family)
    loaded = prepare(recipe, engine="local", batch=5, accumulation=TRAINED)
    procedure = released.Released(recipe, loaded, 5)
    yield procedure, [procedure.iterate(epoch) for epoch in range(2)]
    procedure.executor.shutdown()


# ---- an iteration --------------------------------------------------------------------------------


def test_the_phases_are_all_of_an_iteration(run) -> None:
    for record in run[1]:
        phases = {"encode", "sample", "decode", "reward", "train", "teachers", "other"}
        assert set(record["seconds"]) == phases and min(record["seconds"].values()) > 0


def test_the_reference_runs_on_every_row_that_trains_and_one_step_at_a_time(run, family) -> None:
    guided = 2 if family == "sd3" else 1
    kept = 6 if family == "sd3" else SAMPLES  # two of five groups tie, and only SD3 skips them
    for record in run[1]:
        assert record["trained_rows"] == kept * TRAINED
        assert record["rows"] == {
            "decode": SAMPLES,
            "sample": guided * SAMPLES * STEPS,
            "train": guided * kept * TRAINED,
            "teachers": guided * kept * TRAINED,
        }
        assert record["calls"] == {"decode": 2, "sample": 2 * STEPS, "train": 2 * TRAINED,
                                   "teachers": 2 * TRAINED}  # fmt: skip
        assert record["gated_rows"] in (0, TRAINED)  # one sample, or none where the highest tie
        assert record["zero_std_ratio"] == (0.4 if family == "sd3" else 0.0)
        assert record["zero_advantage_rows"] == 0


def test_the_ratio_is_1_until_the_first_update_of_an_iteration_and_not_after_it(run) -> None:
    for record in run[1]:
        before, after = record["ratio_error"]
        assert before < 1e-5 < after
    assert run[1][0]["kl_loss"][0] == 0.0  # the reference is the policy


def test_flux_resets_at_the_start_and_both_when_the_reference_is_old(run, family) -> None:
    procedure, records = run
    assert [record["reset"] for record in records] == [family == "flux", False]
    pairs = list(zip(procedure.loaded.trained, procedure.loaded.old, strict=True))
    assert not procedure.reset_if_due(15)
    assert any(not torch.equal(held(new), held(old)) for new, old in pairs)
    assert procedure.reset_if_due(16)
    assert all(torch.equal(held(new), held(old)) for new, old in pairs)
    assert not procedure.reset_if_due(31) and procedure.reset_if_due(32)


# ---- where the arithmetic is ours too ------------------------------------------------------------


def test_the_adapter_starts_and_the_model_answers_as_ours(family) -> None:
    recipe = recipe_of(family)
    policy = build_policy(recipe, CPU)
    policy.load_transformer()
    loaded = prepare(recipe, engine="local", batch=5, accumulation=1)
    ours = list(policy.trainable().values())
    assert len(ours) == len(loaded.trained)
    for own, theirs in zip(ours, loaded.trained, strict=True):
        assert torch.equal(own, theirs)
    for parameter in ours:  # an adapter that says something
        parameter.data.copy_(torch.randn(parameter.shape))
    for own, theirs in zip(ours, loaded.trained, strict=True):
        theirs.data.copy_(own)

    prompts = recipe.prompts()[:3]
    samples = loaded.family.sample(loaded.family.encode(prompts), None)
    sigmas = recipe.sampler.sigmas(policy.sigmas)
    torch.testing.assert_close(loaded.family.schedule.sigmas_T.double(), sigmas, rtol=0, atol=1e-6)
    told = loaded.family.conditioned(samples)
    conditioning = policy.encode(prompts)
    for j in range(TRAINED):
        sigma_R = samples["timesteps"][:, j] / 1000
        torch.testing.assert_close(
            loaded.family.training_velocity(loaded.transformer, told, j),
            policy.velocity(samples["latents"][:, j], sigma_R, conditioning),
            rtol=1e-4,
            atol=1e-4,
        )
    torch.testing.assert_close(
        loaded.family.decode(samples["latents"][:, -1]),
        policy.decode(samples["latents"][:, -1]),
        rtol=0,
        atol=1e-5,
    )


def test_the_credit_is_that_of_the_preset_official_code() -> None:
    recipe = recipe_of("flux")
    generator = torch.Generator().manual_seed(3)
    group_N = torch.arange(40) // 8
    proxy_N, contrast_N = torch.rand(2, 40, generator=generator)
    features_ND = torch.randn(40, 6, generator=generator)
    rewards = {"bright": proxy_N, "contrast": contrast_N}
    scores = Scores(
        sample_B=torch.arange(40),
        group_B=group_N,
        proxy_B=proxy_N,
        valid_B=torch.ones(40, dtype=torch.bool),
        rewards=rewards,
        auxiliaries=("contrast",),
        features_BD=features_ND,
    )
    algorithm = build(recipe.algorithm, world_of(recipe, build_policy(recipe, CPU)))
    credit = algorithm.credit(algorithm.measured(scores))
    prompts = [f"prompt {group}" for group in group_N.tolist()]
    advantages = group_advantages(
        prompts, proxy_N[:, None].repeat(1, 3).numpy(), features_ND.numpy()
    )
    assert advantages.shape == (40, 3)
    np.testing.assert_allclose(advantages[:, 1], credit.advantage_B, rtol=1e-4, atol=1e-6)
    gate = recipe.algorithm.gate
    controller = Controller(gate.fraction, gate.limits)
    theirs = gated({n: v.numpy() for n, v in rewards.items()}, "bright", ["contrast"], controller)
    assert theirs[credit.gate_B].all()
    assert int(credit.gate_B.sum()) <= int(theirs.sum()) <= int(credit.gate_B.sum()) + 1
    assert zero_std_ratio(prompts, np.where(group_N == 2, 1.0, proxy_N)) == 0.2


def test_the_fraction_moves_when_the_statistic_leaves_what_was_seen() -> None:
    controller = Controller(0.1, (0.02, 0.12))
    for statistic, fraction in (
        (5.0, 0.1),
        (5.0, 0.1),
        (6.0, 0.11),
        (5.5, 0.11),
        (7.0, 0.12),
        (4.0, 0.108),
    ):
        controller.update(statistic)
        assert controller.fraction == pytest.approx(fraction)


# ---- details -------------------------------------------------------------------------------------


def test_rows_without_an_advantage_are_left_out_but_for_as_many_as_the_batches_need() -> None:
    advantages_BT = torch.zeros(12, 2)
    advantages_BT[[1, 4, 5]] = 1.0
    for batches, kept in ((3, 3), (2, 4), (4, 4), (6, 6)):
        kept_B = rows_kept(advantages_BT, batches)
        assert kept_B[[1, 4, 5]].all() and int(kept_B.sum()) == kept


def test_samples_of_a_prompt_start_alike() -> None:
    first, second, third = (torch.randn(3, generator=g) for g in same_noise(["a", "b", "a"], 7))
    assert torch.equal(first, third) and not torch.equal(first, second)


def test_a_share_of_the_groups_ties() -> None:
    settings = models.TiedToneSettings(kind="step.models:TiedTone", role="proxy", share=0.4)
    group_B = torch.arange(10).repeat_interleave(3)
    place = Gathering(torch.arange(30), group_B, 0, 0, lambda tensor: tensor)
    images = torch.rand(30, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    values = models.TiedTone(settings, CPU).score_together(images, [], place).view(10, 3)
    assert int((values.std(1) == 0).sum()) == 4


def test_flops_say_what_skipping_saves(family) -> None:
    recipe = recipe_of(family)
    cost = models.flops(recipe)
    assert 1.5 < cost.training / cost.forward < 3
    predicted = models.predicted(recipe, cost, kept=0.6, gated=0.1)
    rows = SAMPLES * TRAINED
    assert predicted["sampling"] == SAMPLES * STEPS * cost.forward
    skipped = 0.4 * rows * cost.training if family == "flux" else 0.0
    unasked = (0.9 if family == "flux" else 0.5) * rows * cost.forward
    assert predicted["released"] - predicted["least"] == pytest.approx(skipped + unasked)


def test_the_models_have_20_million_parameters_and_the_recipes_load_with_them(
    family, tmp_path
) -> None:
    folder = models.make(family, tmp_path / family)
    policy = build_policy(load(STEP / f"{family}.yaml", [f"model.path={folder}"]), CPU)
    assert 18e6 < sum(p.numel() for p in policy.transformer.parameters()) < 60e6


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("algorithm.base.advantage={scale: 2}", "algorithm.base.advantage"),
        ("algorithm.diversity=null", "algorithm"),
        ("algorithm.base.kl=gaussian", "algorithm.base.kl"),
        ("algorithm={name: flow_grpo, beta: 0.01}", "algorithm"),
        ("rewards.more={kind: 'real_width:Tone', role: proxy}", "rewards"),
        ("sampler.sde=cps", "sampler.sde"),
        ("train.weights={kind: full}", "train.weights"),
        ("data.prompts_per_step=4", "--batch 5"),
    ],
)
def test_what_the_release_has_not_is_refused_before_anything_loads(
    setting, field, tmp_path, capsys
) -> None:
    arguments = [str(STEP / "flux.yaml"), "--out", str(tmp_path / "out.json")]
    sets = [*SMALL, "train.micro_batch=2", setting]
    assert released.main([*arguments, *(a for s in sets for a in ("--set", s))]) == 2
    assert f"flux.yaml: {field}" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.full
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_what_one_process_trains(stage, tmp_path) -> None:
    def losses(*arguments: str) -> list[float]:
        out = tmp_path / "out.json"
        folders = [str(ROOT / name) for name in ("benchmarks", "engine", "kernels")]
        small = (*SMALL, f"distributed.stage={stage}", "distributed.threads=1")
        sets = [a for s in small for a in ("--set", s)]
        subprocess.run(
            [sys.executable, "-m", "step.released", str(STEP / "flux.yaml"), *sets, *arguments,
             "--iterations", "2", "--out", str(out)],
            check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
        return [loss for it in json.loads(out.read_text())["iterations"] for loss in it["loss"]]

    assert losses("--engine", "zero") == pytest.approx(
        losses("--engine", "local"), rel=1e-2, abs=1e-6
    )
