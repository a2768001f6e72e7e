"""The recipes and suites that come with gardo: inside a wheel, or at the root of a checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

PARTS = ("recipes", "suites")


def folder(part: str) -> Path:
    """Where the files of a part of PARTS lie."""
    package = Path(__file__).parent
    inside = package / "_shipped" / part  # setup.py puts it into wheels
    return inside if inside.is_dir() else package.parents[1] / part


def copy(into: Path) -> tuple[list[Path], list[Path]]:
    """Writes all parts into a folder; (written, left alone because they were there already)."""
    written, left = [], []
    for part in PARTS:
        source = folder(part)
        for file in sorted(source.rglob("*")):
            target = into / part / file.relative_to(source)
            if not file.is_file() or "__pycache__" in file.parts:
                continue
            if target.exists():
                left.append(target)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            written.append(target)
    return written, left
