"""The glossary against what is logged: by the golden curve, by the study, by the source."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from gardo.report.glossary import PHASES, Entry, entries, meaning, paths
from gardo.report.metrics_log import read_metrics
from gardo.report.phase_table import ORDER
from gardo.rewards.judging.base import COSTS
from tests import ROOT
from tests.engine.report.records import evaluation_record, step_record

ENGINE = ROOT / "engine" / "gardo"
CELLS = sorted((ROOT / "benchmarks/results/study").rglob("*-seed1.jsonl"))
STUDY_ONLY = ("drift", "metrics.paper_", "metrics.official_code_")  # benchmarks/study writes these
PHASE_CALLS = {"phase", "_phase"}


def text_of(*names: str) -> str:
    return "".join((ENGINE / name).read_text(encoding="utf-8") for name in names)


def unknown(record: dict, kind: str) -> set[str]:
    """Paths of the record's values that have no entry of its kind."""
    known = [entry for entry in entries() if kind in entry.where]
    return {path for path in paths(record) if not any(e.matches(path) for e in known)}


def named_metrics(path: Path) -> Iterator[str]:
    """What an algorithm gives to Metrics.mean, Metrics.maximum and Credit.with_info, by name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if not isinstance(call.func, ast.Attribute):
            continue
        if call.func.attr == "with_info":
            yield from (word.arg for word in call.keywords if word.arg)
        if call.func.attr in ("mean", "maximum") and call.args:
            name = call.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield name.value
    for loop in (node for node in ast.walk(tree) if isinstance(node, ast.For)):
        if "metrics.mean(name, values" in ast.unparse(loop):
            yield from (row.elts[0].value for row in loop.iter.elts)


def phases_named(path: Path) -> Iterator[str]:
    """The phases that a module enters by name."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call) or not call.args:
            continue
        function = ast.unparse(call.func).rsplit(".", 1)[-1]
        if function in PHASE_CALLS or function == "_phase()":
            yield from (
                node.value
                for node in ast.walk(call.args[0])
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            )


def test_every_entry_is_a_sentence_of_its_own() -> None:
    patterns = [(entry.pattern, where) for entry in entries() for where in entry.where]
    assert len(patterns) == len(set(patterns))
    for entry in entries():
        assert entry.where and entry.meaning.endswith(".") and entry.meaning[0].isupper()
        assert not entry.unit.endswith("."), entry


def test_what_runs_log_has_a_meaning() -> None:
    assert not unknown(step_record(3), "step")
    assert not unknown(evaluation_record(3), "evaluation")
    for line in json.loads((ROOT / "tests/golden/tiny_flux_gardo.json").read_text("utf-8")):
        rewards = {name: {"mean": value} for name, value in line["rewards"].items()}
        assert not unknown(line | {"rewards": rewards}, "step")


def test_what_the_study_logged_has_a_meaning() -> None:
    assert len(CELLS) > 10
    seen: dict[str, set[str]] = {"step": set(), "evaluation": set()}
    for cell in CELLS:
        for record in read_metrics(cell):
            without = {"rewards", "change"}  # the study has means alone there
            kept = {key: value for key, value in record.items() if key not in without}
            seen[record["kind"]] |= unknown(kept, record["kind"])
    found = seen["step"] | seen["evaluation"]
    assert {path for path in found if not path.startswith(STUDY_ONLY)} == set()


def test_every_metric_of_an_algorithm_has_a_meaning_and_the_other_way_round() -> None:
    """Those of the algorithms, and those that the loop adds."""
    sources = sorted((ENGINE / "algorithms").glob("*.py"))
    logged = {name for path in sources for name in named_metrics(path)}
    assert len(logged) > 12
    loop = ast.parse(text_of("phases.py"))
    for node in ast.walk(loop):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "metrics":
            logged.add(node.slice.value)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "metrics":
            logged |= {key.value for key in node.value.keys if key}
    known = {e.pattern.removeprefix("metrics.") for e in entries() if e.pattern[:8] == "metrics."}
    assert logged == known


def test_every_phase_has_a_meaning_and_the_other_way_round() -> None:
    entered = {name for path in ENGINE.rglob("*.py") for name in phases_named(path)}
    entered -= {"", "sampling", "decoding"}  # of the planner, which has phases of its own
    assert entered | {"other", "reward", "features"} == set(PHASES)
    assert set(ORDER) <= set(PHASES)
    for name in PHASES:
        assert meaning(f"seconds.{name}")


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("record", ["phases.py", "evaluation/evaluate.py"]),
        ("reward", ["scored.py", "evaluation/evaluate.py", "evaluation/statistics.py"]),
        ("diversity", ["evaluation/attributes.py", "evaluation/drawing.py", "algorithms/gardo.py"]),
        ("memory", ["phases.py"]),
        ("time", ["phases.py", "report/phase_clock.py", "report/glossary.py"]),
    ],
)
def test_no_entry_of_what_nothing_writes(kind: str, files: list[str]) -> None:
    source = text_of(*files)
    for entry in (entry for entry in entries() if entry.kind == kind):
        name = entry.pattern.replace(".*", "").rsplit(".", 1)[-1]
        written = (f'"{name}"', f"{name}=", f"{name}: float")
        assert any(form in source for form in written), entry.pattern


def test_a_judge_has_an_entry_for_each_of_its_costs() -> None:
    costs = [e.pattern.rsplit(".", 1)[-1] for e in entries() if e.kind == "judge"]
    assert tuple(costs) == COSTS


def test_meaning_of_a_path_and_of_a_metric_alone() -> None:
    kl = meaning("kl")
    assert kl is not None and kl == meaning("metrics.kl") and kl.kind == "kl"
    named = meaning("rewards.my.reward.mean")  # a reward may have a dot in its name
    assert named is not None and named.pattern == "rewards.*.mean"
    assert meaning("somebody_s_own") is None and meaning("rewards.hpsv2") is None
    assert not Entry("a.*", "", "", ("step",), "loss").matches("a.b.c")
