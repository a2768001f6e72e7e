"""`gardo doctor`: what it finds here, and that it names what is broken."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

from gardo import doctor
from gardo_kernels import Backend
from gardo_kernels._examples import Examples, On, op_modules
from tests import ROOT

RECIPE = "recipes/tiny_flux_gardo.yaml"
OPS = op_modules()


def found(kernels: Backend) -> dict[str, doctor.Finding]:
    return {f.name: f for f in doctor.examine(kernels)}


def test_every_kernel_runs_and_is_near_plain_torch() -> None:
    """By the kernels themselves: under the interpreter where there is no GPU."""
    lines = [f for name, f in found("triton").items() if name.startswith("kernel ")]
    assert {f.name for f in lines} == {f"kernel {op}" for op in OPS}
    for finding in lines:
        assert finding.state == "ok" and finding.detail.startswith("triton, off"), finding


def test_plain_torch_is_named() -> None:
    findings = found("torch")
    assert {findings[f"kernel {op}"].detail for op in OPS} == {"plain torch"}
    assert findings["torch"].detail == version("torch")
    assert not [f for f in findings.values() if f.state == "problem"]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda on: [0.0, float(on.backend == "triton")], "off plain torch by 1.0"),
        (lambda on: 1 / 0, "does not run: division by zero"),
        (lambda on: [0.1, torch.nan], "off plain torch by nan"),
        (lambda on: [0.0] * (1 + (on.backend == "triton")), "does not run: zip"),
    ],
)
def test_a_broken_kernel_is_named(monkeypatch: pytest.MonkeyPatch, broken, says) -> None:  # type: ignore[no-untyped-def]
    def examples(on: On) -> Examples:
        yield "", [torch.tensor(value) for value in broken(on)]

    monkeypatch.setattr(OPS["policy_loss"], "examples", examples)
    finding = found("triton")["kernel policy_loss"]
    assert finding.state == "problem" and says in finding.detail


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gardo.cli", "doctor", *arguments],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def test_the_command_reads_a_recipe() -> None:
    done = command(RECIPE, "--set", "kernels=torch")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernel sde_step" in done.stdout and "plain torch" in done.stdout
    wrong = command(RECIPE, "--set", "kernels=cuda")
    assert wrong.returncode == 2 and "kernels" in wrong.stderr and not wrong.stdout
