"""The cases that most machines leave out are recipes of this checkout all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from gardo.config import check
from tests.integration import test_gpu
from tests.integration.cases import Case, dumps, loads
from tests.integration.coverings import MATRIX, alone
from tests.integration.faults import FAULTS
from tests.integration.probes import PROBES
from tests.integration.recipes import recipe

ON_GPU = [*test_gpu.FP32, *map(alone, test_gpu.FP32), *test_gpu.BF16, *test_gpu.RESUMED]


def test_cases_travel_as_json() -> None:
    cases = [*ON_GPU, *MATRIX, ON_GPU[0].but(cut=3, fault="stale", kernels="triton")]
    assert loads(dumps(cases)) == cases


@pytest.mark.parametrize("case", ON_GPU, ids=str)
def test_a_case_for_gpus_is_a_recipe(case: Case) -> None:
    made = check(recipe(case, Path("runs")), case.name)
    assert (made.run.name, made.run.steps) == (case.run, case.steps)
    assert case.fault in FAULTS and set(case.probes) <= PROBES.keys()
