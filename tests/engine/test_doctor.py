"""`gardo doctor`: what it finds here, and that it names what is broken."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import gardo_kernels
from gardo import cli
from gardo.doctor import machine as doctor
from gardo.doctor.finding import Finding
from gardo_kernels import Backend
from gardo_kernels._examples import Examples, On, op_modules
from tests import ROOT

RECIPE = "recipes/tiny_flux_gardo.yaml"
OPS = op_modules()


def found(kernels: Backend) -> dict[str, Finding]:
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


def test_a_gpu_that_torch_cannot_use_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "cuda_trouble", lambda: "driver 535.183.01 is too old")
    with pytest.raises(SystemExit) as ended:
        cli.app(["doctor", str(ROOT / RECIPE), "--set", "kernels=torch"])
    assert ended.value.code == 1
    assert f"problem  {'driver':22} driver 535.183.01 is too old\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("driver", "here", "hidden", "state", "said"),
    [
        (
            "580.65.06",
            [Path("/dev/nvidia0")],
            False,
            "ok",
            "580.65.06; torch is built for CUDA 13.0",
        ),
        ("580.65.06", [Path("/dev/nvidia0")], True, "note", "the environment hides its GPUs"),
        ("580.65.06", [], False, "note", "in a container, docker run --gpus all"),
        (None, [], False, "note", "no NVIDIA driver; torch is built for CUDA 13.0"),
    ],
)
def test_the_driver_is_named(
    monkeypatch: pytest.MonkeyPatch, driver: str | None, here: list[Path], hidden: bool,
    state: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(doctor, "driver_version", lambda: driver)
    monkeypatch.setattr(doctor, "devices", lambda: here)
    monkeypatch.setattr(doctor, "unwanted", lambda: hidden)
    finding = doctor._driver(None)
    assert finding.state == state and said in finding.detail


def surroundings(gpus: int, root: Path) -> dict[str, Finding]:
    return {f.name: f for f in doctor._surroundings(gpus, root)}


def test_what_a_run_writes_to_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # root may write in any folder, but not below a file
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "triton"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    found = surroundings(1, tmp_path)
    for name, mend in (("triton cache", "TRITON_CACHE_DIR"), ("hub cache", "HF_HOME")):
        assert found[name].state == "note" and found[name].detail.endswith(mend)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    assert surroundings(1, tmp_path)["hub cache"].state == "ok"


@pytest.mark.parametrize(
    ("gpus", "mebibytes", "state"), [(8, 64, "problem"), (1, 64, "ok"), (8, 1024, "ok")]
)
def test_little_shared_memory_is_named_where_gpus_need_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gpus: int, mebibytes: int, state: str
) -> None:
    (tmp_path / "dev/shm").mkdir(parents=True)
    disk = shutil.disk_usage(tmp_path)._replace(total=mebibytes * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: disk)
    finding = surroundings(gpus, tmp_path)["/dev/shm"]
    assert finding.state == state and finding.detail.startswith(f"{mebibytes} MiB")
    assert ("--shm-size=16g" in finding.detail) is (state == "problem")


def test_conda_and_a_home_that_cannot_be_written_are_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert surroundings(0, tmp_path)["environment"].state == "ok"
    (tmp_path / "conda-meta").mkdir()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    finding = surroundings(0, tmp_path)["environment"]
    assert finding.state == "note" and finding.detail.startswith(f"conda, {tmp_path}; the home")
    assert finding.detail.endswith("set HOME, or TRITON_CACHE_DIR and HF_HOME")


def test_what_the_environment_says_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = surroundings(2, tmp_path)
    assert found["pdsh"].detail == "not on the PATH; --hostfile needs it"
    (tmp_path / "pdsh").touch(mode=0o755)
    assert "CUDA_VISIBLE_DEVICES" not in found and "/job/hostfile" not in found
    assert found["PYTORCH_ALLOC_CONF"].detail == "not set; a run takes expandable_segments:True"
    for name in ("dev/nvidia0", "dev/nvidia1", "dev/nvidia7", "job/hostfile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,7")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    found = surroundings(2, tmp_path)
    assert found["CUDA_VISIBLE_DEVICES"].detail == "'0,7' leaves 2 of the 3 GPUs here"
    assert found["PYTORCH_ALLOC_CONF"].detail == "expandable_segments:True"
    assert found["/job/hostfile"].state == "note"
    assert found["pdsh"].state == "ok"


@pytest.mark.parametrize(("kernels", "state"), [("auto", "note"), ("triton", "problem")])
def test_triton_that_does_not_start_is_said_once(
    monkeypatch: pytest.MonkeyPatch, kernels: Backend, state: str
) -> None:
    """And no kernel is tried after it: each would say the same."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(gardo_kernels, "triton_trouble", lambda device: "no C compiler")
    first, *rest = doctor._kernels(torch.device("cuda", 0), kernels)
    assert first == Finding("kernels", state, "no C compiler")
    assert {finding.detail for finding in rest} == {"plain torch"}


def test_emulated_bfloat16_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a V100 or a T4, where torch alone says that it is there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    supported = lambda including_emulation=True: including_emulation  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    (finding,) = doctor._devices(torch.device("cuda", 0))
    assert finding.state == "problem" and "distributed.precision: float32" in finding.detail


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
