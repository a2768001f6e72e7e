"""What a checkpoint must not hold, and one that has got another step's name."""

from __future__ import annotations

from pathlib import Path

import pytest

from gardo.distributed.optimizers import MOMENTS
from gardo.distributed.saved import Saved, committed
from tests.engine.distributed.test_checkpoint import Run, equal


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["master", *MOMENTS, "slot.old"])
@pytest.mark.parametrize("wait", [True, False])
def test_not_finite_is_not_saved(tmp_path: Path, kind: str, number: float, wait: bool) -> None:
    """And no older checkpoint is given up for it."""
    run = Run(tmp_path, keep=1).train_and_save(1)
    run.train(1)
    state = run.engine.optimizer.state[run.model[2].bias]
    spoiled = {
        "master": run.model[2].bias.data,
        "slot.old": run.slots.pieces("old")[3],
        **{name: state[name] for name in MOMENTS},
    }
    spoiled[kind][1] = number
    said = run.save(wait=wait) or run.checkpoints.settle()
    assert said and f"{kind} of 2.bias@0 is not finite" in said
    assert [p.name for p in committed(tmp_path)] == ["step-000001"]


def test_a_renamed_checkpoint_is_passed_over_and_kept(tmp_path: Path) -> None:
    run = Run(tmp_path, keep=3).train_and_save(3)
    (tmp_path / "step-000001").rename(tmp_path / "step-000007")
    resumed = Run(tmp_path)
    saved, wrong = resumed.resume()
    assert saved and saved.step == 3 and equal(resumed.bits(), run.bits())
    assert wrong == [f"{tmp_path / 'step-000007'}: this is step-000001; rename it"]
    resumed.checkpoints.set_aside(saved)
    (aside,) = tmp_path.glob("step-000007.misnamed-*")
    aside.rename(tmp_path / "step-000001")
    assert Saved(tmp_path / "step-000001").damage() is None
