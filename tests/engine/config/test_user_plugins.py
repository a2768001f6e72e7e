"""Plug-ins: a user's own by a dotted path, ours by the name of their file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from gardo import plugins
from gardo.algorithms.base import plugin_of
from gardo.algorithms.flow_grpo import FlowGRPO
from gardo.config import check, dump, load, read_yaml
from gardo.planner import geometry
from gardo.recipe import reward_plugin, reward_settings
from gardo.recipe_text import write_yaml
from tests.engine.config.recipe import refusal, values, written

PLUGINS = """
from typing import Literal
from pydantic import Field
from gardo.algorithms.base import plugin_of
from gardo.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from gardo.rewards.base import Reward, RewardSettings

class MineSettings(FlowGRPOSettings):
    name: Literal["mine"] = "mine"
    strength: float = Field(1.0, gt=0)

class Mine(FlowGRPO):
    Settings = MineSettings

class LengthSettings(RewardSettings):
    longest: int = 20

class Length(Reward):
    Settings = LengthSettings

    def score(self, images_B3HW, prompts):
        return images_B3HW.mean((1, 2, 3))

    @classmethod
    def check_prompt(cls, prompt):
        if "yellow" in prompt:
            raise ValueError(f"prompt {prompt!r} is yellow")
"""


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "gardo_test_plugins.py").write_text(PLUGINS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gardo_test_plugins", raising=False)
    return "gardo_test_plugins"


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_algorithm_by_dotted_path_loads(
    wrapped: bool, users_module: str, tmp_path: Path
) -> None:
    own = {"name": f"{users_module}:Mine", "strength": 2.0}
    section = "algorithm.base" if wrapped else "algorithm"
    path = written(tmp_path, yaml.safe_dump({"algorithm": {"base": own}}))
    if not wrapped:
        recipe = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(recipe | {"algorithm": recipe["algorithm"]["base"]}))
    recipe = load(path)
    settings = recipe.algorithm.base if wrapped else recipe.algorithm
    assert settings.strength == 2.0 and settings.clip_range == 1e-3
    plugin = plugin_of(settings)
    assert plugin.__name__ == "Mine" and issubclass(plugin, FlowGRPO)
    assert geometry(recipe, rank=0, world=2).rows == 144
    assert values(check(read_yaml(dump(recipe), "dump"), "dump")) == values(recipe)
    assert refusal(path, [f"{section}.strenght=1.0"]) == (
        f"--set {section}.strenght: unknown field. Did you mean {section}.strength?"
    )
    assert refusal(path, [f"{section}.strength=0"]) == (
        f"--set {section}.strength: input should be greater than 0"
    )


def test_a_reward_by_dotted_path_loads(users_module: str, tmp_path: Path) -> None:
    (tmp_path / "red.txt").write_text("one red circle\n")
    length = {"role": "proxy", "kind": f"{users_module}:Length", "longest": 7}
    fragment = {"rewards": {"tiny_count": None, "length": length}, "data": {"prompts": "red.txt"}}
    path = written(tmp_path, yaml.safe_dump(fragment))
    recipe = load(path)
    settings = reward_settings(recipe)["length"]
    assert reward_plugin(settings).__name__ == "Length"
    assert (settings.longest, settings.role, settings.weight) == (7, "proxy", 1.0)
    assert values(check(read_yaml(dump(recipe), "dump"), "dump")) == values(recipe)
    assert refusal(path, ["rewards.length.longst=1"]) == (
        "--set rewards.length.longst: unknown field. Did you mean rewards.length.longest?"
    )
    (tmp_path / "red.txt").write_text("one red circle\none yellow circle\n")
    assert refusal(path) == (
        f"{path}: data.prompts: prompt 2: prompt 'one yellow circle' is yellow (rewards.length)"
    )


def test_a_name_that_the_module_lacks_is_explained(users_module: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"algorithm: {{base: {{name: '{users_module}:Nothing'}}}}")
    assert refusal(path) == (
        f"{path}: algorithm.base.name: '{users_module}:Nothing' cannot be imported "
        f"(module '{users_module}' has no attribute 'Nothing')"
    )


BROKEN = {  # a module's text, and what is said of its `Mine`
    "raises": ("1 / 0", "cannot be imported (ZeroDivisionError: division by zero)"),
    "leaves": ("import sys; sys.exit(3)", "cannot be imported (SystemExit: 3)"),
    "is no Python": ("def", "cannot be imported (SyntaxError: "),
    "is no class": ("Mine = 5", "is no plug-in: it has no Settings"),
    "is no reward": (
        "class Mine: Settings = RewardSettings",
        "is no plug-in: Mine is no subclass of gardo.rewards.base.Reward",
    ),
    "settings of its own": (
        "class Mine(Reward):\n    class Settings: pass",
        "is no plug-in: Settings is no subclass of gardo.rewards.base.RewardSettings",
    ),
    "settings that are no class": (
        "class Mine(Reward): Settings = {'role': str}",
        "is no plug-in: dict is no subclass of gardo.rewards.base.RewardSettings",
    ),
    "no score": (
        "class Mine(Reward): Settings = RewardSettings",
        "has no score; give it `def score(self, images_B3HW, prompts)`",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_reward_that_is_broken_is_refused_by_its_name(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, said = BROKEN[case]
    module = f"gardo_test_{case.replace(' ', '_')}"
    imports = "from gardo.rewards.base import Reward, RewardSettings\n"
    (tmp_path / f"{module}.py").write_text(imports + text)
    monkeypatch.syspath_prepend(tmp_path)
    path = written(tmp_path, f"rewards: {{mine: {{kind: '{module}:Mine', role: held_out}}}}")
    message = refusal(path)
    assert message.startswith(f"{path}: rewards.mine.kind: ") and said in message
    assert f"{module}:Mine" in message and "\n" not in message


def test_rewards_may_be_called_as_pydantic_calls_its_own(tmp_path: Path) -> None:
    names = ("model_config", "model_fields", "copy", "json", "schema", "validate", "dict")
    fragment = {"rewards": {n: {"kind": "tiny_shape", "role": "held_out"} for n in names}}
    recipe = load(written(tmp_path, write_yaml(fragment)))
    assert {*names} <= reward_settings(recipe).keys()
    assert values(check(read_yaml(dump(recipe), "dump"), "dump")) == values(recipe)
    path = written(tmp_path, "rewards: {json: {kind: tiny_shape, role: held_out, wieght: 1}}")
    assert refusal(path) == (
        f"{path}: rewards.json.wieght: unknown field. Did you mean rewards.json.weight?"
    )


def test_an_alias_shares_no_settings(tmp_path: Path) -> None:
    """Two rewards of one anchor are what their names say."""
    text = written(tmp_path).read_text()
    path = tmp_path / "recipe.yaml"
    shared = "tiny_shape: &held {role: auxiliary, batch: 7}\n  tiny_purity: *held"
    old = "tiny_shape: {role: auxiliary}\n  tiny_purity: {role: auxiliary}"
    assert old in text
    path.write_text(text.replace(old, shared))
    kinds = {name: s.kind for name, s in reward_settings(load(path)).items()}
    assert kinds["tiny_shape"] == "tiny_shape" and kinds["tiny_purity"] == "tiny_purity"
    batches = reward_settings(load(path, ["rewards.tiny_shape.batch=8"]))
    assert (batches["tiny_shape"].batch, batches["tiny_purity"].batch) == (8, 7)


def test_a_plug_in_is_found_without_importing_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some take seconds to import."""
    package = tmp_path / "gardo_test_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "light.py").write_text("PLUGIN = 'light'\n")
    (package / "heavy.py").write_text("PLUGIN = 'heavy'\n")
    (package / "helper.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.resolve(package.name, "light") == "light"
    assert f"{package.name}.heavy" not in sys.modules
    with pytest.raises(ValueError, match="'helper' is none of heavy, light, nor a dotted path"):
        plugins.resolve(package.name, "helper")
