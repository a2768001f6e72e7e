"""Every optimizer of the table: it is AdamW, a resume of it is exact, and what it needs is told."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from gardo.distributed import optimizers
from gardo.distributed.checkpoint import Checkpoints, CheckpointSettings
from gardo.distributed.local import LocalEngine
from gardo.distributed.optimizers import (
    OPTIMIZERS,
    Name,
    OptimizerSettings,
    build_optimizer,
    check_here,
    moment_bytes,
)
from gardo.settings import FieldError

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
WIDTH = 320  # its square is above what bitsandbytes keeps in 8 bits, and in pages
HERE = [
    "adamw",
    "adamw_8bit",
    "adamw_paged",  # refused for a run on a CPU, where its state is the same without pages
    "adamw_8bit_paged",
    pytest.param("deepspeed_cpu", marks=pytest.mark.full),  # compiled for a minute or two
]
ON_GPU = [name for name, row in OPTIMIZERS.items() if row.offload is not True]


class Run:
    """A linear layer in training on a device, with its checkpoints."""

    def __init__(self, name: str, folder: Path, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Linear(WIDTH, WIDTH)
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / WIDTH**0.5
        self.model.to(device)
        self.engine = LocalEngine(
            dict(self.model.named_parameters()),
            optimizer=OptimizerSettings(name=name, lr=0.01),  # type: ignore[arg-type]
            accumulation=1,
            max_grad_norm=1.0,
            device=device,
        )
        self.checkpoints = Checkpoints(folder, self.engine, CheckpointSettings(every=1))
        self.step = 0

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.step += 1
            x = torch.linspace(-1, 1, WIDTH, device=self.engine.device) * self.step
            self.engine.backward(self.model(x.sin()).square().mean(), last=True)
            self.engine.step()
        return self

    def save(self) -> Run:
        assert self.checkpoints.save(self.step, {}) is None
        return self

    def resume(self) -> Run:
        saved, wrong = self.checkpoints.newest()
        assert saved and not wrong
        self.checkpoints.restore(saved)
        self.step = saved.step
        return self

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().cpu().clone() for p in self.model.parameters()]


def equal(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def check_resume(name: str, folder: Path, device: torch.device) -> None:
    """After a step, and before the first one; many steps, since powers of beta add up errors."""
    for before in (0, 20):
        uncut = Run(name, folder / str(before), device).train(before).save()
        resumed = Run(name, folder / str(before), device).resume()
        assert equal(resumed.weights(), uncut.weights())
        further = uncut.train(12).weights()
        assert equal(resumed.train(12).weights(), further)
        forgetful = Run(name, folder / str(before), device).resume()
        forgetful.engine.optimizer.state.clear()
        assert equal(forgetful.train(12).weights(), further) == (before == 0)


def check_adamw(name: str, folder: Path, device: torch.device) -> None:
    """The textbook's steps, in fp32 to last bits; 8-bit moments to a few percent of a step."""
    run = Run(name, folder, device)
    start = run.weights()
    rows = [p.double().requires_grad_() for p in start]
    textbook = torch.optim.AdamW(rows, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4,
                                 foreach=False, fused=False)  # fmt: skip
    for step in range(1, 6):
        x = torch.linspace(-1, 1, WIDTH).mul(step).sin().double()
        loss = (rows[0] @ x + rows[1]).square().mean()
        textbook.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(rows, 1.0)
        textbook.step()
    moved = [(now - then).abs().mean() for now, then in zip(rows, start, strict=True)]
    off = [(a - b).abs().mean() for a, b in zip(run.train(5).weights(), rows, strict=True)]
    most = 0.05 if moment_bytes(name) < 8 else 1e-3
    assert all(o < most * m for o, m in zip(off, moved, strict=True))


@pytest.mark.parametrize("name", HERE)
def test_a_resume_is_exact(name: str, tmp_path: Path) -> None:
    check_resume(name, tmp_path, CPU)


@pytest.mark.parametrize("name", HERE)
def test_it_is_adamw(name: str, tmp_path: Path) -> None:
    check_adamw(name, tmp_path, CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_a_resume_is_exact_on_a_gpu(name: str, tmp_path: Path) -> None:
    check_resume(name, tmp_path, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_it_is_adamw_on_a_gpu(name: str, tmp_path: Path) -> None:
    check_adamw(name, tmp_path, torch.device("cuda"))


@pytest.mark.parametrize("name", HERE)
def test_moments_take_what_the_table_says(name: str, tmp_path: Path) -> None:
    optimizer = Run(name, tmp_path, CPU).train(1).engine.optimizer
    state = max(optimizer.state.values(), key=lambda s: sum(map(size, s.values())))
    tables = {key for key in state if key.startswith("qmap")}  # shared by all weights
    held = sum(size(value) for key, value in state.items() if key not in {*tables, "step"})
    assert held / WIDTH**2 == pytest.approx(moment_bytes(name), rel=1e-3)


def size(value: object) -> int:
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def test_torchs_moments_are_as_wide_as_the_masters() -> None:
    (parameter,) = [nn.Parameter(torch.ones(64, dtype=torch.bfloat16))]
    parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer([parameter], OptimizerSettings())
    optimizer.step()
    held = sum(size(value) for key, value in optimizer.state[parameter].items() if key != "step")
    assert held / 64 == moment_bytes("adamw", "bfloat16") == 4


def test_the_table_has_every_name() -> None:
    assert tuple(OPTIMIZERS) == get_args(Name)


# ---- what is not here ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "instead"),
    [("adamw_paged", "adamw"), ("adamw_8bit_paged", "adamw_8bit"), ("deepspeed_fused", "adamw")],
)
def test_a_gpus_optimizer_is_refused_on_a_cpu(name: str, instead: str) -> None:
    said = (
        f"train.optimizer.name: {name} needs an NVIDIA GPU, this run is on the cpu; use {instead}"
    )
    with pytest.raises(FieldError) as raised:
        check_here(name, CPU)
    assert str(raised.value) == said


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_here("adamw_8bit", CPU)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(FieldError, match=r"^train\.optimizer\.name: adamw_8bit: needs bitsandbytes,"
                       r" which is not here; pip install bitsandbytes$"):  # fmt: skip
        check_here("adamw_8bit", CPU)


@pytest.mark.parametrize("there", [(), ("g++",)])
def test_a_missing_compiler_is_named(
    there: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tool in there:
        (tmp_path / tool).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = "ninja" if there else "g++"
    with pytest.raises(FieldError) as raised:
        check_here("deepspeed_cpu", CPU)
    assert str(raised.value) == (
        "train.optimizer.name: deepspeed_cpu is compiled when it is first used, and there is no "
        f"{missing}; install it, or use adamw"
    )


@pytest.mark.parametrize("home", [None, "/nowhere"])
def test_a_missing_nvcc_is_named(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", home)
    assert not optimizers._has("nvcc")
