"""A fresh policy of either family on a tiny random pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gardo.plugins import resolve
from gardo.policies.base import Policy
from tests.engine.policies.tiny import CPU, FAMILIES, HEIGHT, WIDTH, Make


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random pipelines in diffusers format, one a family."""
    root = tmp_path_factory.mktemp("pipelines")
    for family, build in FAMILIES.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            pipeline = build()
            pipeline.vae.register_to_config(scaling_factor=0.7, shift_factor=0.1)
            if family == "sd3":  # as in a real checkpoint: not what the class would compute
                pipeline.transformer.pos_embed.pos_embed.mul_(1.5)
            pipeline.save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="session")
def make(folders: dict[str, Path]) -> Make:
    """A fresh policy: make(family, settings...)."""

    def build(family: str, /, dtype: torch.dtype = torch.float32, **settings: Any) -> Policy:
        plugin = resolve("gardo.policies", family)
        given = {"path": str(folders[family]), "size": [HEIGHT, WIDTH], "text_tokens": 8}
        return plugin(plugin.Settings(**(given | settings)), dtype=dtype, device=CPU)

    return build


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def policy(make: Make, family: str) -> Policy:
    """Shared by the tests that change nothing."""
    return make(family)
