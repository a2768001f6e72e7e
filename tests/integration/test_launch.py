"""The main job as its user types it: the deepspeed launcher, two ranks, the demo's recipe.

Then its resumption, and the exported LoRA.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from gardo.distributed.saved import committed
from gardo.report.metrics_log import read_metrics
from gardo.train import main
from tests import ROOT
from tests.integration.checks import logged
from tests.integration.launch import DEMO, Launched, environment, settings_for, type_command

RUN = "tiny-flux-gardo"


def arguments(folder: Path, *settings: str) -> list[str]:
    """Of the training command, without the launcher's."""
    return [str(DEMO), *settings_for(folder, *settings)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one iteration of the demo's recipe on two ranks, as typed."""
    folder = tmp_path_factory.mktemp("runs")
    done = type_command(2, folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert "report" in done.stdout and "export" in done.stdout
    return folder / RUN


def test_bf16_trains_with_fp32_masters(tmp_path: Path) -> None:
    """Two iterations in bf16: the ratio contract holds, and small steps are not rounded away."""
    Launched(1, main, arguments(tmp_path, "distributed.precision=bfloat16", "run.steps=2")).wait()
    run = tmp_path / RUN
    first, second = (r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "step")
    assert first["metrics"]["ratio_error"] <= 1e-3 and second["metrics"]["ratio_error"] <= 1e-3
    assert second["metrics"]["ratio"] != 1.0 and second["metrics"]["grad_norm"] > 0
    weights = load_file(run / "checkpoints/step-000002/master-00000-of-00001.safetensors")
    masters = [w for n, w in weights.items() if "lora_B" in n]
    assert all(w.dtype == torch.float32 for w in masters)
    moved = torch.cat([w.flatten() for w in masters])
    assert float(moved.abs().max()) > 0
    assert not torch.equal(moved, moved.bfloat16().float())  # more digits than bf16 holds


def test_a_run_leaves_its_files(finished: Path) -> None:
    for name in ("recipe.yaml", "metrics.jsonl", "report.html"):
        assert (finished / name).is_file(), name
    assert (finished / "checkpoints/step-000001/manifest.json").is_file()
    assert (finished / "export" / "pytorch_lora_weights.safetensors").is_file()
    records = read_metrics(finished / "metrics.jsonl")
    assert [r["kind"] for r in records] == ["evaluation", "step", "evaluation"]
    assert (finished / "samples" / "step-00000.png").is_file()


def test_freed_text_encoders_change_nothing(finished: Path, tmp_path: Path) -> None:
    """Every prompt is encoded beforehand, by two ranks; what is trained has the same numbers."""
    Launched(2, main, arguments(tmp_path, "model.encoders=free")).wait()
    assert logged(tmp_path / RUN) == logged(finished)
    shown = {
        p for r in read_metrics(tmp_path / RUN / "metrics.jsonl") for p in r.get("prompts", [])
    }
    assert len(list((tmp_path / "embeddings").rglob("*.safetensors"))) >= len(shown) > 1


def test_a_run_is_resumed_and_saves_when_asked(finished: Path, tmp_path: Path) -> None:
    """On another number of ranks, with more steps, and a checkpoint that was not due."""
    run = shutil.copytree(finished, tmp_path / RUN)
    (run / "save-now").touch()
    before = read_metrics(run / "metrics.jsonl")
    settings = arguments(tmp_path, "run.steps=3", "checkpoint.every=100")
    printed = Launched(1, main, [*settings, "--resume"]).wait()
    for line in ("resumed after step 1", "changed since the run started: run.steps: 1 -> 3",
                 "checkpoint of step 2 saved, as asked"):  # fmt: skip
        assert line in printed
    assert not (run / "save-now").exists()
    saved = [p.name for p in committed(run / "checkpoints")]
    assert saved == ["step-000003", "step-000002", "step-000001"]
    after = read_metrics(run / "metrics.jsonl")
    assert after[: len(before)] == before
    assert [r["step"] for r in after[len(before) :]] == [2, 3, 3]
    assert not (tmp_path / f"{RUN}.1").exists()  # the run went on in its own folder


def test_a_resume_that_cannot_fit_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything loads, and with nothing lost."""
    run = shutil.copytree(finished, tmp_path / RUN)
    files = sorted(run.rglob("*"))
    changed = arguments(tmp_path, "train.weights.rank=8", "distributed.stage=2")
    assert main([*changed, "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{DEMO}: train.weights.rank: 16 -> 8: the checkpoints in {run}")
    assert sorted(run.rglob("*")) == files


@pytest.mark.parametrize(
    ("spoil", "place", "said"),
    [
        (lambda file: os.truncate(file, 1000), "--set model.path: ", "cannot be read"),
        (lambda file: os.truncate(file, 0), "--set model.path: ", "cannot be read"),
        (lambda file: file.unlink(), "--set model.path: ", "has no weights (*.safetensors)"),
        (
            lambda file: rename_tensor(file),
            f"{DEMO}: a model does not load: ",
            "x_embedder.weight must have shape [96, 16]; the files",
        ),
    ],
)
def test_damaged_weights_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    place: str,
    said: str,
) -> None:
    """From the headers, before a rank waits for another; their shapes, once the model is known."""
    model = shutil.copytree(ROOT / "engine/gardo/tiny/weights/flux", tmp_path / "flux")
    spoil(model / "transformer" / "diffusion_pytorch_model.safetensors")
    assert main(arguments(tmp_path / "runs", f"model.path={model}")) == 2
    error = capsys.readouterr().err
    assert error.startswith(place) and said in error
    assert error.count("\n") == 1 and not (tmp_path / "runs").exists()


def rename_tensor(file: Path) -> None:
    tensors = load_file(file)
    tensors["x_embedder.wheight"] = tensors.pop("x_embedder.weight")
    save_file(tensors, file)


def test_exported_lora_gives_the_evaluation_images_bit_for_bit(
    finished: Path, tmp_path: Path
) -> None:
    replayed = tmp_path / "replayed.png"
    subprocess.run(
        [sys.executable, "-m", "tests.integration.replay", finished / "export", replayed],
        cwd=ROOT, env=environment(), check=True, timeout=300,
    )  # fmt: skip
    after = Image.open(finished / "samples" / "step-00001.png")
    before = Image.open(finished / "samples" / "step-00000.png")
    assert ImageChops.difference(after, Image.open(replayed)).getbbox() is None
    assert ImageChops.difference(after, before).getbbox() is not None  # training moved the pictures
