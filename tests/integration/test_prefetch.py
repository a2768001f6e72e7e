"""What ZeRO-3 gathers ahead while it trains, pass by pass, on two ranks.

DeepSpeed learns the order of the modules in the first training pass. From the second on nothing may
wait for its own gather, and no block that the end of the forward pass still holds is gathered again
for the backward pass: however the weights are gathered for passes without gradients, whatever the
ratio contract asks for in between.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gardo.config import check
from gardo.policies.embeddings import Text
from gardo.session import Session, open_session
from gardo.train import train
from tests.integration.cases import Case
from tests.integration.faults import FAULTS
from tests.integration.launch import Launched
from tests.integration.recipes import recipe

FETCHED = ("forward_fetch_submit", "backward_fetch_submit")
AHEAD = ("forward_prefetch_submit", "backward_prefetch_submit")
CASES = [
    Case("gardo", "lora", "stage3", ("once",), steps=2),  # with a teacher
    Case("gardo", "lora", "stage3", ("each",), steps=2),
    Case("flow_grpo", "lora", "stage3", ("each", "recompute"), steps=2),
    Case("diffusion_nft", "lora", "stage3", ("each", "full"), steps=2),  # without a ratio
]
STALE = Case("flow_grpo", "lora", "stage3", ("once",), steps=2, fault="stale")


class Passes:
    """Stands in for DeepSpeed's profiler of gathers: elements by event, a dictionary a pass."""

    def __init__(self) -> None:
        self.seen: list[Counter[str]] = []

    def reset_events(self) -> None:
        self.seen.append(Counter(gradients=int(torch.is_grad_enabled())))

    def start_event(self, name: str) -> None:
        pass

    def stop_event(self, name: str, elements: int) -> None:
        self.seen[-1][name] += elements

    def log_events(self) -> None:
        pass


def count(folder: Path, cases: Sequence[Case]) -> None:
    """A rank: trains the cases, and writes what each training pass has gathered."""
    for case in cases:
        session = open_session(check(recipe(case, folder), case.name), quiet=True)
        FAULTS[case.fault].opened(session)
        passes = Passes()
        optimizer = session.engine._engine.optimizer  # type: ignore[attr-defined]
        coordinator = optimizer.parameter_offload.param_coordinator
        coordinator._PartitionedParameterCoordinator__profiler = passes
        asked = watch_encoders(session)
        with session:
            train(session)
        if session.log:
            trained = [seen for seen in passes.seen if seen["gradients"]]
            facts = {"trained": trained, "asked": asked}
            (folder / f"{case.name}.json").write_text(json.dumps(facts))


def watch_encoders(session: Session) -> list[bool]:
    """Whether the weights were whole, each time that the text encoders are asked."""
    embeddings, asked = session.policy.embeddings, []
    parameters = list(session.policy.transformer.parameters())
    encode = embeddings._encode

    def watched(prompts: list[str]) -> Text:
        asked.append(all(p.numel() == p.ds_numel for p in parameters))
        return encode(prompts)

    embeddings._encode = watched
    return asked


def views(case: Case, folder: Path) -> None:
    """A rank alone: what it gathers is what it keeps, and nothing is copied."""
    session = open_session(check(recipe(case, folder), case.name), quiet=True)
    parameters = list(session.policy.transformer.parameters())
    assert "a rank alone has them whole" in session.engine.gather_note
    assert all(p.numel() == 0 for p in parameters)
    with session.engine.reading("train"):
        assert all(p.numel() == p.ds_numel > 0 for p in parameters)
        assert all(p.data_ptr() == p.ds_tensor.data_ptr() for p in parameters)
    session.engine.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefetch")
    Launched(2, count, folder, [*CASES, STALE]).wait()
    return folder


def facts_of(folder: Path, case: Case) -> Any:
    return json.loads((folder / f"{case.name}.json").read_text())


def passes_of(folder: Path, case: Case) -> list[Counter[str]]:
    return [Counter(seen) for seen in facts_of(folder, case)["trained"]]


def check_learnt(passes: Sequence[Counter[str]]) -> None:
    """The tiny model fits under the limits: its forward pass gathers all, and all of it ahead."""
    for seen in passes:
        assert not any(seen[event] for event in FETCHED)
        assert seen["forward_prefetch_submit"] > 1_000_000
        assert seen["backward_prefetch_submit"] == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_training_pass_but_the_first_gathers_ahead(folder: Path, case: Case) -> None:
    first, *others = passes_of(folder, case)
    assert all(first[event] for event in FETCHED)
    assert not any(first[event] for event in AHEAD)
    assert len(others) == 7  # 2 iterations of 2 updates of 2 micro-batches
    check_learnt(others)


def test_a_forward_pass_that_is_thrown_away_is_not_learnt(folder: Path) -> None:
    """The contract's, where old velocities have to be computed again, in the first iteration."""
    thrown, first, *others = passes_of(folder, STALE)
    assert thrown["forward_fetch_submit"] and not thrown["backward_fetch_submit"]
    assert all(first[event] for event in FETCHED)
    assert len(others) == 8  # one more is thrown away in the second iteration
    check_learnt(others)


def test_prompts_are_encoded_before_the_weights_are_whole(folder: Path) -> None:
    """Text encoders that wait in host memory would have to fit beside them."""
    asked = facts_of(folder, CASES[0])["asked"]
    assert asked and not any(asked)


def test_a_rank_alone_gathers_views(tmp_path: Path) -> None:
    Launched(1, views, Case("gardo", "full", "stage3"), tmp_path).wait()
