"""Ranks of which one cannot start Triton: all of a run take plain torch, or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gardo.config import read_yaml
from gardo.train import main
from tests.integration.launch import DEMO, Launched, settings_for


def train_where_the_second_rank_has_no_compiler(settings: list[str]) -> int:
    """The demo, told of a trouble that only a machine with a GPU can have."""
    from gardo import phases, session

    trouble = "no C compiler" if os.environ["RANK"] == "1" else ""
    taken = set()
    sample = phases.sample

    def noted(*arguments: object, kernels: str, **more: object) -> object:
        taken.add(kernels)
        return sample(*arguments, kernels=kernels, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "kernels_trouble", lambda *_: trouble)
        patch.setattr(phases, "sample", noted)
        code = main([str(DEMO), *settings])
    return code or int(taken != {"torch"})


def test_all_ranks_take_plain_torch_where_one_must(tmp_path: Path) -> None:
    """They judge the gathered samples each for itself, and must come to the same gates."""
    settings = settings_for(tmp_path)
    said = Launched(2, train_where_the_second_rank_has_no_compiler, settings).wait()
    assert "kernels: auto is plain torch here, not Triton: no C compiler" in said
    (recipe,) = tmp_path.glob("*/recipe.yaml")
    assert read_yaml(recipe.read_text(), "recipe.yaml")["kernels"] == "auto"  # as it was asked for
