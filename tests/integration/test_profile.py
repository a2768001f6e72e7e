"""A run says where its seconds went; with --profile it leaves a trace that has its phases."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path

import pytest

from gardo.report.metrics_log import step_records
from gardo.train import main
from tests import ROOT

SETS = (
    "distributed.engine=local", "run.name=run", "run.steps=3", "data.prompts_per_step=1",
    "data.images_per_prompt=4", "sampler.steps=4", "sampler.train_steps=3", "train.micro_batch=2",
    "evaluate.every=3", "evaluate.prompt_count=2", "evaluate.images_per_prompt=1",
    "evaluate.steps=1", "evaluate.batch=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A profiled run's folder, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("profiled")
    sets = [part for one in (*SETS, f"run.folder={folder}") for part in ("--set", one)]
    start = time.perf_counter()
    recipe = str(ROOT / "recipes" / "tiny_flux_gardo.yaml")
    assert main([recipe, "--profile", *sets]) == 0
    return folder / "run", time.perf_counter() - start


def test_phases_account_for_a_step(run: tuple[Path, float]) -> None:
    folder, took = run
    first, second, _ = step_records(folder)
    images, rows = 4, 12  # 3 of 4 steps are trained
    assert first["rows"]["sample"] == 4 * images == second["rows"]["sample"]
    assert first["rows"]["decode"] == images == first["rows"]["features"]
    assert first["rows"]["probe"] + first["rows"]["train"] == rows
    assert first["calls"]["train"] == 5  # of six micro-batches: the probe made the first call
    seconds = second["seconds"]
    assert 0 < sum(seconds.values()) < took
    assert {"encode", "sample", "decode", "reward", "features", "probe", "train", "optimizer",
            "gather", "checkpoint"} <= seconds.keys()  # fmt: skip
    assert seconds["other"] < 0.1 * sum(seconds.values())
    assert second["images_per_second"] == pytest.approx(images / sum(seconds.values()))
    assert second["peak_bytes"] > 50e6


def test_the_report_has_the_table(run: tuple[Path, float]) -> None:
    page = (run[0] / "report.html").read_text()
    assert "Where the time went" in page and "<td>optimizer</td>" in page
    assert "images a second over all ranks" in page


def test_the_trace_has_the_phases_of_one_step(run: tuple[Path, float]) -> None:
    folder = run[0] / "profile"
    with gzip.open(folder / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    ranges = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert ranges.count("optimizer") == 6  # asked for after every micro-batch
    assert {"sample", "teachers", "train"} <= set(ranges)
    assert "aten::mm" in (folder / "operators.txt").read_text()
