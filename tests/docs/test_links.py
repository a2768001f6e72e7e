"""Links of the documentation: files that are there, and headings that are in them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from tests import ROOT

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(
        ROOT / folder / "README.md"
        for folder in ("recipes", "recipes/prompts", "benchmarks", "suites")
    ),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "benchmarks/results").rglob("*.md")),
]
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
FENCED = re.compile(r"^(`{3,}).*?^\1$", re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """Targets of links and pictures outside of code that lie in this repository."""
    plain = re.sub(r"`[^`\n]*`", "", FENCED.sub("", text))
    found = [match["target"] for match in LINK.finditer(plain)]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


@cache
def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text("utf-8")), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip())
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        again = sum(
            re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found
        )
        found.add(f"{slug}-{again}" if again else slug)
    return found


def broken(page: Path, target: str) -> bool:
    name, _, anchor = target.partition("#")
    file = (page.parent / name) if name else page
    if not file.exists():
        return True
    return bool(anchor) and file.suffix == ".md" and anchor not in anchors(file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert [t for t in links(page.read_text("utf-8")) if broken(page, t)] == []


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs/index.md"
    led = {(index.parent / t.partition("#")[0]).resolve() for t in links(index.read_text("utf-8"))}
    assert {page for page in PAGES if page.is_relative_to(ROOT / "docs")} - led - {index} == set()


def test_what_is_broken_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One\n\n## Two, three\n\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    text = "[a](other.md#two-three) [b](other.md#four) [c](none.md) [d](https://x.org) `[e](f.md)`"
    page.write_text(text)
    assert [t for t in links(text) if broken(page, t)] == ["other.md#four", "none.md"]
