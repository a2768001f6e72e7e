"""Pref-GRPO's reward in recipes: its judge's settings and prompts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gardo import plugins
from gardo.config import check
from gardo.recipe import Recipe, reward_plugin, reward_settings
from gardo.recipe_errors import RecipeError
from gardo.rewards.preference import Preference
from tests import ROOT
from tests.engine.rewards.pair_judges import (
    CPU,
    KIND,
    preference,
)


def recipe(reward: dict[str, Any], **data: int) -> Recipe:
    sections = yaml.safe_load((ROOT / "recipes/tiny_flux_pref.yaml").read_text())
    sections["data"]["prompts"] = str(ROOT / "recipes/tiny_prompts.txt")
    sections["data"] |= data
    sections["rewards"]["count"] = {"kind": "preference", "role": "proxy", **reward}
    return check(sections, "r")


def test_a_judge_has_its_own_settings() -> None:
    made = recipe({"judge": {"kind": "tiny_shape", "floor": -2.0}, "opponents": 4})
    settings: Any = reward_settings(made)["count"]
    assert settings.judge.floor == -2.0 and settings.judge.role == "judge"
    reward = reward_plugin(settings)(settings, CPU)
    assert type(reward.reward) is plugins.resolve("gardo.rewards", "tiny_shape")


SHAPE = {"kind": "tiny_shape"}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, int], str, str]] = {
    "no judge": ({}, {}, "judge.kind: missing", "tiny_shape"),
    "unknown judge": ({"judge": {"kind": "tiny_shpae"}}, {}, "judge.kind: 'tiny_shpae' is none of",
                      "tiny_shape"),
    "unknown field": ({"judge": {"kind": "tiny_shape", "flor": -2.0}}, {}, "judge.flor: unknown",
                      "Did you mean rewards.count.judge.floor?"),
    "role of a judge": ({"judge": {**SHAPE, "role": "proxy"}}, {}, "judge.role: 'proxy'",
                        "'judge'"),
    "preference in preference": ({"judge": {"kind": "preference", "judge": SHAPE}}, {},
                                 "judge.kind: preference judges groups",
                                 "name the judge of images itself"),
    "features": ({"judge": {"kind": "dinov3", "path": "builtin:dinov3"}}, {},
                 "judge.kind: dinov3 gives features", "name a reward that scores images"),
    "neither": ({"judge": {"kind": f"{KIND}:Neither"}}, {}, "judge.kind: ",
                "has neither `compare` nor `score`; write one of them"),
    "a pair judge alone": ({"kind": f"{KIND}:Duel"}, {}, "kind: ",
                           "use kind: preference with judge: {kind: "),
    "margin of a pair judge": ({"judge": {"kind": f"{KIND}:Duel"}, "tie_margin": 0.1}, {},
                               "tie_margin: 0.1", "leave it out"),
    "too many opponents": ({"judge": SHAPE, "opponents": 12}, {},
                           "opponents: 12: a group of 12 has 11 others", "use at most 11"),
    "odd ring": ({"judge": SHAPE, "opponents": 3}, {"images_per_prompt": 9},
                 "opponents: 3: not every one of 9", "use 4"),
    "as features": ({"judge": SHAPE, "role": "features"}, {}, "role: 'features'", "'proxy'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_explained(case: str) -> None:
    reward, data, field, mend = REFUSED[case]
    with pytest.raises(RecipeError) as raised:
        recipe(reward, **data)
    message = str(raised.value)
    assert message.startswith(f"r: rewards.count.{field}") and mend in message, message


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind: preference compares .* is 1; use at least 2"):
        Preference.check(preference("Level").settings, 1)


def test_algorithms_that_need_a_gradient_refuse_it() -> None:
    sections = yaml.safe_load((ROOT / "recipes/tiny_flux_refl.yaml").read_text())
    sections["rewards"]["pref"] = {"kind": "preference", "role": "proxy", "judge": SHAPE}
    with pytest.raises(RecipeError, match=r"rewards\.pref: preference has no gradient"):
        check(sections, "r")


def test_prompts_are_checked_by_the_judge(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a house by the sea\n")
    sections = yaml.safe_load((ROOT / "recipes/tiny_flux_pref.yaml").read_text())
    sections["data"]["prompts"] = str(tmp_path / "prompts.txt")
    sections["rewards"] = {
        "pref": {"kind": "preference", "role": "proxy", "judge": SHAPE},
        "again": {"kind": f"{KIND}:Level", "role": "auxiliary"},
        "dinov3": sections["rewards"]["dinov3"],
    }
    with pytest.raises(RecipeError, match=r"prompt 1: .*\(rewards\.pref\.judge\)"):
        check(sections, "r")
