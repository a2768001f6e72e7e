"""`gardo selftest reliability`: every case of its table is a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from gardo.selftest.case import Case
from gardo.selftest.reliability import SUBJECTS, chosen, markdown, tried
from gardo.selftest.trial import Trial
from tests import ROOT
from tests.integration import launch  # noqa: F401  ranks are forked from what the tests import

CASES = [case for cases in SUBJECTS.values() for case in cases]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=() if c.quick else pytest.mark.full) for c in CASES],
)
def test_it_holds(case: Case, tmp_path: Path) -> None:
    case.check(Trial(tmp_path))


def test_names_are_one_of_a_kind() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_quick_cases_and_parts_of_names_are_chosen() -> None:
    quick = [case for cases in chosen(quick=True).values() for case in cases]
    assert quick and all(case.quick for case in quick)
    assert len(quick) < len(CASES)
    assert [c.name for cases in chosen(quick=False, only="nan-in").values() for c in cases] == [
        "nan-in-a-row"
    ]


def test_what_does_not_hold_is_said() -> None:
    def check(trial: Trial) -> None:
        raise OSError(f"no room in {trial.folder.name}")

    (outcome,) = tried([Case("room", "nothing", "there is room", check)])
    assert outcome.problem.startswith("OSError: no room in gardo-room-")


def test_the_page_has_the_table() -> None:
    """`gardo selftest reliability --markdown`, between its marks."""
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- cases: begin -->\n")
    assert rest.partition("\n<!-- cases: end -->")[0] == markdown()
