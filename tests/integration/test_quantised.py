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
from gardo.export import export_run
from gardo.recipe_errors import RecipeError
from gardo.run_folder import check_changes
from gardo.settings import model_path
from tests.integration.cases import Case
from tests.integration.checks import check_slots, check_teachers, steps_of
from tests.integration.launch import launch
from tests.integration.recipes import recipe
from tests.integration.test_resume import MIDDLE, cut_and_resume, same_bits

CASES = [Case("gardo", "lora", "stage1", ("nf4", "saving"), probes=("evaluation",))]
MORE = [Case("gardo", "lora", "stage2", ("int8", "full", "saving"), probes=("evaluation",))]
OTHERS = [
    Case("gardo_nft", "lora", "stage2", ("nf4", "selective")),
    Case("flow_grpo", "lora", "stage1", ("nf4", "bf16", "offload")),
    Case("gardo", "lora", "stage0", ("int8",)),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_and_resume(CASES, [MIDDLE], tmp_path_factory.mktemp("quantised"))


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = cut_and_resume(MORE, [MIDDLE], tmp_path_factory.mktemp("more"))
    launch(2, folder, OTHERS)
    return folder


def check_ratio(folder: Path, case: Case) -> None:
    """In fp32 up to last bits, since a micro-batch is no batch of the sampler's."""
    steps = steps_of(folder, case)
    assert len(steps) == case.steps
    for step in steps:
        most = 1e-3 if case.has("bf16") else 1e-6
        assert step["metrics"].get("ratio_error", 0.0) <= most
        assert step["metrics"]["grad_norm"] > 0


def check_export(folder: Path, case: Case) -> None:
    """It is what was trained, under the names that a fresh pipeline of diffusers has."""
    path = recipe(case, folder)["model"]["path"]
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model_path(path))
    pipeline.load_lora_weights(folder / case.run / "export")
    saved = Saved(committed(folder / case.run / "checkpoints")[0])
    names = [n for n, p in pipeline.transformer.named_parameters() if ".lora_" in n]
    assert names
    for name in names:
        loaded = pipeline.transformer.get_parameter(name)
        stored = name.replace(".default_0.", ".default.")
        assert torch.equal(loaded, saved.whole("master", stored, loaded.shape))
    (file,) = (Path(model_path(path)) / "transformer").glob("*.safetensors")
    digest = sha256(sha256(file.read_bytes()).digest()).hexdigest()
    assert saved.manifest["state"]["base"] == {"id": path, "sha256": digest}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cut_run_goes_on_to_the_same_bits(runs: Path, case: Case) -> None:
    same_bits(runs, case, MIDDLE)
    check_ratio(runs, case)


@pytest.mark.full
@pytest.mark.parametrize("case", MORE, ids=str)
def test_a_cut_run_goes_on_to_the_same_bits_all(more: Path, case: Case) -> None:
    same_bits(more, case, MIDDLE)
    check_ratio(more, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_export_is_a_lora_for_the_whole_base(runs: Path, case: Case) -> None:
    check_export(runs, case)


@pytest.mark.full
@pytest.mark.parametrize("case", MORE, ids=str)
def test_the_export_is_a_lora_for_the_whole_base_all(more: Path, case: Case) -> None:
    check_export(more, case)


@pytest.mark.full
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_slots_and_teachers(more: Path, case: Case) -> None:
    check_slots(more, case)
    check_teachers(more, case)
    check_ratio(more, case)


def test_a_later_export_is_the_runs_own(runs: Path, tmp_path: Path) -> None:
    """By a command, which needs no bitsandbytes."""
    run = runs / CASES[0].run
    written = export_run(run, out=tmp_path)
    assert written.read_bytes() == (run / "export" / written.name).read_bytes()


@pytest.mark.parametrize("base", [None, "int8"])
def test_a_resume_refuses_another_base(runs: Path, base: str | None) -> None:
    sections: dict[str, Any] = recipe(CASES[0], runs)
    sections["model"] = {**sections["model"], "base": base}
    with pytest.raises(RecipeError, match=rf"^here: model\.base: nf4 -> {base}: the checkpoints"):
        check_changes(check(sections, "here"), "here")
