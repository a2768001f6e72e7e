"""Where a run's time went: a table of its phases, from the records of its steps.

A phase's seconds, calls and rows are means over the steps but the first, in which libraries warm
up (a run of one step has only that). Rows are what a call takes: rows of a model, images, prompts.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from gardo.report.metrics_log import Record
from gardo.report.phase_clock import OTHER

ORDER = (
    "encode", "sample", "decode", "reward", "features", "teachers", "probe", "train", "optimizer",
    "gather", "pictures", "checkpoint",
)  # fmt: skip
HEAD = ("phase", "seconds", "share", "calls", "rows", "rows/s", "peak GB")


@dataclass(frozen=True)
class PhaseRow:
    """Of one step, on rank 0; `peak` in bytes, 0 where nobody counted."""

    name: str
    seconds: float
    share: float  # of all phases' seconds
    calls: float
    rows: float
    peak: int

    def cells(self) -> tuple[str, ...]:
        """As HEAD names them."""
        rate = f"{self.rows / self.seconds:.3g}" if self.rows and self.seconds else ""
        return (
            self.name,
            f"{self.seconds:.3f}",
            f"{100 * self.share:.1f} %",
            f"{self.calls:g}" if self.calls else "",
            f"{self.rows:g}" if self.rows else "",
            rate,
            f"{self.peak / 1e9:.2f}" if self.peak else "",
        )


def warm(steps: Sequence[Record]) -> Sequence[Record]:
    """The steps after the first, or that one."""
    return steps[1:] or steps


def phase_rows(steps: Sequence[Record]) -> list[PhaseRow]:
    """The phases as ORDER has them, then those it does not know, `other` last."""
    steps = warm(steps)
    names = dict.fromkeys(name for step in steps for name in step.get("seconds", {}))
    places = {name: place for place, name in enumerate(ORDER)} | {OTHER: len(ORDER) + 1}
    ordered = sorted(names, key=lambda name: places.get(name, len(ORDER)))

    def average(field: str, name: str) -> float:
        return mean(step.get(field, {}).get(name, 0) for step in steps)

    seconds = {name: average("seconds", name) for name in ordered}
    total = sum(seconds.values()) or 1.0
    return [
        PhaseRow(
            name,
            seconds[name],
            seconds[name] / total,
            average("calls", name),
            average("rows", name),
            max(step.get("memory", {}).get(name, 0) for step in steps),
        )
        for name in ordered
    ]


def throughput(steps: Sequence[Record]) -> str:
    """Seconds a step, images a second and the peak of memory; "" where nothing was logged."""
    steps = warm(steps)
    logged = [step for step in steps if "images_per_second" in step]
    if not logged:
        return ""
    seconds = mean(sum(step["seconds"].values()) for step in logged)
    images = 1 / mean(1 / step["images_per_second"] for step in logged)
    peak = max(step["peak_bytes"] for step in logged)
    return (
        f"{seconds:.3g} s a step, {images:.3g} images a second over all ranks, "
        f"{peak / 1e9:.2f} GB at the peak of a rank"
    )


def as_text(steps: Sequence[Record]) -> str:
    """The table for a terminal, and under it the throughput."""
    cells = [HEAD, *(row.cells() for row in phase_rows(steps))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    ]
    return "\n".join([*lines, throughput(steps)]).rstrip()


def as_html(steps: Sequence[Record]) -> str:
    """The table for the report, with the throughput above it."""
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row.cells())}</tr>"
        for row in phase_rows(steps)
    )
    said = f"{rate}. " if (rate := throughput(steps)) else ""
    note = "The table: means of a step on the first rank, without the first step."
    return (
        f'<p class="soft">{said}{note}</p>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )
