"""Where an iteration waits for the device: once to score, once to read metrics, once an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gardo import session as sessions
from gardo.config import check
from gardo.session import Session, open_session
from gardo.train import train
from gardo.types import Metrics, to_device
from tests.integration.cases import Case
from tests.integration.faults import Around
from tests.integration.host_waits import DEVICE, HostWaits
from tests.integration.recipes import recipe

SCORES = "reward: cpu in types.py:together"
RATIO = "teachers: cpu in distributed/group.py:reduce"
NORM = "optimizer: __float__ in distributed/local.py:step"
METRICS = "train: cpu in distributed/group.py:reduce"
UPDATE = [NORM, NORM, METRICS]  # two updates
BUDGET = {
    "gardo": [SCORES, RATIO, *UPDATE],
    "kl_in_reward": [SCORES, RATIO, *UPDATE],
    "gardo_nft": [SCORES, *UPDATE],
    "awm": [SCORES, *UPDATE],
    "refl": [SCORES, *UPDATE],
}


class Phases(Around):
    """A progress that tells `waits` the phase; what it has seen is of the last iteration alone."""

    def __init__(self, session: Session, waits: HostWaits) -> None:
        super().__init__(session.progress)
        self.waits = waits

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name == "sample":
            self.waits.waits.clear()
            self.waits.mixed.clear()
        with self.inner.phase(name), self.waits.phase(name):
            yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def of_the_loop(seen: Sequence[str]) -> list[str]:
    """Not of evaluation, checkpoints and kept pictures, a reward's own, or of plain torch in a
    kernel's place."""
    others = "rewards/", "tiny/", "nearest_cosine.py", "sde_step.py", "philox.py:random_bits_ref"
    places = {call: call.split(" in ")[1] for call in seen}
    return [
        call
        for call in seen
        if not call.startswith(("evaluate", "checkpoint", "pictures"))
        and (places[call].startswith("rewards/base.py") or not places[call].startswith(others))
    ]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("algorithm", BUDGET)
def test_an_iteration_waits_for_nothing_else(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one, whose prompts are known: a new one waits for its embedding."""
    monkeypatch.setattr(sessions, "use_device", lambda _: DEVICE)
    case = Case(algorithm, "lora", "local", probes=(), steps=2)
    asked = recipe(case, tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one red circle\ntwo blue squares\n")
    asked["data"]["prompts"] = str(prompts)
    asked["evaluate"] |= {"prompt_count": 1, "steps": 1, "batch": 1}
    waits = HostWaits()
    with waits:
        session = open_session(check(asked, case.name), quiet=True)
        session.progress = Phases(session, waits)  # type: ignore[assignment]
        with session:
            train(session)
    assert of_the_loop(waits.waits) == BUDGET[algorithm]
    assert not of_the_loop(waits.mixed)


# ---- the counter itself --------------------------------------------------------------------------


def on_device(*values: float) -> Tensor:
    return to_device(torch.tensor(values), DEVICE)


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda x, h: x.sum().item(), ["item"]),
        (lambda x, h: [float(x[0]), int(x[1]), bool(x[2])], ["__float__", "__int__", "__bool__"]),
        (lambda x, h: x.tolist(), ["tolist"]),
        (lambda x, h: (x * 2).cpu().tolist(), ["cpu"]),
        (lambda x, h: (x > 0).nonzero(), ["nonzero"]),
        (lambda x, h: torch.unique(x), ["unique"]),
        (lambda x, h: x[x > 0], ["__getitem__"]),
        (lambda x, h: x[h.long()], ["__getitem__"]),
        (lambda x, h: x[to_device(h.long(), DEVICE)], []),
        (lambda x, h: x[1:].sum(), []),
        (lambda x, h: h.to(x.device) + x, ["to"]),
        (lambda x, h: to_device(h, x.device) + x, []),
        (lambda x, h: torch.zeros_like(x).copy_(h), ["copy_"]),
        (lambda x, h: torch.tensor([1.0], device=x.device), ["tensor"]),
        (lambda x, h: x.new_tensor([1.0]), ["new_tensor"]),
        (lambda x, h: torch.arange(3, device=x.device) + x, []),
        (lambda x, h: h[h > 0].tolist(), []),
        (lambda x, h: Metrics().mean("x", x)["x"], ["tolist"]),
    ],
)
def test_what_waits(call: Callable[[Tensor, Tensor], object], seen: list[str]) -> None:
    with HostWaits() as waits:
        call(on_device(0.0, 1.0, 2.0), torch.tensor([0.0, 1.0, 1.0]))
    assert [wait.split(": ")[1].split(" in ")[0] for wait in waits.waits] == seen
    assert not waits.mixed


def test_what_a_gpu_would_refuse() -> None:
    with HostWaits() as waits:
        x, h = on_device(0.0, 1.0), torch.ones(2)
        assert x.device == DEVICE and h.device != DEVICE
        _ = x + h, 2 * x, x + h.sum(), torch.stack([x, h])
    assert [m.split()[1] for m in waits.mixed] == ["add", "stack"]
