"""Pref-GRPO inside GARDO on two ZeRO-3 ranks, with judges at a live endpoint.

The endpoint is a stand-in that judges by brightness (tests/engine/rewards/judging/endpoint.py): the
same verdicts computed in the ranks must train the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_file

from gardo.config import load
from gardo.report.metrics_log import step_records
from gardo.session import open_session
from gardo.train import train
from tests import ROOT
from tests.engine.rewards import vlm_models
from tests.engine.rewards.judging.endpoint import Endpoint, serving
from tests.integration.cases import Case
from tests.integration.launch import Launched, type_command
from tests.integration.recipes import recipe

CASE = Case("gardo", "lora", "stage3")
STEPS, IMAGES, GROUP = 2, 8, 4
QUESTIONS = IMAGES * (GROUP - 1)  # each image is shown first against each other of its group
CALLS = {"deadline": 20.0, "attempt": 5.0, "retries": 1, "first_pause": 0.05, "breaker": 1000}


def train_judged(file: Path) -> None:
    with open_session(load(str(file)), quiet=True) as session:
        train(session)


def run(folder: Path, name: str, rewards: dict[str, Any], **sections: Any) -> list[dict[str, Any]]:
    """The records of the iterations, on two ranks."""
    made = recipe(CASE, folder)
    made["rewards"] = {**rewards, "dinov3": made["rewards"]["dinov3"]}
    made["run"] |= {"name": name, "steps": STEPS}
    for section, values in sections.items():
        made[section] = {**made.get(section, {}), **values}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(made))
    Launched(2, train_judged, file).wait()
    return list(step_records(folder / name))


def preferred(judge: dict[str, Any]) -> dict[str, Any]:
    return {"preferred": {"kind": "preference", "role": "proxy", "judge": judge}}


def asking(endpoint: Endpoint, kind: str, **settings: Any) -> dict[str, Any]:
    return {"kind": kind, "where": endpoint.where, "model": "m", "calls": CALLS, **settings}


PURITY = {"tiny_purity": {"role": "auxiliary"}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("judges")
    here = {"kind": "tests.integration.pair_judge:Brightest"}
    found = {"here": run(folder, "here", {**preferred(here), **PURITY})}
    with serving() as endpoint:
        judge = asking(endpoint, "unifiedreward_pair", form="think")
        found["live"] = run(folder, "live", {**preferred(judge), **PURITY})
        endpoint.bodies.clear()
    with serving() as endpoint:
        endpoint.every = 6  # of its questions has a foolish answer
        every = {
            **preferred(asking(endpoint, "unifiedreward_pair", form="2.0")),
            "good": asking(endpoint, "yes_no", role="auxiliary"),
            "quality": asking(endpoint, "deqa", role="held_out"),
        }
        found["foolish"] = run(folder, "foolish", every, scoring={"max_failed": 0.9})
    return found


def test_a_live_judge_trains_the_bits_of_its_verdicts(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    assert len(runs["live"]) == STEPS
    for here, live in zip(runs["here"], runs["live"], strict=True):
        assert here["rewards"] == live["rewards"]
        assert here["metrics"] == live["metrics"]
        assert live["rewards"]["preferred"]["std"] > 0


def test_what_it_took_is_in_the_record_over_both_ranks(
    runs: dict[str, list[dict[str, Any]]],
) -> None:
    for record in runs["live"]:
        its = record["judges"]["preferred"]
        assert its["questions"] == QUESTIONS and its["unanswered"] == its["unreadable"] == 0
        assert its["prompt_tokens"] == 100 * (QUESTIONS - its["known"])
        assert 0 < its["longest"] <= its["seconds"]
    assert all("judges" not in record for record in runs["here"])


def test_foolish_answers_are_masked_and_counted(runs: dict[str, list[dict[str, Any]]]) -> None:
    """A pair without an answer does not count; a picture without a value is masked."""
    assert len(runs["foolish"]) == STEPS
    total = dict.fromkeys(("preferred", "good", "quality"), 0.0)
    for record in runs["foolish"]:
        judges, rewards = record["judges"], record["rewards"]
        for name in total:
            total[name] += judges[name]["unreadable"]
            assert judges[name]["unanswered"] == 0
        for name in ("good", "quality"):
            assert judges[name]["questions"] == IMAGES
            assert rewards[name]["valid"] == IMAGES - judges[name]["unreadable"]
        assert judges["preferred"]["questions"] == QUESTIONS
        assert "skipped_updates" not in record["metrics"]
    assert all(total.values())


def test_hpsv3_in_the_ranks_and_a_live_judge_through_the_launcher(tmp_path: Path) -> None:
    """As a user types it: deepspeed, two ranks, the tiny Flux, Pref-GRPO inside GARDO."""
    folder = tmp_path / "hpsv3"
    vlm_models.save(folder, "qwen2_vl")
    save_file(vlm_models.hpsv3_weights(folder), folder / "HPSv3.safetensors")
    its = f"path: {folder}, base: {folder}, dtype: float32"
    with serving() as endpoint:
        judge = f"{{kind: unifiedreward_pair, where: '{endpoint.where}', model: m}}"
        done = type_command(
            2, tmp_path,
            f"rewards.count={{kind: preference, role: proxy, judge: {judge}}}",
            f"rewards.hpsv3={{role: auxiliary, {its}}}",
            "rewards.tiny_shape=null", "rewards.tiny_fidelity=null", "run.steps=2",
            recipe=ROOT / "recipes" / "tiny_flux_pref.yaml",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert len(endpoint.bodies) > 2 * QUESTIONS
    records = list(step_records(tmp_path / "tiny-flux-pref"))
    assert len(records) == 2
    for record in records:
        assert record["rewards"]["count"]["valid"] == record["rewards"]["hpsv3"]["valid"] == 8
        assert record["rewards"]["hpsv3"]["std"] > 0
        assert record["judges"]["count"]["questions"] == QUESTIONS
