"""`gardo plan` beside real runs: models of published width, from the shipped recipes by --set."""

from pathlib import Path

import pytest

import bench_memory
from bench_memory import CASES
from gardo.config import load
from gardo.planner import geometry
from tests import ROOT


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_shipped_recipe_that_loads(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    recipe = load(ROOT / "recipes" / case.recipe, case.sets(Path(case.model), tmp_path))
    assert recipe.model.base == ("nf4" if name.endswith("nf4") else None)
    assert recipe.train.weights.kind == ("full" if name.endswith("full") else "lora")
    assert geometry(recipe, rank=0, world=bench_memory.RANKS).accumulation in (1, 2)


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_what_is_planned_is_within_a_tenth_of_what_a_run_takes(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    models = tmp_path_factory.getbasetemp() / "real_width"
    models.mkdir(exist_ok=True)
    for row in bench_memory.rows_of(CASES[name], models):
        assert 0.9 <= row["planned_over_measured"] <= 1.1, row
