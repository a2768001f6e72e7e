"""`gardo doctor`: what it finds here, and that it names what is broken."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from gardo import cli, doctor
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


def test_the_command_reads_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    def command(setting: str) -> tuple[int | str | None, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.app(["doctor", str(ROOT / RECIPE), "--set", setting])
        return ended.value.code, *capsys.readouterr()

    code, out, err = command("kernels=torch")
    assert (code, err) == (0, "")
    kernels = [line.split(maxsplit=3) for line in out.splitlines() if " kernel " in line]
    assert kernels == [["ok", "kernel", op, "plain torch"] for op in OPS]
    expected = "--set kernels: 'cuda': input should be 'auto', 'triton' or 'torch'\n"
    assert command("kernels=cuda") == (2, "", expected)
