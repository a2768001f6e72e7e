"""The findings as HTML."""

from __future__ import annotations

from collections.abc import Sequence

from gardo.report.findings.run import Finding
from gardo.report.page import minus, text

MARKS = {"warning": "Warning", "note": "Note", "good": "Good"}  # read out, and seen without colour


def as_html(found: Sequence[Finding]) -> str:
    """A list, `<li class="finding warning">`: what was found, and under it what to try."""
    if not found:
        return '<p class="soft">Nothing to say yet, or nothing out of the ordinary.</p>'
    items = "".join(
        f'<li class="finding {one.severity}"><b>{MARKS[one.severity]}.</b> '
        f"{minus(text(one.sentence))}<small>{minus(text(one.advice))}</small></li>"
        for one in found
    )
    return f'<ul class="findings">{items}</ul>'
