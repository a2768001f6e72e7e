"""`./run docs`: the site builds without a warning and asks no server for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT


@pytest.mark.full
def test_it_builds_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    options = [
        "-q",
        "-W",
        "--keep-going",
        "-b",
        "html",
        "-d",
        str(tmp_path / "cache"),
        "-c",
        "docs",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, ".", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = [*(tmp_path / "site").rglob("*.html")]
    assert len(pages) > 30
    fetched = re.compile(
        r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*href=["']?(?:https?:)?//"""
    )
    assert [page for page in pages if fetched.search(page.read_text("utf-8"))] == []
    pictures = {
        page.parent / source
        for page in pages
        for source in re.findall(r'<img[^>]*src="([^":]+)"', page.read_text("utf-8"))
    }
    assert len(pictures) > 5 and all(picture.is_file() for picture in pictures)
    styles = [*(tmp_path / "site").rglob("*.css")]
    assert styles
    for style in styles:
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", style.read_text("utf-8")), style
    formulas = (tmp_path / "site/docs/gardo.html").read_text("utf-8")
    assert formulas.count("<math") > 20
    assert (tmp_path / "site/index.html").is_file()
