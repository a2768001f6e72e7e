"""What a run is refused for on this machine, or does without."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import torch

import gardo_kernels
from gardo import cli, machine, train
from gardo.config import load
from gardo.distributed.group import Group
from gardo.machine import (
    as_it_runs,
    blocks_trouble,
    check_accelerator,
    kernels_trouble,
)
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError
from tests.engine.config.recipe import written

CPU = torch.device("cpu")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "devices", list)
    monkeypatch.setattr(machine, "driver_version", lambda: None)
    monkeypatch.setattr(machine, "cuda_trouble", lambda: None)


def folder_of(tmp_path: Path, size: int) -> Path:
    """A diffusers folder whose transformer takes `size` bytes in two files; of holes."""
    folder = tmp_path / "flux"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    for part in (1, 2):
        with open(folder / "transformer" / f"{part}.safetensors", "wb") as file:
            file.truncate(size // 2)
    return folder


def test_a_gpu_that_torch_cannot_use_is_no_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command and by every rank; the demo's model too, or it would seem to work."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(machine, "cuda_trouble", lambda: "the driver is from 2019")
    path = written(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.app(["train", str(path)])
    assert ended.value.code == train.main([str(path)]) == 2
    assert capsys.readouterr().err == 2 * f"{path}: the driver is from 2019\n"
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_accelerator(load(path), "here.yaml")


def test_a_rank_that_does_not_see_its_gpu_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Slurm may show each task its own GPU alone; the ranks count on seeing all."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(machine, "cuda_trouble", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(machine, "kernels_lacking", lambda index: None)
    monkeypatch.setenv("RANK", "11")
    recipe = load(written(tmp_path))
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_accelerator(recipe, "here.yaml")
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(RecipeError, match="rank 11 is to use GPU 3 of its machine and sees 1; let"):
        check_accelerator(recipe, "here.yaml")
    assert train.main([str(tmp_path / "recipe.yaml")]) == 2  # by the rank itself: no other knows
    assert "rank 11 is to use GPU 3" in capsys.readouterr().err


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_hidden_is_not_said_to_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(written(tmp_path, f"model: {{path: {folder_of(tmp_path, 2_400_000_000)}}}"))
    monkeypatch.setattr(machine, "devices", lambda: [Path("/dev/nvidia0")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RecipeError, match="CPU: CUDA_VISIBLE_DEVICES='' hides the NVIDIA GPU; "):
        check_accelerator(recipe, "here.yaml")


@pytest.mark.usefixtures("no_gpu")
def test_a_full_size_model_is_not_trained_on_a_cpu_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path, 2_400_000_000)
    recipe = load(written(tmp_path, f"model: {{path: {folder}}}"))
    with pytest.raises(RecipeError) as raised:
        check_accelerator(recipe, "here.yaml")
    assert str(raised.value) == (
        f"here.yaml: model.path: '{folder}' (a transformer of 2.4 GB) would train on the CPU: no "
        "NVIDIA GPU is here; train it where there is one, or set DS_ACCELERATOR=cpu if the CPU is "
        "meant"
    )
    monkeypatch.setattr(machine, "driver_version", lambda: "580.65.06")
    with pytest.raises(RecipeError, match=r"has the driver \(a container\? docker run --gpus all"):
        check_accelerator(recipe, "here.yaml")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    check_accelerator(recipe, "here.yaml")


@pytest.mark.usefixtures("no_gpu")
def test_the_command_refuses_before_it_says_cpu_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, "model: {path: black-forest-labs/FLUX.1-dev}")
    with pytest.raises(SystemExit) as ended:
        cli.app(["train", str(path)])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "'black-forest-labs/FLUX.1-dev' (full size, from the hub) would" in err


@pytest.mark.usefixtures("no_gpu")
def test_a_small_folder_trains_on_a_cpu(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 900_000_000)
    check_accelerator(load(written(tmp_path, f"model: {{path: {folder}}}")), "here.yaml")
    check_accelerator(load(written(tmp_path)), "here.yaml")


def triton_recipe(tmp_path: Path, kernels: str) -> Recipe:
    return load(written(tmp_path, f"kernels: {kernels}"))


def test_triton_that_does_not_start_is_refused_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = triton_recipe(tmp_path, "triton")
    assert kernels_trouble(recipe, CPU, "here.yaml") == ""  # the interpreter starts
    monkeypatch.setattr(gardo_kernels, "triton_trouble", lambda device: "no C compiler")
    with pytest.raises(RecipeError) as raised:
        kernels_trouble(recipe, CPU, "here.yaml")
    assert str(raised.value) == "here.yaml: kernels: triton: no C compiler; or use auto or torch"


@pytest.mark.parametrize(
    ("kernels", "device", "said"),
    [("auto", "cuda", "no C compiler"), ("torch", "cuda", ""), ("auto", "cpu", "")],
)
def test_triton_is_tried_where_it_would_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str, device: str, said: str
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(gardo_kernels, "triton_trouble", lambda device: "no C compiler")
    recipe = triton_recipe(tmp_path, kernels)
    assert kernels_trouble(recipe, torch.device(device), "here.yaml") == said


def test_a_gpu_without_a_compiler_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing replaced: the trial fails on a GPU that is not here, and is asked why."""
    if torch.cuda.is_available():
        pytest.skip("a kernel starts here")
    monkeypatch.setenv("CC", "/nowhere/cc")
    recipe = triton_recipe(tmp_path, "auto")
    said = kernels_trouble(recipe, torch.device("cuda", 0), "here.yaml")
    assert said == gardo_kernels.triton_trouble(torch.device("cuda", 0)) and said.startswith(
        "Triton needs "
    )
    assert f"python{sys.version_info.major}.{sys.version_info.minor}-dev" in said


def test_a_run_without_triton_takes_plain_torch_and_says_why(tmp_path: Path) -> None:
    recipe = triton_recipe(tmp_path, "auto")
    assert as_it_runs(recipe, Group(CPU), kernels="", blocks="") == (recipe, [])
    used, notes = as_it_runs(recipe, Group(CPU), kernels="no C compiler", blocks="")
    assert used == recipe.model_copy(update={"kernels": "torch"}) != recipe
    said = f"no C compiler ({socket.gethostname()})"
    assert notes == [f"kernels: auto is plain torch here, not Triton: {said}"]


def compiling(tmp_path: Path, wanted: str) -> Recipe:
    return load(written(tmp_path), [f"train.compile={wanted}"])


def test_blocks_that_do_not_compile_are_refused_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "compile_trouble", lambda device: "no g++")
    assert blocks_trouble(compiling(tmp_path, "none"), CPU, "here.yaml") == ""
    assert blocks_trouble(compiling(tmp_path, "auto"), CPU, "here.yaml") == "no g++"
    with pytest.raises(RecipeError) as raised:
        blocks_trouble(compiling(tmp_path, "blocks"), CPU, "here.yaml")
    assert str(raised.value) == "here.yaml: train.compile: blocks: no g++; or use none"


def test_a_gpu_run_compiles_unless_a_rank_cannot(tmp_path: Path) -> None:
    recipe = compiling(tmp_path, "auto")
    used, notes = as_it_runs(recipe, Group(CPU), kernels="", blocks="")
    assert (used.train.compile, notes) == ("blocks", [])
    used, notes = as_it_runs(recipe, Group(CPU), kernels="", blocks="no g++")
    assert used.train.compile == "none"
    assert notes == [f"train.compile: auto is none here: no g++ ({socket.gethostname()})"]
