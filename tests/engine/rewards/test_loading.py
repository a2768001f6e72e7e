"""Folders, files and weights that are not what a reward needs: one clear error each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from gardo.config import reward_sections
from gardo.hub import download_command
from gardo.rewards._files import TOKENIZER, WEIGHTS
from gardo.rewards.assembly import load_rewards
from tests.engine.rewards.clip_models import (
    build,
)


class Trap:
    """Touches a file if its pickle is ever run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["trap.pt", "text.pt", "text.safetensors"])
def test_a_file_of_something_else_is_refused_and_not_run(
    clip_folder: Path, tmp_path: Path, file: str
) -> None:
    torch.save({"state_dict": {"x": Trap(tmp_path / "ran")}}, tmp_path / "trap.pt")
    for text in ("text.pt", "text.safetensors"):
        (tmp_path / text).write_text("not weights")
    with pytest.raises(ValueError, match=f"{file} cannot be read as tensors"):
        build("hpsv2", clip_folder, path=str(tmp_path), file=file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [{"state_dict": {"x": 3}}, {}, [torch.zeros(2)]])
def test_a_file_without_a_state_dict_is_refused(
    clip_folder: Path, tmp_path: Path, content: object
) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd.pt holds no state dict"):
        build("hpsv2", clip_folder, path=str(tmp_path), file="odd.pt")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("pickscore", {"path": "./none"}, "no folder with config.json: './none'"),
        ("clipscore", {"path": "./none"}, "no folder with config.json: './none'"),
        ("aesthetic", {"path": "./none"}, "no folder with config.json: './none'"),
        ("hpsv2", {"base": "./none"}, "no folder with config.json: './none'"),
        ("pickscore", {"tokenizer": "./none"}, "no folder with tokenizer_config.json"),
        ("hpsv2", {"path": "./none"}, "no folder with HPS_v2.1_compressed.pt: './none'"),
        ("hpsv2", {"path": "./none", "version": "v2"}, "no folder with HPS_v2_compressed.pt"),
        ("aesthetic", {"head": "./none"}, "no folder with head.pth: './none'"),
        ("clipscore", {"path": "builtin:dinov3"}, "holds a model of type 'dinov3_vit'"),
        ("aesthetic", {"path": "builtin:dinov3"}, "holds a model of type 'dinov3_vit'"),
        ("hpsv2", {"base": "builtin:dinov3"}, "base: .* a model of type 'dinov3_vit'"),
    ],
)
def test_a_wrong_folder_is_one_clear_error(
    clip_folder: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, clip_folder, **settings)


def test_a_folder_without_weights_or_with_half_of_them(clip_folder: Path, tmp_path: Path) -> None:
    for file in clip_folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"path: .* holds no weights: .*no file named model"):
        build("pickscore", tmp_path)
    state = load_file(clip_folder / "model.safetensors")
    del state["visual_projection.weight"], state["logit_scale"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks logit_scale and 1 more"):
        build("pickscore", tmp_path)


def test_a_tokenizer_of_another_vocabulary_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    CLIPTokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 2 tokens, the model \d+"):
        build("pickscore", clip_folder, tokenizer=str(tmp_path))


ID = "some-owner/some-model"
MODEL = ("config.json", *WEIGHTS)


@pytest.mark.parametrize(
    ("kind", "fields", "files"),
    [
        ("clipscore", {}, MODEL),
        ("aesthetic", {}, MODEL),
        ("dinov3", {}, MODEL),
        ("hpsv2", {"base": ID}, ("HPS_v2.1_compressed.pt",)),
        ("imagereward", {"tokenizer": ID}, ("ImageReward.pt",)),
        ("geneval", {"clip": ID}, MODEL),
        ("yes_no", {}, (*MODEL, *TOKENIZER)),
    ],
)
def test_a_hub_id_that_is_not_here_is_named_with_what_gets_it(
    kind: str, fields: dict[str, Any], files: tuple[str, ...], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the loaders themselves, as rewards of one's own meet them: no field says which files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    settings = reward_sections({"mine": {"kind": kind, "path": ID, **fields}}, "a file")["mine"]
    with pytest.raises(ValueError) as raised:
        load_rewards({"mine": settings}, torch.device("cpu"))
    assert str(raised.value) == (
        f"rewards.mine.path: '{ID}' is not on this machine, and the hub is out of reach; run "
        f"`{download_command(ID, files=files)}` where it is in reach, or give a local folder"
    )
