"""The card of a real run's export: what it takes from the folder, and that its code draws."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor

from gardo.card import without_places
from gardo.config import check
from gardo.export import export_run
from gardo.session import Session, open_session
from gardo.train import train
from tests import ROOT
from tests.engine.report.records import evaluation_record
from tests.integration.cases import Case
from tests.integration.probes import velocity
from tests.integration.recipes import recipe

PYTHON = re.compile(r"```python\n(.*?)\n```", re.DOTALL)
CASES = {
    "lora": Case("gardo", "lora", "local", ("ema",), steps=1),
    "full": Case("flow_grpo", "full", "local", steps=1),
}


@dataclass
class Run:
    folder: Path
    session: Session

    def draws_like(self, transformer: torch.nn.Module) -> Tensor:
        """The velocity of another transformer in the run's pipeline."""
        pipeline = self.session.policy.pipeline
        own, pipeline.transformer = pipeline.transformer, transformer.eval()
        try:
            return velocity(self.session)
        finally:
            pipeline.transformer = own


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    root, found = tmp_path_factory.mktemp("runs"), {}
    for kind, case in CASES.items():
        with open_session(check(recipe(case, root), case.name), quiet=True) as session:
            train(session)
        found[kind] = Run(root / case.run, session)
    yield found


def exported(run: Run, out: Path, **options: Any) -> ModelCard:
    export_run(run.folder, out=out, **options)
    return ModelCard((out / "README.md").read_text("utf-8"))


def executed(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of a listing that was run in a folder."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": "listing"}
    exec(compile(code, "listing", "exec"), names)
    return names


@pytest.mark.parametrize(
    ("kind", "format"),
    [("lora", "diffusers"), ("lora", "peft"), ("full", "transformer"), ("full", "pipeline")],
)
def test_its_code_draws_with_the_trained_weights(
    runs: dict[str, Run], kind: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs[kind]
    card = exported(run, tmp_path, format=format)
    (code,) = PYTHON.findall(card.text)
    names = executed(code, tmp_path, monkeypatch)
    assert torch.equal(run.draws_like(names["pipeline"].transformer), velocity(run.session))
    assert names["picture"].size == (16, 16) and (tmp_path / "picture.png").is_file()


def test_what_a_lora_says_of_its_run(runs: dict[str, Run], tmp_path: Path) -> None:
    run = runs["lora"]
    card = exported(run, tmp_path)
    assert card.data.to_dict()["license"] == "apache-2.0"
    assert card.data.tags == ["lora", "text-to-image", "flux", "gardo", "reinforcement-learning"]
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "evaluation"
    assert [one["text"] for one in card.data.to_dict()["widget"]] == last["prompts"]
    base = run.session.policy.identity["sha256"]
    for part in (
        "A LoRA of rank 4 of `builtin:flux`", "`gardo` around `flow_grpo`", base,
        "GARDO (arXiv 2512.24138), around any base algorithm", "`tiny_prompts.txt`, 54 prompts",
        "No held-out reward was measured", "drew with the average of the weights, not with",
        "| `dinov3` | features | `dinov3` | mean patch token at 256 pixels | `builtin:dinov3` | "
        "Apache License 2.0 |",
    ):  # fmt: skip
        assert part in card.text, part
    for file in re.findall(r"card/[\w.-]+", card.content):
        assert (tmp_path / file).is_file(), file


def test_it_is_written_beside_every_export_of_a_run(runs: dict[str, Run], tmp_path: Path) -> None:
    kohya = exported(runs["lora"], tmp_path / "kohya", format="kohya")
    assert "In ComfyUI, or by sd-scripts" in kohya.text and not PYTHON.findall(kohya.text)
    averaged = exported(runs["lora"], tmp_path / "ema", average=True)
    assert "These are the exponential moving average" in averaged.text
    assert "drew with the average of the weights, not with" not in averaged.text
    assert "--format diffusers --step 1 --ema" in averaged.text
    full = exported(runs["full"], tmp_path / "full")
    assert "All weights of the transformer of `builtin:flux`" in full.text
    assert "lora" not in full.data.tags


def test_nothing_of_the_machine_is_in_it(runs: dict[str, Run], tmp_path: Path) -> None:
    for kind in runs:
        content = exported(runs[kind], tmp_path / kind).content
        for place in (Path.home(), ROOT, tmp_path, runs[kind].folder.parent):
            assert f"{place}/" not in content and f"{place}\n" not in content, place
        assert "prompts: tiny_prompts.txt\n" in content


def test_places_in_a_recipe() -> None:
    said = {
        "prompts": "/home/me/secret/prompts.txt",
        "path": "~/models/flux",
        "near": "./models/mine",
        "up": "../rewards",
        "hub": "black-forest-labs/FLUX.1-dev",
        "data": ["hf:owner/name", "hf:/data/set"],
        "where": "http://me:password@10.0.0.7:8000/v1",
        "judge": {"where": "openai:https://judge.internal/v1", "question": "Is it\n/good/?"},
        "home": f"see {Path.home()}/notes",
        "builtin": "builtin:flux",
        "rank": 4,
        "none": None,
    }
    assert without_places(said) == {
        "prompts": "prompts.txt",
        "path": "flux",
        "near": "mine",
        "up": "rewards",
        "hub": "black-forest-labs/FLUX.1-dev",
        "data": ["hf:owner/name", "hf:set"],
        "where": "http://...",
        "judge": {"where": "openai:https://...", "question": "Is it\n/good/?"},
        "home": "see ~/notes",
        "builtin": "builtin:flux",
        "rank": 4,
        "none": None,
    }


def test_it_says_what_trained_the_weights(runs: dict[str, Run], tmp_path: Path) -> None:
    """Of the run's starts the last one before the exported step; without the file nothing."""
    folder = tmp_path / "run"
    shutil.copytree(runs["full"].folder, folder)
    start = {"gardo": "0.1.0", "revision": "a76aed0", "packages": {"torch": "2.12.0"},
             "devices": [{"name": "NVIDIA H100", "bytes": 1}] * 2}  # fmt: skip
    starts = [{**start, "after_step": 0}, {**start, "after_step": 1, "gardo": "0.9.0"}]
    run = Run(folder, runs["full"].session)
    (folder / "environment.json").write_text(json.dumps({"starts": starts}))
    text = exported(run, tmp_path / "out").text
    assert "Trained on 2 x NVIDIA H100 with gardo 0.1.0 (a76aed0), torch 2.12.0. Exported" in text
    for damaged in ("[]", '{"starts": [1]}', "{", '{"starts": []}'):
        (folder / "environment.json").write_text(damaged)
        assert "Trained on" not in exported(run, tmp_path / "out").text


def test_it_says_nothing_of_what_came_later_or_is_gone(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    """A run that went on, whose prompts and pictures are elsewhere now."""
    folder = tmp_path / "run"
    shutil.copytree(runs["lora"].folder, folder)
    with open(folder / "metrics.jsonl", "a") as log:
        log.write(json.dumps(evaluation_record(7)) + "\n")
    shutil.rmtree(folder / "samples")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(re.sub(r"/\S+/tiny_prompts", "/gone/prompts", text))
    card = exported(Run(folder, runs["lora"].session), tmp_path / "out")
    assert "| 1 |" in card.text and "| 7 |" not in card.text
    assert "- Prompts: `prompts.txt`; 2 an iteration" in card.text
    assert "widget" not in card.data.to_dict()
    (folder / "metrics.jsonl").unlink()
    card = exported(Run(folder, runs["lora"].session), tmp_path / "out")
    assert "has no evaluation" in card.text


def test_the_listing_of_the_documentation_draws(
    runs: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/files.md, word for word, after the run that it names."""
    page = (ROOT / "docs/files.md").read_text()
    (code,) = PYTHON.findall(page)
    run = runs["lora"]
    exported(run, tmp_path / "runs/tiny-flux-gardo/export")
    names = executed(code, tmp_path, monkeypatch)
    assert torch.equal(run.draws_like(names["pipeline"].transformer), velocity(run.session))
    assert (tmp_path / "picture.png").is_file()
