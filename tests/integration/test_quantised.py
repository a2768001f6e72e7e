"""Runs on a base in few bits: ratios, resumes, exports, and what a resume refuses."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from gardo.config import check
from gardo.distributed.saved import Saved, committed
from gardo.recipe_errors import RecipeError
from gardo.session import check_changes
from gardo.settings import model_path
from tests.integration.cases import Case
from tests.integration.checks import check_slots, check_teachers, steps_of
from tests.integration.launch import launch
from tests.integration.recipes import recipe
from tests.integration.test_resume import MIDDLE, cut_and_resume, same_bits

CASES = [
    Case("gardo", "lora", "stage1", ("nf4", "saving"), probes=("evaluation",)),
    Case("gardo", "lora", "stage2", ("int8", "full", "saving"), probes=("evaluation",)),
]
OTHERS = [
    Case("gardo_nft", "lora", "stage2", ("nf4", "selective")),
    Case("flow_grpo", "lora", "stage1", ("nf4", "bf16", "offload")),
    Case("gardo", "lora", "stage0", ("int8",)),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = cut_and_resume(CASES, [MIDDLE], tmp_path_factory.mktemp("quantised"))
    launch(2, folder, OTHERS)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cut_run_goes_on_to_the_same_bits(runs: Path, case: Case) -> None:
    same_bits(runs, case, MIDDLE)


@pytest.mark.parametrize("case", [*CASES, *OTHERS], ids=str)
def test_training_sees_the_samplers_base(runs: Path, case: Case) -> None:
    """In fp32 up to last bits, since a micro-batch is no batch of the sampler's."""
    steps = steps_of(runs, case)
    assert len(steps) == case.steps
    for step in steps:
        most = 1e-3 if case.has("bf16") else 1e-6
        assert step["metrics"].get("ratio_error", 0.0) <= most
        assert step["metrics"]["grad_norm"] > 0


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_slots_and_teachers(runs: Path, case: Case) -> None:
    check_slots(runs, case)
    check_teachers(runs, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_export_is_a_lora_for_the_whole_base(runs: Path, case: Case) -> None:
    """What was trained, under the names that a fresh pipeline of diffusers has."""
    made = recipe(case, runs)["model"]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model_path(made["path"]))
    pipeline.load_lora_weights(runs / case.run / "export")
    saved = Saved(committed(runs / case.run / "checkpoints")[0])
    names = [n for n, p in pipeline.transformer.named_parameters() if ".lora_" in n]
    assert names
    for name in names:
        loaded = pipeline.transformer.get_parameter(name)
        stored = name.replace(".default_0.", ".default.")
        assert torch.equal(loaded, saved.whole("master", stored, loaded.shape))
    folder = Path(model_path(made["path"])) / "transformer"
    assert saved.manifest["state"]["base"] == identity(made["path"], folder)


def identity(path: str, folder: Path) -> dict[str, str]:
    (file,) = folder.glob("*.safetensors")
    return {"id": path, "sha256": sha256(sha256(file.read_bytes()).digest()).hexdigest()}


@pytest.mark.parametrize("base", [None, "int8"])
def test_a_resume_refuses_another_base(runs: Path, base: str | None) -> None:
    sections: dict[str, Any] = recipe(CASES[0], runs)
    sections["model"] = {**sections["model"], "base": base}
    with pytest.raises(RecipeError, match=rf"^here: model\.base: nf4 -> {base}: the checkpoints"):
        check_changes(check(sections, "here"), "here")
