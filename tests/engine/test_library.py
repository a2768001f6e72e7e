"""The listings of docs/library.md, as a reader would run them."""

import re

import pytest
import torch

from gardo.report.metrics_log import read_metrics
from tests import ROOT

GRADIENT, ITERATION, RECIPE = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text(), re.DOTALL
)


def run(code, **changed):
    torch.manual_seed(0)
    names = {"__name__": "listing", **changed}
    exec(compile(code, "docs/library.md", "exec"), names)
    return names


def test_a_policy_gradient_on_plain_tensors_learns():
    head, loop = GRADIENT.split("for iteration in range(30):")
    rewards = [float(run(f"{head}for iteration in range({n}):{loop}")["reward"].mean())
               for n in (1, 30)]  # fmt: skip
    assert rewards[1] > rewards[0] + 0.5


def test_its_step_is_twenty_lines():
    lines = [line for line in GRADIENT.splitlines() if line.strip()]
    imports = [line for line in lines if line.startswith(("import", "from"))]
    assert len(lines) - len(imports) <= 20


def test_iterations_of_an_algorithm_of_a_section_learn():
    names = run(ITERATION)
    seen = [names["iterate"](step) for step in range(30)]
    rewards = [reward for reward, _, _ in seen]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.5
    metrics = seen[0][1]
    assert metrics["ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["gate_share"] == pytest.approx(13 / 128)  # a tenth of the samples
    assert seen[1][1]["kl"] > 0


def test_a_recipe_from_python(tmp_path, monkeypatch, capsys):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        names = run(RECIPE)
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert all(len([float(number) for number in line.split()]) == 3 for line in lines)
    folder = tmp_path / "runs/from-python"
    assert {record["kind"] for record in read_metrics(folder / "metrics.jsonl")} == {
        "step",
        "evaluation",
    }
    assert names["recipe"].algorithm.base.beta == 3.0
    assert (names["exported"] / "adapter_config.json").is_file()
    assert (folder / "export-peft/README.md").is_file()
