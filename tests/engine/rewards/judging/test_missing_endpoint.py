"""A judge's endpoint that is not there, or cannot do what the judge needs: known before a load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from gardo.cli import app
from gardo.config import load, reward_sections
from gardo.recipe_errors import RecipeError
from gardo.rewards.assembly import meet_endpoints, reach_endpoints
from gardo.session import open_session
from gardo.types import Prompt
from tests import ROOT
from tests.engine.rewards.judging.endpoint import QUICK, Endpoint
from tests.engine.rewards.serving.served import SIZE, free_port
from tests.integration.cases import Case
from tests.integration.recipes import recipe

CASE = Case("gardo", "lora", "local")
DEMO = ROOT / "recipes/tiny_flux_gardo.yaml"
ASKED = {"prompt": Prompt("p"), "size": SIZE}


def nowhere() -> str:
    return f"openai:http://127.0.0.1:{free_port()}/v1"


def judges(where: str, kind: str = "vlm") -> dict[str, Any]:
    """As a reward, and inside of a preference."""
    asked = {"where": where, "model": "a/model", "calls": QUICK}
    pair = {"kind": "unifiedreward_pair", **asked}
    return {
        "grade": {"kind": kind, "role": "auxiliary", **asked},
        "better": {"kind": "preference", "role": "auxiliary", "judge": pair},
    }


@pytest.mark.parametrize(("name", "field"), [("grade", "grade"), ("better", "better.judge")])
@pytest.mark.parametrize("ask", [reach_endpoints, lambda its: meet_endpoints(its, **ASKED)])
def test_what_is_not_there_is_named_with_what_to_start(ask, name: str, field: str) -> None:
    where = nowhere()
    rewards = reward_sections({name: judges(where)[name]}, "a test")
    with pytest.raises(ValueError) as refused:
        ask(rewards)
    said, url = str(refused.value), where.removeprefix("openai:")
    port = url.split(":")[-1].removesuffix("/v1")
    assert said.startswith(f"rewards.{field}.where: {url}: ConnectError ")
    assert f"start what serves a/model there, e.g. `vllm serve a/model --port {port}`" in said


def test_one_without_a_list_of_models_is_asked_all_the_same(endpoint: Endpoint) -> None:
    rewards = reward_sections(judges(endpoint.where), "a test")
    reach_endpoints(rewards)
    meet_endpoints(rewards, **ASKED)
    assert len(endpoint.bodies) == 2, "a question of each"


def test_what_it_cannot_do_is_known_too(endpoint: Endpoint) -> None:
    endpoint.logprobs = False
    rewards = reward_sections(judges(endpoint.where, "yes_no"), "a test")
    with pytest.raises(ValueError, match=r"^rewards.grade.where: .* answers without logprobs"):
        meet_endpoints(rewards, **ASKED)


def test_training_is_refused_by_the_command(tmp_path: Path) -> None:
    where = nowhere()
    said = f'{{kind: vlm, role: held_out, where: "{where}", model: m}}'
    done = CliRunner().invoke(
        app, ["train", str(DEMO), "--set", f"rewards.grade={said}",
              "--set", f"run.folder={tmp_path / 'runs'}"]
    )  # fmt: skip
    assert done.exit_code == 2 and not (tmp_path / "runs").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{DEMO}: rewards.grade.where: {where.removeprefix('openai:')}: ")


@pytest.mark.parametrize("answers", [False, True])
def test_a_rank_is_refused_before_a_model_loads_and_leaves_nothing(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """Also where it was started without the command; and the next start is not in its way."""
    made = recipe(CASE, tmp_path)
    endpoint.logprobs = False
    made["rewards"]["grade"] = judges(endpoint.where if answers else nowhere(), "yes_no")["grade"]
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(made))
    asked = load(str(file))
    monkeypatch.setattr("gardo.session.load_models", lambda *_: pytest.fail("it loads"))
    threads = torch.get_num_threads()
    try:
        with pytest.raises(RecipeError, match=f"{file}: rewards.grade.where: "):
            open_session(asked, source=str(file), quiet=True)
    finally:
        torch.set_num_threads(threads)
    assert not asked.run_folder.exists()
