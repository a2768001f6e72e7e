"""The page: what the run did, safe to open, and it fetches nothing."""

import base64
import hashlib
import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from gardo.report import interactive
from gardo.report.html import write_report
from gardo.report.pictures import save_grid
from tests.engine.report.records import evaluation_record, step_record, write_log


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    records = [evaluation_record(0)]
    for step in range(1, 61):
        record = step_record(step, events=["reference reset (kl)"] * (step == 7))
        record["metrics"] |= dict.fromkeys(("loss", "policy_loss", "ratio_error"), step / 1000)
        record["metrics"] |= {"kl": step / 100, "gate_share": (step % 5) / 100}
        records.append(record)
    records.append(evaluation_record(60, proxy=0.1, held_out=-0.002))
    write_log(tmp_path / "metrics.jsonl", records)
    (tmp_path / "recipe.yaml").write_text("run: {name: <i>flux</i>}\nnote: '</pre><script>'\n")
    for step in (0, 60):
        save_grid(torch.rand(4, 3, 8, 8), tmp_path / f"samples/step-{step:05d}.png", 2)
    return tmp_path


def test_report_shows_the_run(run_folder: Path) -> None:
    path = write_report(run_folder)
    page = path.read_text()
    assert path == run_folder / "report.html"
    assert "count rose by 0.100 [0.090, 0.110]" in page and "reference reset (kl): step 7" in page
    assert page.count("data:image/png;base64,") == 2
    for title in ("samples under the KL term, %", "mean of 4 steps"):
        assert title in page
    charts = re.findall(r'<svg class="chart".*?</svg>(?=<fig|</fig)', page, re.DOTALL)
    evaluated = ["count", "quality", "Proxy against held-out", "Diversity"]
    titles = [ET.fromstring(chart).get("aria-label") for chart in charts]
    assert titles == [*evaluated, "hpsv2 while training", "Loss", "KL to the reference",
                      "Gate share", "Time of a step"]  # fmt: skip
    assert "Policy loss: the values of Loss. Ratio error: the values of Loss." in page
    assert "Without change: pickscore while training 22.41, aesthetic while training 5.5" in page
    assert "mean over the gated rows; it falls to 0" in page, "a metric's meaning"


def test_long_curves_are_smoothed_but_not_a_saw_tooth(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    charts = [
        ET.fromstring(one)
        for one in re.findall('<svg class="chart".*?</svg>(?=<fig|</fig)', page, re.DOTALL)
    ]
    smooth = [one for one in charts if one.find(".//path[@class='line mean']") is not None]
    titles = [one.get("aria-label") for one in smooth]
    assert titles == ["hpsv2 while training", "Loss", "Gate share"]


def test_a_live_page_is_read_again_and_a_finished_one_is_not(run_folder: Path) -> None:
    again = '<meta http-equiv="refresh" content="60">'
    live = write_report(run_folder, live=True).read_text()
    assert f"<noscript>{again}</noscript>" in live and "The run goes on" in live
    assert 'data-refresh="60"' in live
    finished = write_report(run_folder).read_text()
    assert again not in finished and "data-refresh=" not in finished


def test_it_says_what_to_look_at_and_what_the_run_was_made_with(run_folder: Path) -> None:
    said = {"starts": [{"ranks": 2, "gardo": "0.1.0", "packages": {"torch": "2.13.0 <b>"}}]}
    (run_folder / "environment.json").write_text(json.dumps(said))
    page = write_report(run_folder).read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings.index("What to look at") < headings.index("Evaluations")
    assert "torch 2.13.0 &lt;b&gt;" in page and "recipe.yaml --resume --gpus 2" in page
    assert "What the gate caught" not in headings, "no picture was kept"
    conclusion = re.findall('<p class="conclusion">(.*?)</p>', page)
    assert len(conclusion) == 1 and page.count(conclusion[0]) == 1


def test_a_run_on_a_gpu_shows_its_memory(tmp_path: Path) -> None:
    """A phase that a step has not been through (a checkpoint) is a gap."""
    peaks = [{"sample": 21_000_000_000}, {"sample": 22_000_000_000, "save": 9_000_000_000}]
    records = [step_record(step, memory=peak) for step, peak in enumerate(peaks, start=1)]
    write_log(tmp_path / "metrics.jsonl", records)
    (chart,) = re.findall(r'<svg class="chart"(?:(?!<figure).)*Memory of a step.*?</figure>',
                          write_report(tmp_path).read_text(), re.DOTALL)  # fmt: skip
    assert "GB allocated at a phase" in chart
    assert "sample" in chart and "save" in chart


def test_report_is_escaped_and_fetches_nothing(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    (script,) = re.findall("<script>(.*?)</script>", page, re.DOTALL)
    assert script == interactive.script() and "<i>flux" not in page
    sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{sha256}'\">" in page, "no other script runs"
    assert "two &lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; circles &amp; a" in page
    assert "&lt;/pre&gt;&lt;script&gt;" in page
    assert "href" not in page and set(re.findall(r"""src=["']?(.{15})""", page)) == {
        "data:image/png;"
    }
    assert "http:" not in page and "https:" not in page and "@import" not in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    "records", [[], [step_record(1)], [evaluation_record(0)], [{"kind": "step", "step": 1}]]
)
def test_report_of_an_unfinished_run_says_what_is_missing(
    tmp_path: Path, records: list[dict[str, Any]]
) -> None:
    write_log(tmp_path / "metrics.jsonl", records)
    page = write_report(tmp_path).read_text()
    kinds = {record["kind"] for record in records}
    assert ("No evaluation was logged." in page) == ("evaluation" not in kinds)
    assert ("No training step was logged." in page) == ("step" not in kinds)
    assert "No evaluation left a picture." in page and "nothing to compare" in page
    assert "No recipe.yaml" in page and f"<h1>{tmp_path.name}</h1>" in page


def test_report_survives_numbers_that_are_not_finite(tmp_path: Path) -> None:
    broken = step_record(2, metrics={"kl": math.nan, "loss": math.inf})
    last = evaluation_record(3, proxy=math.nan)
    last["diversity"] = {"layout": math.nan}
    write_log(tmp_path / "metrics.jsonl", [evaluation_record(0), step_record(1), broken, last])
    page = write_report(tmp_path).read_text()
    assert "1 step logged numbers that are not finite." in page


def test_report_takes_pictures_only_from_the_runs_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save_grid(torch.rand(1, 3, 4, 4), tmp_path / "secret.png", 1)
    outside = evaluation_record(0) | {"images": "../secret.png"}
    no_picture = evaluation_record(1) | {"images": "metrics.jsonl"}
    write_log(run / "metrics.jsonl", [outside, no_picture])
    page = write_report(run).read_text()
    assert "data:image" not in page and "No evaluation left a picture." in page


def test_large_and_many_pictures_are_reduced(tmp_path: Path) -> None:
    records = [evaluation_record(step) for step in range(30)]
    write_log(tmp_path / "metrics.jsonl", records)
    for step in range(30):
        size = 900 if step == 0 else 4
        save_grid(torch.zeros(1, 3, size, size), tmp_path / f"samples/step-{step:05d}.png", 1)
    page = write_report(tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 15 and "15 more pictures" in page
    assert len(page) < 300_000
