"""Models of several files of tests, saved once."""

from __future__ import annotations

from pathlib import Path

import pytest

from gardo.rewards.dinov3 import Dinov3
from tests.engine.rewards import clip_models, geneval_models, tiny_pictures


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP folder, the same weights in open_clip's names, and an aesthetic head."""
    path = tmp_path_factory.mktemp("clip")
    clip_models.save_clip(path)
    return path


@pytest.fixture(scope="session")
def geneval_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`detector` and `clip`."""
    path = tmp_path_factory.mktemp("geneval")
    geneval_models.segmenter().save_pretrained(path / "detector")
    geneval_models.save_clip(path / "clip")
    return path


@pytest.fixture(scope="session")
def features() -> Dinov3:
    return tiny_pictures.build("dinov3", "features", path="builtin:dinov3", size=32)
