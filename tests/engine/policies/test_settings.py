"""A model's folder with something wrong in it is refused with the recipe, and the file is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gardo.policies.settings import check_parts
from gardo.settings import BUILTIN
from tests.engine.config.recipe import refusal, written

Damage = Callable[[Path], object]
VAE = "vae/diffusion_pytorch_model.safetensors"


def text(file: str, content: str) -> Damage:
    return lambda folder: (folder / file).write_text(content)


def cut(file: str, size: int) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def without(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def sharded(folder: Path) -> None:
    """An index that names a file which was never downloaded."""
    weight_map = {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


DAMAGE: dict[str, tuple[Damage, str]] = {
    "no index": (without("model_index.json"), "has no model_index.json"),
    "index is a list": (text("model_index.json", "[]"), "model_index.json' holds a list"),
    "index is cut": (cut("model_index.json", 50), "model_index.json' cannot be read"),
    "index is deep": (text("model_index.json", "[" * 10**5), "model_index.json' cannot be read"),
    "another's index": (
        text("model_index.json", '{"_class_name": "StableDiffusion3Pipeline"}'),
        "holds a StableDiffusion3Pipeline, this family needs a FluxPipeline",
    ),
    "a part is missing": (
        lambda folder: shutil.rmtree(folder / "text_encoder_2"),
        "text_encoder_2' is missing, a part of the pipeline",
    ),
    "configuration is a list": (text("vae/config.json", "[1]"), "vae/config.json' holds a list"),
    "configuration lacks a value": (text("vae/config.json", "{}"), "has no block_out_channels"),
    "configuration is no text": (
        lambda folder: (folder / "text_encoder/config.json").write_bytes(b"\xff\xfe"),
        "text_encoder/config.json' cannot be read",
    ),
    "weights are cut": (cut(VAE, 5000), "diffusion_pytorch_model.safetensors cannot be read"),
    "weights are empty": (cut(VAE, 0), "diffusion_pytorch_model.safetensors cannot be read"),
    "weights are a page": (text(VAE, "<html>" * 99), "safetensors cannot be read"),
    "weights are missing": (without(VAE), "vae' has no weights"),
    "a shard is missing": (sharded, "00002-of-00002.safetensors' is missing"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUILTIN / "flux", tmp_path / "flux"))


@pytest.mark.parametrize("case", DAMAGE)
def test_refused(case: str, folder: Path) -> None:
    damage, said = DAMAGE[case]
    damage(folder)
    path = written(folder.parent, f"model: {{path: '{folder}'}}")
    message = refusal(path)
    assert message.startswith(f"{path}: model") and said in message and "\n" not in message


def test_a_whole_folder_has_all_its_parts(folder: Path) -> None:
    check_parts(str(folder))
    check_parts("builtin:sd3")
    check_parts("owner/name")  # nothing of it is here
