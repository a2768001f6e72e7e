"""The measurement of judges, on tiny models; and the shapes that it has on a GPU."""

from __future__ import annotations

import csv

import pytest
import torch
import transformers

from campaign import flux_model, judges, table
from core_ops.machine import Machine
from gardo.rewards.judging.qwen_vl import CLASSES


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux_model, "this_machine", lambda kind: Machine())
        assert judges.main(["--out", str(folder), "--small"]) == 0
    with (folder / "judges.csv").open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_every_judge_is_measured(rows):
    assert list(rows[0]) == [*judges.COLUMNS, "status", "note", *table.FACTS]
    assert [r["status"] for r in rows] == ["done"] * 4, [r["note"] for r in rows]
    assert all(float(r["questions_per_second"]) > 0 for r in rows)
    tokens = {r["judge"]: int(r["prompt_tokens"]) for r in rows}
    assert tokens["yes_no"] < tokens["yes_no_pair"] < tokens["unifiedreward"] < tokens["hpsv3"]


def test_a_question_has_about_as_many_tokens_as_the_published_tokenizer_gives(tmp_path):
    """HPSv3's turn is about 560 tokens and a picture's 256."""
    made = judges.Models(judges.SMALL, torch.device("cpu"), tmp_path)
    reward = judges.judge(judges.Case("hpsv3", "qwen2_vl", 512, 1), made)
    assert reward.pixels.tokens(512, 512) == 256
    assert len(reward.turn(judges.PROMPT, 256)) == pytest.approx(256 + 560, rel=0.1)


@pytest.mark.parametrize(("kind", "billions"), [("qwen2_vl", 8.29), ("qwen2_5_vl", 8.29)])
def test_the_models_have_the_published_sizes(kind, billions, tmp_path):
    made = judges.Models(judges.FULL, torch.device("meta"), tmp_path)
    model = made.of(kind, CLASSES[kind])
    assert isinstance(model, getattr(transformers, CLASSES[kind]))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
