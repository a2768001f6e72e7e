"""Numbers in documents: what a benchmark writes between the marks of a page, and where it ran."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def fill(page: Path, mark: str, text: str) -> None:
    """Replaces what stands between `<!-- MARK: begin -->` and `<!-- MARK: end -->`."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{page}: the marks {begin} and {end} are not there")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def revision() -> str:
    """The commit that is checked out, short."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True)
    return done.stdout.decode().strip() or "unknown"
