"""Writes docs/reference/: what recipes and suites may say, what metrics mean, the command line.

Made of the program itself: the settings' schema, `gardo.report.glossary`, the typer application.

    python docs/make_reference.py          writes them
    python docs/make_reference.py --check  exit code 1 where one is not what it would write
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent / "reference"
sys.path.insert(0, str(Path(__file__).parent))

from _reference import cli, metrics, recipe  # noqa: E402  beside this file

PAGES: dict[str, Callable[[], str]] = {
    "recipe.md": recipe.page,
    "metrics.md": metrics.page,
    "cli.md": cli.page,
}


def main(arguments: list[str]) -> int:
    FOLDER.mkdir(exist_ok=True)
    other = []
    for name, page in PAGES.items():
        file, text = FOLDER / name, page()
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            continue
        other.append(name)
        if "--check" not in arguments:
            file.write_text(text, encoding="utf-8")
    if other and "--check" in arguments:
        print(f"docs/reference: {', '.join(other)}: out of date; ./run docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
