"""The smoke recipes with tiny models in the published ones' places: all that they are to prove."""

from __future__ import annotations

from pathlib import Path

import pytest

from gardo.report.metrics_log import read_metrics, step_records
from gardo.train import main
from tests import ROOT

TINY = (
    "run.name=run", "distributed.engine=local", "distributed.precision=float32",
    "distributed.threads=1", "model.size=[32, 32]", "model.text_tokens=8",
    "data.prompts_per_step=2", "data.images_per_prompt=4", "train.micro_batch=8",
    "sampler.steps=3", "sampler.train_steps=2", "evaluate.steps=2",
    "rewards.clipscore={kind: colour_statistics, role: proxy, statistic: contrast}",
    "rewards.dinov2={kind: dinov3, role: features, path: 'builtin:dinov3', size: 32}",
)  # fmt: skip


@pytest.mark.parametrize("family", ["flux", pytest.param("sd3", marks=pytest.mark.full)])
def test_a_smoke_recipe_has_every_part(family: str, tmp_path: Path) -> None:
    sets = [*TINY, f"model.path=builtin:{family}", f"run.folder={tmp_path}"]
    recipe = str(ROOT / f"recipes/smoke_{family}.yaml")
    assert main([recipe, *(part for one in sets for part in ("--set", one))]) == 0
    run = tmp_path / "run"
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "evaluation"] == [0, 2]
    first, second = step_records(run)
    for record in (first, second):
        assert 0 < record["metrics"]["gate_share"] < 1 and record["metrics"]["diversity"] > 0
        assert {of["role"] for of in record["rewards"].values()} == {
            "proxy", "auxiliary", "held_out"
        }  # fmt: skip
    assert any("reference reset" in event for event in first["events"])
    left = ("checkpoints/step-000001", "checkpoints/step-000002", "report.html",
            "export/pytorch_lora_weights.safetensors")  # fmt: skip
    assert all((run / name).exists() for name in left)
