"""The cases of all subjects, run in turn; their table, for a terminal and docs/reliability.md."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gardo.selftest import disk, ending, numbers, ownership, recipes, resuming
from gardo.selftest.case import Case
from gardo.selftest.trial import Trial

SUBJECTS = {
    "Numbers that are not finite": numbers.CASES,
    "The disk and the terminal": disk.CASES,
    "Resuming": resuming.CASES,
    "Two runs of one name": ownership.CASES,
    "Ending": ending.CASES,
    "Recipes": recipes.CASES,
}


@dataclass(frozen=True)
class Outcome:
    """How a case went: `problem` is why it does not hold, "" where it does."""

    case: Case
    problem: str
    seconds: float


def tried(cases: Sequence[Case]) -> Iterator[Outcome]:
    """Every case in a folder of its own, which is gone afterwards."""
    for case in cases:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"gardo-{case.name}-") as folder:
            try:
                case.check(Trial(Path(folder)))
                problem = ""
            except Exception as error:  # whatever it is, it did not hold
                problem = f"{type(error).__name__}: {error}"
        yield Outcome(case, problem, time.monotonic() - start)


def chosen(*, quick: bool, only: str = "") -> dict[str, list[Case]]:
    """The cases by subject: the quick ones, or all, whose name contains `only`."""
    found = {
        subject: [c for c in cases if (c.quick or not quick) and only in c.name]
        for subject, cases in SUBJECTS.items()
    }
    return {subject: cases for subject, cases in found.items() if cases}


def markdown() -> str:
    """The table of docs/reliability.md."""
    parts = []
    for subject, cases in SUBJECTS.items():
        lines = [f"| `{case.name}` | {case.done} | {case.holds} |" for case in cases]
        parts.append("\n".join([f"### {subject}", "", "| case | what is done | what must hold |",
                                "|---|---|---|", *lines]))  # fmt: skip
    return "\n\n".join(parts)
