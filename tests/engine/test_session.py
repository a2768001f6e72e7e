"""What a session sets for its whole process, and what it refuses before anything loads."""

import os
import sys
from pathlib import Path

import pytest
import torch

from gardo.config import load
from gardo.machine import check_machine, use_deterministic_kernels
from gardo.recipe_errors import RecipeError
from tests.engine.config.recipe import written


def test_deterministic_kernels_leave_unwritten_memory_alone(monkeypatch):
    """torch fills all of it with NaN by default, every new_empty a pass over memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    was = torch.are_deterministic_algorithms_enabled()
    try:
        use_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.empty(4096).isnan().all()
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(was)


@pytest.mark.parametrize(
    ("fragment", "said"),
    [
        ("{model: {base: nf4}, distributed: {stage: 2}}",
         "model.base: nf4: needs bitsandbytes, which is not here; pip install bitsandbytes"),
        ("train: {optimizer: {name: adamw_8bit}}",
         "train.optimizer.name: adamw_8bit: needs bitsandbytes, which is not here; pip install "
         "bitsandbytes"),
        ("train: {optimizer: {name: deepspeed_fused}}",
         "train.optimizer.name: deepspeed_fused needs an NVIDIA GPU, this run is on the cpu; use "
         "adamw"),
    ],
)  # fmt: skip
def test_what_this_machine_lacks_is_refused(
    fragment: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by a recipe's check: `gardo plan` is for machines that are elsewhere."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    recipe = load(written(tmp_path, fragment))
    with pytest.raises(RecipeError) as raised:
        check_machine(recipe, 1, torch.device("cpu"), "here.yaml")
    assert str(raised.value) == f"here.yaml: {said}"
