"""Judges whose model is in this process, tiny random Qwen2-VL and Qwen2.5-VL; and in a worker."""

from __future__ import annotations

import pytest
import torch

from gardo.config import reward_sections
from gardo.planner.scorers import scorer
from gardo.recipe_errors import RecipeError
from gardo.rewards.assembly import ScoringSettings, Workers, assemble, load_rewards
from gardo.rewards.base import provides
from gardo.types import Prompt
from tests.engine.rewards import vlm_models
from tests.engine.rewards.serving.served import CPU, SIZE, pictures, remote, running

PROMPTS = [Prompt("one red square"), Prompt("two blue circles"), Prompt("one red square")]
EXACT = {"dtype": "float32", "least": 0.0}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def folder(request, tmp_path_factory):
    """Whose vocabulary has the words that are asked for."""
    levels = "excellent good fair poor bad, excellent good fair poor bad"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm_models, "CORPUS", [levels, *vlm_models.CORPUS])
        return vlm_models.save(tmp_path_factory.mktemp("judge"), request.param)


def judge(kind: str, path: str, **settings):
    section = {"kind": kind, "path": path, **EXACT, **settings}
    if kind.startswith("unified"):
        section.pop("least")
    if kind.endswith("_pair"):
        section = {"kind": "preference", "judge": section}
    made = reward_sections({"judge": {**section, "role": "held_out"}}, "a test")
    found = load_rewards(made, CPU)["judge"]
    return found.reward if kind.endswith("_pair") else found


def ask(its, images):
    if provides(type(its), "compare"):
        return its.compare(images, images.roll(-1, 0), PROMPTS)
    return its.score(images, PROMPTS)


@pytest.mark.parametrize("kind", ["yes_no", "deqa", "yes_no_pair"])
def test_a_value_is_of_the_models_probabilities(folder, kind):
    its, images = judge(kind, folder), pictures(3, side=56)
    value = ask(its, images)
    shown = (images * 255).round().byte()
    asked = [[shown[i]] if its.asks == 1 else [shown[i], shown[(i + 1) % 3]] for i in range(3)]
    said = its.voice.begin([its.question(p, t) for p, t in zip(asked, PROMPTS, strict=True)])()
    for found, answer in zip(value.tolist(), said, strict=True):
        weights = its.reader.values
        mass = sum(answer.chances[word] for word in weights)
        mean = sum(weights[word] * answer.chances[word] for word in weights) / mass
        assert found == pytest.approx(mean, rel=1e-4) and mass > 0
    assert len(set(value.tolist())) == 3, "pictures matter"
    costs = its.costs()
    assert costs["questions"] == 3 and costs["prompt_tokens"] > 200 and costs["seconds"] > 0


def test_another_order_is_another_question(folder):
    its, images = judge("yes_no_pair", folder), pictures(3, side=56)
    ahead = its.compare(images, images.roll(-1, 0), PROMPTS)
    behind = its.compare(images.roll(-1, 0), images, PROMPTS)
    assert not torch.allclose(ahead, 1 - behind), "which is why preference asks both"


def test_what_a_random_model_writes_is_unreadable(folder):
    its = judge("unifiedreward", folder, max_tokens=3)
    assert ask(its, pictures(3, side=56)).isnan().all()
    costs = its.costs()
    assert costs["unreadable"] == 3 and costs["unanswered"] == 0
    assert 3 <= costs["completion_tokens"] <= 9 and "cut off at max_tokens" in its.trouble


def test_an_answer_that_ended_is_not_cut(folder):
    its = judge("unifiedreward", folder, max_tokens=3)
    voice = its.voice
    (answer,) = voice.begin([its.question([torch.zeros(3, 56, 56).byte()], PROMPTS[0])])()
    voice.stops = [*range(len(voice.words.tokenizer))]  # whatever it says first ends it
    row = voice._row(its.question([torch.zeros(3, 56, 56).byte()], PROMPTS[0]))
    ended = voice._spoken(row, [voice.stops[5], 7, 7])
    assert answer.cut and answer.completion_tokens == 3
    assert not ended.cut and ended.completion_tokens == 1


def test_a_judge_that_is_not_sure_is_masked(folder):
    its = judge("yes_no", folder, least=0.9)
    assert ask(its, pictures(3, side=56)).isnan().all() and "together" in its.trouble


def test_in_a_worker_it_says_the_same_bits(folder):
    here = judge("yes_no", folder)
    images = pictures(3)
    sections = {"judge": {"kind": "yes_no", "role": "held_out", "path": folder, "where": "worker",
                          "calls": {"deadline": 60}, **EXACT}}  # fmt: skip
    settings, scoring = reward_sections(sections, "a test"), ScoringSettings()
    workers = Workers.start(settings, scoring)
    try:
        panel = assemble(
            settings, scoring, CPU, workers.addresses(), prompt=PROMPTS[0], size=SIZE
        )  # fmt: skip
        assert set(panel.costs()["judge"].values()) == {0}, "meeting it is not counted"
        value = panel.rewards["judge"].score(images, PROMPTS)
        costs = panel.costs()["judge"]
        panel.close()
    finally:
        workers.close()
    assert torch.equal(value, here.score(images, PROMPTS))
    same = here.costs()
    for name in ("questions", "prompt_tokens", "completion_tokens", "unreadable"):
        assert costs[name] == same[name]
    assert costs["seconds"] > 0 and costs["longest"] > 0


def test_the_plan_counts_its_model(folder):
    its, pairs = judge("yes_no", folder), judge("yes_no_pair", folder)
    said = scorer(its.settings)
    assert said.weights == sum(p.nbytes for p in its.voice.model.parameters())
    shown = scorer(pairs.settings)
    assert said.activations < shown.activations and shown.towers == said.towers


def test_behind_a_server_it_says_why_it_has_no_value(folder):
    with running({"judge": judge("yes_no", folder, least=0.9)}) as url:
        its = remote(url, "judge", section={"kind": "yes_no", "path": folder})
        assert its.score(pictures(3, side=56), PROMPTS).isnan().all() and "together" in its.trouble
        assert its.costs()["unreadable"] == 3 and its.costs()["unreadable"] == 0
        its.close()


def test_another_model_is_refused_with_what_to_do(tmp_path):
    from tests.engine.rewards.clip_models import save_clip

    save_clip(tmp_path / "clip")
    with pytest.raises((ValueError, RecipeError), match=r"type 'clip'.*where: openai:URL"):
        judge("yes_no", str(tmp_path / "clip"))
