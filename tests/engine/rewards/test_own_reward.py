"""A reward of a user's own is one file: a recipe names it, and a prompt's metadata reaches it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gardo import config, phases, plugins, rewards
from gardo.loading import build_panel
from gardo.recipe_errors import RecipeError
from gardo.rewards.base import Reward
from gardo.rollout import Part, batch_of, recorded_points
from gardo.session import Session, open_session
from gardo.types import Credit

OWN = """
import torch
from gardo.rewards.base import Reward, RewardSettings


class WorthSettings(RewardSettings):
    share: float = 1.0


class Worth(Reward):
    '''The prompt's worth, and a thousandth of the brightness.'''

    Settings = WorthSettings
    differentiable = True

    def score(self, images_B3HW, prompts):
        worth_B = torch.tensor([prompt.metadata["worth"] for prompt in prompts])
        return self.settings.share * worth_B + images_B3HW.mean((1, 2, 3)) / 1000

    @classmethod
    def check_prompt(cls, prompt):
        if "worth" not in prompt.metadata:
            raise ValueError(f"prompt {prompt!r}: no worth; say it in a .jsonl file")


class Told(Reward):
    '''Believes the prompt of a pair, not its images.'''

    Settings = RewardSettings

    def compare(self, first_N3HW, second_N3HW, prompts):
        return torch.tensor([prompt.metadata["worth"] for prompt in prompts])
"""
RECIPE = """
model: {{family: flux, path: "builtin:flux", size: [32, 32], guidance: 3.5, text_tokens: 8}}
train: {{weights: {{kind: lora, rank: 2, alpha: 4}}}}
data: {{prompts: worth.jsonl, prompts_per_step: 3, images_per_prompt: 2}}
sampler: {{steps: 2, train_steps: 1}}
algorithm: {{name: flow_grpo, clip_range: 1.0e-3, beta: 0.0}}
rewards:
  worth: {{kind: "own_reward:Worth", role: proxy, share: 2.0}}
  best: {{kind: preference, role: held_out, judge: {{kind: "own_reward:Worth"}}}}
  told: {{kind: preference, role: held_out, both_orders: false, judge: {{kind: "own_reward:Told"}}}}
evaluate: {{images_per_prompt: 1, steps: 1, batch: 3}}
distributed: {{engine: local}}
run: {{name: own, steps: 1, folder: "{folder}"}}
"""
WORTH = {"one red square": (0.25,), "two blue circles": (0.5, 0.75)}  # one text stands twice


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_reward.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_reward", raising=False)
    lines = [{"prompt": text, "worth": worth} for text in WORTH for worth in WORTH[text]]
    (tmp_path / "worth.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(folder=tmp_path / "runs"))
    return path


@pytest.fixture
def session(recipe: Path) -> Iterator[Session]:
    threads = torch.get_num_threads()
    yield open_session(config.load(recipe, [f"distributed.threads={threads}"]), quiet=True)
    torch.set_num_threads(threads)


def test_metadata_reaches_every_reward(session: Session) -> None:
    """Through the prompts of the step, sampling, the rollout and the panel; judges of groups too.

    The three prompts of the step come twice; of a pair that Told is asked about, the first image
    gets the worth and the second the rest.
    """
    rollout = phases.sampled(session, step=0)
    worth_B = torch.tensor([prompt.metadata["worth"] for prompt in rollout.prompts])
    assert sorted(worth_B.tolist()) == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert all(w in WORTH[text] for text, w in zip(rollout.prompts, worth_B.tolist(), strict=True))
    scores = phases.scored(session, rollout)
    light_B = rollout.images_B3HW.mean((1, 2, 3))
    assert torch.equal(scores.rewards["worth"], 2 * worth_B + light_B / 1000)
    assert torch.equal(scores.proxy_B, scores.rewards["worth"]) and bool(scores.valid_B.all())
    brighter_P1 = light_B.view(3, 2).argmax(1, keepdim=True)
    assert scores.rewards["best"].view(3, 2).gather(1, brighter_P1).tolist() == [[1], [1], [1]]
    for pair, worth in zip(scores.rewards["told"].view(3, 2), worth_B[::2], strict=True):
        assert sorted(pair.tolist()) == sorted([float(worth), 1 - float(worth)])


def test_metadata_reaches_the_gradient(session: Session) -> None:
    """As ReFL scores its predictions: each row by the prompt of its sample."""
    rollout = phases.sampled(session, step=0)
    points = recorded_points(rollout)
    nothing = torch.zeros_like(rollout.sample_B)
    credit = Credit(advantage_B=nothing.float(), gate_B=nothing.bool())
    batch = batch_of(points, credit, Part(torch.arange(len(points.sample_R))), rollout)
    images = rollout.images_B3HW[points.sample_R].clone().requires_grad_()
    value_R = session.ctx.score(images, batch)
    worth_R = torch.tensor([rollout.prompts[int(i)].metadata["worth"] for i in points.sample_R])
    assert torch.equal(value_R.detach(), 2 * worth_R + images.detach().mean((1, 2, 3)) / 1000)
    (gradient,) = torch.autograd.grad(value_R.sum(), images)
    assert torch.allclose(gradient, torch.full_like(gradient, 1 / 3000 / 32 / 32))


def test_metadata_reaches_an_evaluation(session: Session, monkeypatch: Any) -> None:
    encoded: list[list[str]] = []
    encode = session.policy.encode
    monkeypatch.setattr(
        session.policy, "encode", lambda texts: encoded.append(texts) or encode(texts)
    )
    record = session.evaluator(0)
    assert record["prompts"] == ["one red square", "two blue circles", "two blue circles"]
    assert encoded == [["one red square", "two blue circles"]]  # each text once
    worth = record["by_prompt"]["worth"]
    assert worth == pytest.approx([0.5, 1.0, 1.5], abs=1e-3)  # twice, and the brightness
    assert record["by_prompt"]["best"] == pytest.approx([0.25, 0.5, 0.75], abs=1e-3)
    assert "told" not in record["by_prompt"]  # it has nothing to say of one image


def test_prompts_are_checked_with_their_metadata(recipe: Path) -> None:
    (recipe.parent / "worth.jsonl").write_text('{"prompt": "a", "worth": 1}\n{"prompt": "b"}')
    with pytest.raises(RecipeError, match=r"data\.prompts: prompt 2: prompt 'b': no worth"):
        config.load(recipe)


def listed_in_schema() -> set[str]:
    schema = config.full_schema()
    variants = schema["properties"]["rewards"]["additionalProperties"]["anyOf"]
    classes = [schema["$defs"][variant["$ref"].rpartition("/")[2]] for variant in variants]
    return {each["properties"]["kind"]["const"] for each in classes}


def test_built_in_rewards_are_found_by_listing_their_files() -> None:
    names = plugins.names("gardo.rewards")
    assert listed_in_schema() == set(names)
    for name in names:
        plugin = plugins.resolve("gardo.rewards", name)
        assert issubclass(plugin, Reward) and plugin.Settings.model_fields["kind"].default == name


def test_a_new_file_in_the_package_is_all_it_takes(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recipe.parent / "more"
    folder.mkdir()
    named = OWN.replace(
        "    share: float", '    kind: Literal["worth"] = "worth"\n    share: float'
    )
    (folder / "worth.py").write_text(f"from typing import Literal\n{named}\nPLUGIN = Worth\n")
    monkeypatch.setattr(rewards, "__path__", [*rewards.__path__, str(folder)])
    assert "worth" in plugins.names("gardo.rewards") and "worth" in listed_in_schema()
    loaded = config.load(recipe, ["rewards={worth: {role: proxy, share: 3.0}}"])
    score = build_panel(loaded, torch.device("cpu")).rewards["worth"].score
    value_B = score(torch.ones(1, 3, 2, 2), loaded.prompts()[:1])
    assert value_B.tolist() == pytest.approx([3 * 0.25 + 1 / 1000])
    del sys.modules["gardo.rewards.worth"], rewards.worth  # the next test has its own package again


def test_its_settings_are_as_strict_as_any(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"Did you mean rewards\.worth\.share\?"):
        config.load(recipe, ["rewards.worth.shrae=1.0"])
