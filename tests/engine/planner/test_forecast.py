"""What `rollout.gather: auto` is told before a run: the phase that gathering once makes largest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gardo.config import load
from gardo.planner import geometry
from gardo.planner.advice import Change, changed
from gardo.planner.forecast import forecast
from gardo.planner.memory import Counted, Phase
from gardo.planner.shadow import Shadow
from gardo.recipe import Recipe
from tests import ROOT

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def flux() -> tuple[Recipe, Counted]:
    recipe = load(ROOT / "recipes/flux_gardo_hpsv2.yaml", ["distributed.stage=3"], prompts=False)
    return recipe, Counted(Shadow(recipe))


def added(flux: tuple[Recipe, Counted], world: int = 8, **fields: Any) -> tuple[Phase, Any]:
    recipe, counted = flux
    for field, value in fields.items():
        recipe = changed(recipe, Change(field.replace("__", "."), value))
    plan = geometry(recipe, rank=0, world=world)
    return counted.forecast(recipe, plan, world), counted.memory(recipe, plan, world)


def test_it_is_the_plans_largest_phase_that_gathers_once(flux: tuple[Recipe, Counted]) -> None:
    """Text encoders are asked before the weights are whole; slots are made later."""
    phase, memory = added(flux)
    parts = {p.name: p.bytes for p in phase.parts}
    gathering = [p for p in memory.phases if p.name in ("sample", "decode", "teachers", "evaluate")]
    largest = max(gathering, key=lambda p: p.bytes)
    assert parts["gathered weights"] == 2 * flux[1].shadow.parameters
    assert parts["slots"] > 0
    assert (phase.name, phase.bytes) == (largest.name, largest.bytes + parts["slots"])


def test_slots_in_host_memory_take_nothing(flux: tuple[Recipe, Counted]) -> None:
    here, there = added(flux)[0], added(flux, distributed__slots="host")[0]
    assert here.bytes - there.bytes == here.parts[0].bytes > 0


@pytest.mark.parametrize(("offload", "whole"), [("optimizer", False), ("parameters", True)])
def test_a_rank_alone_copies_only_what_waits_elsewhere(
    flux: tuple[Recipe, Counted], offload: str, whole: bool
) -> None:
    _, memory = added(flux, world=1, distributed__offload=offload)
    gathered = {p.bytes > 0 for phase in memory.phases for p in phase.parts
                if p.name == "gathered weights"}  # fmt: skip
    assert gathered == {whole}


def test_a_run_on_gpus_is_told(flux: tuple[Recipe, Counted]) -> None:
    told, (phase, _) = forecast(flux[0], 8, CUDA), added(flux)
    assert (told.bytes, told.why) == (phase.bytes, f"phase {phase.name}")


@pytest.mark.parametrize(
    ("setting", "device", "why"),
    [
        ("run.seed=1", "cpu", "no plan on a cpu"),
        ("run.seed=1", "cuda", "no plan of a built-in model"),
        ("model.path={folder}", "cuda", "no plan: "),
    ],
)
def test_without_a_plan_it_says_so(setting: str, device: str, why: str, tmp_path: Any) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')  # and no more
    tiny = load(ROOT / "recipes/tiny_flux_gardo.yaml", [setting.format(folder=tmp_path)])
    told = forecast(tiny, 2, torch.device(device))
    assert told.bytes == 0
    assert told.why.startswith(why)
