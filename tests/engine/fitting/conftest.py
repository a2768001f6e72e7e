"""One fit for several files of tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from gardo.fitting.command import fit_reward
from tests.engine.fitting import drawn
from tests.engine.rewards import clip_models


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn.write(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def fitted(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fit") / "fitted"
    fit_reward(pairs, drawn.wanted(out))
    return out


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    clip_models.save_clip(path)
    return path
