"""`rollout.batch: like_train`: one shape of all model calls, and so one rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from gardo.config import check
from gardo.report.metrics_log import read_metrics
from gardo.session import Session, open_session
from gardo.train import train
from tests.integration.cases import Case
from tests.integration.checks import check_metrics
from tests.integration.faults import Around
from tests.integration.recipes import recipe


class Shapes(Around):
    """A progress that notes the rows of the transformer's calls: {phase: {rows}}."""

    def __init__(self, session: Session) -> None:
        super().__init__(session.progress)
        self.now = ""
        self.seen: dict[str, set[int]] = {}
        session.policy.transformer.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: Any, args: Any, kwargs: Any) -> None:
        self.seen.setdefault(self.now, set()).add(len(kwargs["hidden_states"]))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer, self.now = self.now, name
        with self.inner.phase(name):
            yield
        self.now = outer


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def trained(asked: dict[str, Any], folder: Path) -> tuple[dict[str, set[int]], list[dict]]:
    """The rows of the calls of each phase, and what the iterations logged."""
    session = open_session(check(asked, "recipe"), quiet=True)
    session.progress = shapes = Shapes(session)  # type: ignore[assignment]
    with session:
        train(session)
    records = read_metrics(folder / asked["run"]["name"] / "metrics.jsonl")
    phases = {phase: shapes.seen[phase] for phase in ("sample", "teachers", "probe", "train")}
    return phases, [r for r in records if r["kind"] == "step"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("family", "branches"), [("flux", 1), ("sd3", 2)])
def test_all_calls_have_one_shape(family: str, branches: int, tmp_path: Path) -> None:
    """Eight samples are not whole calls of six, nor are the nine rows that ask the reference.

    Guidance of SD3 is two rows a sample.
    """
    asked = recipe(Case("gardo", "lora", "local", steps=2), tmp_path)
    asked["model"] |= {"family": family, "path": f"builtin:{family}"}
    asked["train"] |= {"updates_per_step": 1, "micro_batch": 6}
    asked["sampler"] |= {"train_steps": 3}
    asked["algorithm"] |= {"gate": {"fraction": 0.375, "limits": [0.1, 0.5]}}
    asked["evaluate"] |= {"prompt_count": 1, "steps": 1, "batch": 1}
    asked["rollout"] = {}
    short, usual = trained(asked, tmp_path)
    asked["rollout"], asked["run"]["name"] = {"batch": "like_train"}, "filled"
    equal, filled = trained(asked, tmp_path)
    b = branches
    trains = {"probe": {6 * b}, "train": {6 * b}}
    assert short == {"sample": {6 * b, 2 * b}, "teachers": {6 * b, 3 * b}, **trains}
    assert equal == {"sample": {6 * b}, "teachers": {6 * b}, **trains}
    assert [step["metrics"]["ratio_error"] for step in filled] == [0.0, 0.0]
    for one, two in zip(usual, filled, strict=True):
        check_metrics(one, two)
