"""The algorithm that the documentation shows how to write, as a user would run it."""

import math
import re
import sys

import pytest
import torch

from gardo.config import load
from gardo.recipe_errors import RecipeError
from gardo.report.metrics_log import read_metrics
from gardo.session import open_session
from gardo.train import train
from tests import ROOT

PAGE = (ROOT / "docs/algorithms.md").read_text()
CODE, RECIPE = re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE, re.DOTALL)

SMALL = f"""
model: {{family: flux, path: "builtin:flux", size: [32, 32], text_tokens: 8}}
train: {{weights: {{kind: lora, rank: 2, alpha: 4}}, optimizer: {{lr: 1.0e-3}}}}
data: {{prompts: {ROOT}/recipes/tiny_prompts.txt, prompts_per_step: 2, images_per_prompt: 2}}
sampler: {{steps: 3, train_steps: 2}}
rewards: {{tiny_shape: {{role: proxy}}}}
evaluate: {{prompt_count: 1, images_per_prompt: 1, steps: 2}}
distributed: {{engine: local, threads: 1}}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    (tmp_path / "weighted.py").write_text(CODE)
    run = f"run: {{name: own, steps: 1, folder: {tmp_path}}}\n"
    (tmp_path / "own.yaml").write_text(SMALL + RECIPE + run)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "own.yaml"
    sys.modules.pop("weighted", None)


def test_one_iteration_of_the_documented_algorithm(recipe):
    checked = load(recipe)
    assert checked.algorithm.temperature == 0.5
    with open_session(checked, source=str(recipe), quiet=True) as session:
        assert type(session.algorithm).__name__ == "Weighted"
        before = [p.detach().clone() for p in session.policy.trainable().values()]
        train(session)
        after = list(session.policy.trainable().values())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    (step,) = (r for r in read_metrics(recipe.parent / "own/metrics.jsonl") if r["kind"] == "step")
    # Advantages of two images have opposite signs: weights e^(A / .5), 1 where they are 0.
    assert step["metrics"]["weight"] > 1 and step["metrics"]["grad_norm"] > 0
    assert math.isfinite(step["metrics"]["loss"])


def test_its_settings_are_checked(recipe):
    for override, said in (
        ("algorithm.temprature=2", "Did you mean algorithm.temperature?"),
        ("algorithm.temperature=0", "greater than 0"),
        ("sampler.train_steps=4", "--set sampler.train_steps: at most 3"),
        ("algorithm.name=weighted:Wieghted", "cannot be imported"),
    ):
        with pytest.raises(RecipeError, match=re.escape(said)):
            load(recipe, [override])
