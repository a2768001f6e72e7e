"""What a run leaves for its report: pictures with their ranks, its environment, known metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gardo.report.environment import read_environment
from gardo.report.gated import best_and_worst_section, gated_section
from gardo.report.glossary import entries, paths
from gardo.report.kept import FILE, picture_of, read_kept
from gardo.report.metrics_log import read_metrics
from gardo.report.pictures import read_images
from tests.integration.cases import Case
from tests.integration.coverings import alone
from tests.integration.launch import start, wait_for

CASE = Case("gardo", "lora", "stage1", ("large",), steps=2, probes=())
ALONE = alone(CASE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The run of one process and of two ranks."""
    folder = tmp_path_factory.mktemp("kept")
    folders = {ranks: folder / str(ranks) for ranks in (1, 2)}
    for path in folders.values():
        path.mkdir()
    wait_for([start(0, folders[1], [ALONE])])
    wait_for([start(2, folders[2], [CASE])])
    return {1: folders[1] / ALONE.run, 2: folders[2] / CASE.run}


def near(one: Any, two: Any) -> bool:
    """Equal, numbers to 1e-3: a judge makes more of a pixel's last bits than the loss does."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(near(one[key], two[key]) for key in one)
    if isinstance(one, float):
        return one == pytest.approx(two, rel=1e-3, abs=1e-3)
    return bool(one == two)


def test_one_process_and_two_ranks_keep_the_same(runs: dict[int, Path]) -> None:
    records = {ranks: read_kept(folder) for ranks, folder in runs.items()}
    assert [record["step"] for record in records[1]] == [1, 2]
    for one, two in zip(records[1], records[2], strict=True):
        assert one["size"] == two["size"] == [32, 32] and one["images"] == two["images"]
        assert len(one["samples"]) == len(two["samples"]) >= 8
        for mine, theirs in zip(one["samples"], two["samples"], strict=True):
            assert near(mine, theirs)
        strips = [read_images([run / picture_of(one["step"])]) for run in runs.values()]
        assert strips[0].shape[2:] == (32, 32 * len(one["samples"]))
        torch.testing.assert_close(*strips, rtol=0, atol=1.01 / 255)


def test_a_kept_sample_says_what_the_gate_saw(runs: dict[int, Path]) -> None:
    for record in read_kept(runs[2]):
        seen = {kind for sample in record["samples"] for kind in sample["shown"]}
        assert seen == {"gated", "trusted", "best", "worst"}
        for sample in record["samples"]:
            ranks = {n: r["rank"] for n, r in sample["rewards"].items() if r["role"] == "auxiliary"}
            assert sample["prompt"] and ranks
            mean = sum(ranks.values()) / len(ranks)
            assert sample["uncertainty"] == pytest.approx(sample["proxy_rank"] - mean, abs=1e-4)
            assert ("gated" in sample["shown"]) <= sample["gated"]
            assert ("trusted" in sample["shown"]) <= (not sample["gated"])
    assert gated_section(runs[2]).count("<figure>") >= 8
    assert "<figure>" in best_and_worst_section(runs[1])


def test_every_number_that_a_run_logs_has_a_meaning(runs: dict[int, Path]) -> None:
    for folder in runs.values():
        for record in read_metrics(folder / "metrics.jsonl"):
            known = [entry for entry in entries() if record["kind"] in entry.where]
            unknown = [p for p in paths(record) if not any(entry.matches(p) for entry in known)]
            assert not unknown


def test_a_run_says_where_it_ran(runs: dict[int, Path]) -> None:
    for ranks, folder in runs.items():
        (begun,) = read_environment(folder)
        assert begun["ranks"] == len(begun["devices"]) == ranks and begun["after_step"] == 0
        assert str(Path.home()) not in json.dumps(begun)
        assert (folder / FILE).stat().st_size < 200_000
