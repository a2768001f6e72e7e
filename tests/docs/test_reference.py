"""docs/reference/ is what the program says of itself; `./run docs` writes it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gardo import plugins
from tests import ROOT

REFERENCE = ROOT / "docs/reference"


def test_it_is_what_would_be_written() -> None:
    command = [sys.executable, "docs/make_reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "package, naming", [("algorithms", "name"), ("policies", "family"), ("rewards", "kind")]
)
def test_every_plug_in_has_a_section(package: str, naming: str) -> None:
    text = (REFERENCE / "recipe.md").read_text(encoding="utf-8")
    for name in plugins.names(f"gardo.{package}"):
        assert f", {naming}: {name}\n" in text


def test_no_line_but_of_a_table_is_long() -> None:
    for page in REFERENCE.glob("*.md"):
        lines = page.read_text(encoding="utf-8").splitlines()
        assert [line for line in lines if len(line) > 130 and not line.startswith("|")] == []
