"""Runs side by side: what differs, what came of it, paired by prompt."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gardo import cli
from gardo.compare import as_data, read, write_page
from gardo.compare.runs import common_step, differing, paired
from gardo.report.pictures import save_grid
from tests.engine.report.records import evaluation_record, step_record, write_log

PLAIN: dict[str, Any] = {"name": "flow_grpo", "beta": 0.0}
GARDO: dict[str, Any] = {"name": "gardo", "gate": {"fraction": 0.1}, "base": {**PLAIN, "beta": 3.0}}


def make(folder: Path, algorithm: dict[str, Any], *, better: float, last: int = 20) -> Path:
    """A run with two evaluations, the second of whose means of prompts are `better`."""
    records = [
        evaluation_record(0),
        *(step_record(step) for step in range(1, last + 1)),
        evaluation_record(last, proxy=better),
    ]
    for record, up in ((records[0], 0.0), (records[-1], better)):
        record["by_prompt"] = {"count": [0.1 * prompt + up for prompt in range(8)]}
    write_log(folder / "metrics.jsonl", records)
    recipe = {
        "run": {"name": folder.name, "folder": "runs"},
        "algorithm": algorithm,
        "evaluate": {"prompts": f"/{folder.name}/prompts.txt", "steps": 8},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for step in (0, last):
        save_grid(torch.rand(4, 3, 8, 8), folder / f"samples/step-{step:05d}.png", 2)
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    plain = make(tmp_path / "plain", PLAIN, better=0.25)
    return [plain, make(tmp_path / "gardo", GARDO, better=0.125)]


def test_what_differs_is_said_by_the_algorithms_name(folders: list[Path]) -> None:
    found = differing(read(folders))
    assert found.pop("algorithm") == ["flow_grpo", "gardo around flow_grpo"]
    assert found.pop("flow_grpo.beta") == [0.0, 3.0]
    assert found.pop("gardo.gate.fraction") == [None, 0.1]
    assert list(found) == ["evaluate.prompts"]


def test_the_difference_is_paired_by_prompt(folders: list[Path]) -> None:
    first, other = read(folders)
    change = paired(first, other, 20)["count"]
    assert (change.mean, change.low, change.high) == pytest.approx((-0.125,) * 3), "all alike"
    elsewhere = yaml.safe_load((folders[1] / "recipe.yaml").read_text())
    elsewhere["evaluate"]["steps"] = 28
    (folders[1] / "recipe.yaml").write_text(yaml.safe_dump(elsewhere))
    assert paired(*read(folders), 20) == {}, "drawn in more steps"


def test_runs_are_compared_where_all_were_evaluated(tmp_path: Path, folders: list[Path]) -> None:
    longer = make(tmp_path / "longer", PLAIN, better=0.5, last=40)
    assert common_step(read(folders)) == 20
    data = as_data(read(folders))
    assert data["step"] == 20 and [one["evaluated_at"] for one in data["runs"]] == [20, 20]
    both = read([folders[0], longer])
    assert common_step(both) is None, "at the start alone, which says nothing"
    data = as_data(both)
    assert data["step"] is None and [one["evaluated_at"] for one in data["runs"]] == [20, 40]
    assert data["runs"][1]["against_first"]["count"]["mean"] == pytest.approx(0.25)
    write_page(both, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Last evaluations</h2>" in page and "each is at its own last one" in page
    assert "plain<small>step 20</small>" in page and "longer<small>step 40</small>" in page
    begun = make(tmp_path / "begun", PLAIN, better=0.0, last=0)
    assert common_step(read([folders[0], begun])) == 0, "all that one of them has"


def test_the_page_shows_both(tmp_path: Path, folders: list[Path]) -> None:
    out = tmp_path / "compare.html"
    write_page(read(folders), out)
    page = out.read_text()
    assert "<h1>plain and gardo</h1>" in page and "Evaluations at step 20" in page
    assert "gardo around flow_grpo" in page and "2 fields that not all have" not in page
    assert "1 field that not all have" in page
    assert "<small>\u22120.125 [\u22120.125, \u22120.125]</small>" in page
    assert page.count("data:image/png;base64,") == 2
    charts = re.findall('<svg class="chart".*?</svg>(?=<fig|</fig)', page, re.DOTALL)
    (count,) = [chart for chart in charts if 'aria-label="count"' in chart]
    assert count.count('<g class="curve"') == 2 and ">plain</text>" in count


def test_names_are_told_apart(tmp_path: Path) -> None:
    folders = [make(tmp_path / day / "run", PLAIN, better=0.1) for day in ("monday", "friday")]
    assert [one.name for one in read(folders)] == ["monday/run", "friday/run"]


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.app(["compare", *map(str, arguments)])
    return ended.value.code, *capsys.readouterr()


def test_the_command(
    tmp_path: Path, folders: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    code, said, complained = command(capsys, *folders, "--out", out)
    assert (code, complained) == (0, "") and out.exists()
    first, second, path = said.splitlines()
    assert first.startswith("plain  The proxy rose") and second.startswith("gardo  The proxy rose")
    assert path == str(out)
    code, said, _ = command(capsys, *folders, "--json")
    (plain, gardo) = json.loads(said)["runs"]
    assert code == 0 and gardo["against_first"]["count"]["mean"] == pytest.approx(-0.125)
    assert plain["against_first"] == {} and plain["verdict"]["tone"] == "good"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["plain"], "plain: compare it with what?"),
        (["plain", "plain"], "plain: given twice"),
        (["plain", "nothing"], "nothing: no metrics.jsonl; name the folder of a run"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    folders: list[Path], capsys: pytest.CaptureFixture[str], given: list[str], said: str
) -> None:
    parent = folders[0].parent
    code, out, complained = command(capsys, *(parent / name for name in given))
    assert (code, out) == (2, "") and f"{parent}/{said}" in complained
