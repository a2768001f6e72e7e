"""The tables of the toy's second question, from its CSV: a row a case and arm, a column a look."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gardo.evaluation.statistics import Interval, bootstrap_mean
from toy.centre import DIVERSITY, PULLS, Case, Question
from toy.seeds import START
from toy.tables import OURS, Comparison, shown
from toy.world import Toy

Row = dict[str, str]
FREE = "no_kl"


def cases(rows: Sequence[Row], question: Question) -> dict[str, Case]:
    """Those that have rows, in the order of the question."""
    seen = {row["case"] for row in rows}
    return {name: case for name, case in question.cases.items() if name in seen}


def looks(rows: Sequence[Row], case: str) -> dict[int, Comparison]:
    """{iteration: what the arms measured then}; at 0 the pre-trained policy alone."""
    of_case = [row for row in rows if row["case"] == case]
    return {
        now: Comparison.of(row for row in of_case if int(row["iteration"]) == now)
        for now in sorted({int(row["iteration"]) for row in of_case})
    }


def table(rows: Sequence[Row], question: Question, toy: Toy) -> str:
    """The centre's share before and at every look; modes and true reward at the last."""
    times = [f"after {now}" for now in question.looked_at]
    columns = ["the centre's weight", "", "its share before", *times]
    columns += [f"modes covered {times[-1]}", f"true reward {times[-1]}"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, case in cases(rows, question).items():
        found = looks(rows, name)
        last = found[question.looked_at[-1]]
        for arm in case.arms:
            shares = [
                share(comparison, arm if now else START, toy) for now, comparison in found.items()
            ]
            end = [shown(last.mean(arm, "modes"), 1), shown(last.mean(arm, "true"), 2)]
            cells = [case.title, toy.arms[arm].title, *shares, *end]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def share(comparison: Comparison, arm: str, toy: Toy) -> str:
    """The share at the centre, and in how many seeds that covers it."""
    seeds = len(comparison.values[arm]["centre_share"])
    covered = comparison.centre_covered(arm, toy.layout.covered_share)
    return f"{shown(comparison.mean(arm, 'centre_share'), 3)}, {covered} of {seeds}"


def findings(rows: Sequence[Row], question: Question, toy: Toy) -> str:
    """The two claims that toy.yaml's layout does not bear out, and diversity against beta 0.

    The limits were written down in centre.yaml before the seeds ran.
    """
    most = 0.9 * (len(toy.layout.rewarded) + 1)
    times = " | ".join(f"after {now}" for now in question.looked_at)
    lines = [
        f"| | the centre's weight | {times} |",
        "|---" * (2 + len(question.looked_at)) + "|",
    ]

    def line(claim: str, title: str, found: list[tuple[Interval, bool]], digits: int) -> str:
        sign = "+" if digits == 3 else ""
        cells = [
            f"{shown(interval, digits, sign)}: {'holds' if holds else '**does not hold**'}"
            for interval, holds in found
        ]
        return f"| {claim} | {title} | {' | '.join(cells)} |"

    for arm, claim in (
        (DIVERSITY, f"diversity alone covers all modes (at least {most:g})"),
        (OURS, f"GARDO covers all modes (at least {most:g})"),
    ):
        for name, case in cases(rows, question).items():
            found = looks(rows, name)
            modes = [found[now].mean(arm, "modes") for now in question.looked_at]
            lines.append(line(claim, case.title, [(m, m.mean >= most) for m in modes], 1))
    for name, case in cases(rows, question).items():
        if FREE in case.arms:
            found = looks(rows, name)
            more = [
                found[now].change(FREE, DIVERSITY, "centre_share") for now in question.looked_at
            ]
            claim = "diversity has more of the centre than β = 0"
            lines.append(line(claim, case.title, [(m, m.low > 0) for m in more], 3))
    return "\n".join(lines)


def first_step(rows: Sequence[Row], question: Question) -> str:
    """What the samples of each region do to the centre's share in diversity's first step."""
    names = ("the centre", "rewarded ring modes", "ring modes without reward", "no mode")
    lines = [
        f"| the centre's weight | {' | '.join(names)} | all |",
        "|---" * (len(names) + 2) + "|",
    ]
    for name, case in cases(rows, question).items():
        start = [row for row in rows if row["case"] == name and row["arm"] == START]
        pull_SR = torch.tensor([[float(row[p]) for p in PULLS] for row in start]).double()
        columns = [*pull_SR.T, pull_SR.sum(1)]
        cells = [shown(bootstrap_mean(pull_S), 2, "+") for pull_S in columns]
        lines.append(f"| {case.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def note(rows: Sequence[Row], question: Question, toy: Toy) -> str:
    seeds = len({row["seed"] for row in rows})
    revisions, versions = (
        ", ".join(sorted({row[field] for row in rows})) for field in ("revision", "torch")
    )
    return (
        f"{seeds} of the {question.seeds} seeds of [centre.yaml](../toy/centre.yaml); means with "
        f"95 % bootstrap intervals, differences paired by seed. *k of n*: the centre is covered in "
        f"k of n seeds, with at least {100 * toy.layout.covered_share:g} % of the samples. "
        f"torch {versions}, revision {revisions}."
    )


def page(rows: Sequence[Row], question: Question, toy: Toy) -> str:
    """What stands between the `toy_centre` marks of toy.md."""
    explained = (
        "What the samples of each region do to the logarithm of the centre's share in the first "
        "step of diversity alone, by plain gradient ascent, a unit of the whole step's length:"
    )
    parts = [table(rows, question, toy), findings(rows, question, toy)]
    parts += [explained, first_step(rows, question), note(rows, question, toy)]
    return "\n\n".join(parts)
