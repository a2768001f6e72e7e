"""Which cases are run: those of every op's problem, in turns over the ops."""

from __future__ import annotations

from collections.abc import Sequence

from .cases import Case
from .problems import PROBLEMS

OPS = tuple(PROBLEMS)


def gpu_cases(ops: Sequence[str], quick: bool) -> list[Case]:
    """In turns over the ops, so that a budget cuts all of them alike."""
    lists = [PROBLEMS[op].gpu_cases(op) for op in ops]
    if quick:
        lists = [cases[:2] for cases in lists]
    turns = range(max(map(len, lists)))
    ordered = [cases[turn] for turn in turns for cases in lists if turn < len(cases)]
    return list(dict.fromkeys(ordered))  # the first ones are sizes too


def cpu_cases(ops: Sequence[str], quick: bool) -> list[Case]:
    return [case for op in ops for case in PROBLEMS[op].cpu_cases(op, quick)]


def counted_cases(ops: Sequence[str], quick: bool) -> list[Case]:
    return [PROBLEMS[op].counted_case(op, quick) for op in ops]
