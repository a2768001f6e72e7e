"""What a project keeps beside its code: the changelog, citations, the workflow, the extras."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import gardo
from tests import ROOT

CITED = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_a_version_is_said_once() -> None:
    setup = re.search(r'version="([^"]+)"', (ROOT / "setup.py").read_text())
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert setup and setup[1] == gardo.__version__ == CITED["version"]
    assert re.search(rf"^## .*{re.escape(setup[1])}", changes, re.MULTILINE)


def test_citations_are_whole() -> None:
    """The keys that Citation File Format 1.2.0 requires, of the software and of each paper."""
    assert {"cff-version", "message", "title", "authors"} <= CITED.keys()
    for paper in CITED["references"]:
        assert paper["type"] == "article" and paper["title"] and paper["authors"]
        assert all({"given-names", "family-names"} == author.keys() for author in paper["authors"])
        (found,) = paper["identifiers"]
        assert paper["url"] == f"https://arxiv.org/abs/{found['value'].removeprefix('arXiv:')}"


def test_each_paper_of_an_algorithm_is_cited() -> None:
    cited = {paper["url"].rpartition("/")[2] for paper in CITED["references"]}
    first = {}
    for file in (ROOT / "engine/gardo/algorithms").glob("*.py"):
        docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        if "PLUGIN" in file.read_text() and (ids := re.findall(r"\d{4}\.\d{5}", docstring)):
            first[file.stem] = ids[0]
    assert len(first) > 6 and {name for name, one in first.items() if one not in cited} == set()


def test_the_workflow_runs_what_a_contributor_types() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert "./run test" in (ROOT / ".ci/run").read_text()
    supported = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text())
    assert job["strategy"]["matrix"]["python"] == supported


@pytest.mark.parametrize(
    "file", [*ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml"], ids=lambda p: p.name
)
def test_it_is_yaml(file: Path) -> None:
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


def extras() -> dict[str, list[str]]:
    """As setup.py says them, with its lists by name."""
    known: dict[str, Any] = {}
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            code = compile(ast.Expression(node.value), "setup.py", "eval")
            known[node.targets[0].id] = eval(code, {"Path": Path, "__file__": __file__}, known)
    return dict(known["EXTRAS"])


@cache
def words() -> str:
    """All that could use a package: code, tests, the front door, the site's configuration."""
    folders = ("engine", "kernels", "benchmarks", "tests", "docs")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return "\n".join(f.read_text(encoding="utf-8") for f in [*files, ROOT / "run"])


NAMES = {  # of a distribution, where its module has another
    "flash-attn": "flash_attn", "flash-attn-4": "flash_attn.cute", "myst-parser": "myst_parser",
    "prometheus-client": "prometheus_client", "pytest-xdist": "--dist", "types-PyYAML": "yaml",
    "markdown-it-py": "markdown_it", "openai": "transformers serve",
}  # fmt: skip


@pytest.mark.parametrize("extra", sorted(extras()))
def test_no_extra_is_promised_that_nothing_uses(extra: str) -> None:
    for requirement in extras()[extra]:
        name = re.split(r"[<>=!~;\[ ]", requirement)[0]
        assert re.search(rf"(?<!\w){re.escape(NAMES.get(name, name))}(?!\w)", words()), name
