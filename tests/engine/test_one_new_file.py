"""CONTRIBUTING's table: an algorithm, a reward, a model family and a recipe are one new file each.

The files are put where a contributor's would lie: in a folder that the package's own path names too
"""

import importlib
import sys

import pytest

from gardo import plugins
from gardo.config import full_schema, load
from gardo.phases import publish
from gardo.report.metrics_log import read_metrics
from gardo.session import open_session
from gardo.train import train
from tests import ROOT

NEW = {
    "algorithms": ("calm_ddpo", '''
"""DDPO with its loss halved."""

from typing import Literal

from gardo.algorithms.ddpo import DDPO, DDPOSettings


class CalmSettings(DDPOSettings):
    name: Literal["calm_ddpo"] = "calm_ddpo"


class Calm(DDPO):
    Settings = CalmSettings

    def loss(self, ctx, batch):
        loss, metrics = super().loss(ctx, batch)
        return loss / 2, metrics.mean("calm", (loss / 2).expand(1))


PLUGIN = Calm
'''),
    "rewards": ("brightness", '''
"""How bright a picture is."""

from typing import Literal

from gardo.rewards.base import Reward, RewardSettings


class BrightnessSettings(RewardSettings):
    kind: Literal["brightness"] = "brightness"


class Brightness(Reward):
    Settings = BrightnessSettings

    def score(self, images_B3HW, prompts):
        return images_B3HW.mean((1, 2, 3))


PLUGIN = Brightness
'''),
    "policies": ("flux_slow", '''
"""Flux with its velocity halved."""

from typing import Literal

from gardo.policies.flux import FluxPolicy, FluxSettings


class SlowSettings(FluxSettings):
    family: Literal["flux_slow"] = "flux_slow"


class Slow(FluxPolicy):
    Settings = SlowSettings

    def velocity(self, x, sigma, conditioning):
        return super().velocity(x, sigma, conditioning) / 2


PLUGIN = Slow
'''),
}  # fmt: skip
RECIPE = f"""
model: {{family: flux_slow, path: "builtin:flux", size: [32, 32], text_tokens: 8}}
train: {{weights: {{kind: lora, rank: 2, alpha: 4}}}}
data: {{prompts: {ROOT}/recipes/tiny_prompts.txt, prompts_per_step: 2, images_per_prompt: 2}}
sampler: {{steps: 3, train_steps: 2}}
algorithm:
  name: gardo
  base: {{name: calm_ddpo, beta: 0.1}}
  gate: {{fraction: 0.5, limits: [0.5, 0.5]}}
rewards: {{brightness: {{role: proxy}}, tiny_purity: {{role: auxiliary}}}}
evaluate: {{prompt_count: 1, images_per_prompt: 1, steps: 2}}
distributed: {{engine: local, threads: 1}}
run: {{name: new, steps: 1}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for package, (name, code) in NEW.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / f"{name}.py").write_text(code)
        module = importlib.import_module(f"gardo.{package}")
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(tmp_path / package)])
    (tmp_path / "new.yaml").write_text(RECIPE)
    yield tmp_path
    for package, (name, _) in NEW.items():
        sys.modules.pop(f"gardo.{package}.{name}", None)
        vars(sys.modules[f"gardo.{package}"]).pop(name, None)


def test_a_recipe_of_new_files_trains(folder):
    recipe = load(folder / "new.yaml", [f"run.folder={folder}"])
    with open_session(recipe, quiet=True) as session:
        train(session)
    publish(session)
    (step,) = (r for r in read_metrics(folder / "new/metrics.jsonl") if r["kind"] == "step")
    assert step["metrics"]["calm"] == step["metrics"]["loss"] / 2
    assert 0 < step["rewards"]["brightness"]["mean"] < 1
    assert step["metrics"]["gate_share"] == 0.5
    assert (folder / "new/export/pytorch_lora_weights.safetensors").is_file()


def test_they_are_listed_wherever_names_are(folder):
    schema = str(full_schema())
    for package, (name, _) in NEW.items():
        assert name in plugins.names(f"gardo.{package}")
        assert name in schema
        with pytest.raises(ValueError, match=rf"none of.*{name}"):
            plugins.resolve(f"gardo.{package}", "unheard_of")
