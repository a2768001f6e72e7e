"""docs/reference/metrics.md: every number of a run's metrics.jsonl."""

from __future__ import annotations

from itertools import groupby

from gardo.report.glossary import entries

from .markdown import MADE, code, prose, table

INTRO = f"""{MADE}

# Every metric

A run writes `metrics.jsonl`, one JSON object a line: a record of every iteration (`step`) and of
every evaluation. `*` stands for a name: a reward's, a judge's, a phase's.
[The report](../report.md) shows the same sentences beside its curves.
"""
TITLES = {
    "record": "The record itself",
    "reward": "Rewards",
    "diversity": "Diversity",
    "loss": "Loss",
    "kl": "KL and the reference",
    "gate": "The gate",
    "ratio": "The policy's ratio",
    "update": "Updates",
    "time": "Time",
    "memory": "Memory",
    "judge": "Judges at an endpoint",
}


def page() -> str:
    lines = [INTRO]
    order = [*TITLES]
    found = sorted(entries(), key=lambda entry: order.index(entry.kind))
    for kind, group in groupby(found, key=lambda entry: entry.kind):
        rows = [(code(e.pattern), e.unit, ", ".join(e.where), prose(e.meaning)) for e in group]
        lines += [f"## {TITLES[kind]}", "", *table(("value", "unit", "in", "meaning"), rows)]
    return "\n".join(lines).rstrip() + "\n"
