"""NVIDIA machines that are not here: device files, drivers and torch builds that do not match."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gardo import nvidia
from gardo.nvidia import cuda_trouble, devices, driver_version, kernels_lacking, unwanted

PROPRIETARY = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Jun 13 20:36:11 UTC 2024
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
OPEN = """NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs@U22.04)
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root folder of a machine without nvidia-smi."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def install(root: Path, said: str) -> None:
    touch(root, "proc/driver/nvidia/version")
    (root / "proc/driver/nvidia/version").write_text(said)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ([], []),
        (["dev/nvidiactl"], ["dev/nvidiactl"]),
        (["dev/nvidia0", "dev/nvidia1", "dev/nvidiactl", "dev/nvidia-uvm", "dev/nvidia-caps/x"],
         ["dev/nvidia0", "dev/nvidia1"]),
        (["dev/dxg"], []),  # a Windows machine with another vendor's GPU
        (["dev/dxg", "usr/lib/wsl/lib/libcuda.so.1"], ["dev/dxg"]),
    ],
)  # fmt: skip
def test_devices(root: Path, files: list[str], found: list[str]) -> None:
    touch(root, *files)
    assert devices(root) == [root / name for name in found]


@pytest.mark.parametrize("said", [PROPRIETARY, OPEN])
@pytest.mark.parametrize("version", ["535.183.01", "580.65.06", "595.12"])
def test_the_kernel_says_the_drivers_version(root: Path, said: str, version: str) -> None:
    install(root, said.format(version))
    assert driver_version(root) == version


@pytest.mark.parametrize(
    ("script", "version"),
    [
        ("echo 570.86.15; echo 570.86.15", "570.86.15"),
        ("echo 'NVIDIA-SMI has failed because it could not reach 10.2.1 '; exit 9", None),
    ],
)
def test_nvidia_smi_says_it_where_the_kernel_does_not(
    root: Path, script: str, version: str | None
) -> None:
    assert driver_version(root) is None
    touch(root, "bin/nvidia-smi")
    (root / "bin/nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (root / "bin/nvidia-smi").chmod(0o755)
    assert driver_version(root) == version


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, False),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, False),
        ({"CUDA_VISIBLE_DEVICES": ""}, True),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, True),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, True),  # Slurm's, of a job without GPUs
        ({"DS_ACCELERATOR": "cpu"}, True),
        ({"DS_ACCELERATOR": "cuda"}, False),
    ],
)
def test_what_says_that_gpus_are_not_wanted(environ: dict[str, str], expected: bool) -> None:
    assert unwanted(environ) is expected


@pytest.mark.parametrize(
    ("built", "driver", "words", "said"),
    [
        ("13.0", "535.183.01", "The NVIDIA driver on your system is too old (found version 12020).",
         "is built for CUDA 13.0, which needs driver 580.65.06; install driver 580.65.06 or newer, "
         "or torch for CUDA 12: pip install 'torch==2.10.*'; DS_ACCELERATOR=cpu"),
        ("13.0", "470.256.02", "The NVIDIA driver on your system is too old (found version 11040).",
         "which needs driver 580.65.06; install driver 580.65.06 or newer; DS_ACCELERATOR=cpu"),
        ("12.8", "470.256.02", "The NVIDIA driver on your system is too old (found version 11040).",
         "which needs driver 525.60.13; install driver 525.60.13 or newer; DS_ACCELERATOR=cpu"),
        ("12.8", "535.183.01", "Error 802: system not yet initialized\nmore",
         "(CUDA 12.8) cannot use it: Error 802: system not yet initialized. In a container"),
        ("13.0", "580.65.06", "Found no NVIDIA driver on your system.", "docker run --gpus all"),
        (None, "580.65.06", "Torch not compiled with CUDA enabled",
         "is built without CUDA; install torch again without the index for CPUs"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said_with_its_mend(
    root: Path, monkeypatch: pytest.MonkeyPatch, built: str | None, driver: str, words: str,
    said: str,
) -> None:  # fmt: skip
    def init() -> None:
        raise (RuntimeError if built else AssertionError)(words)

    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(nvidia, "usable", lambda: 0)
    assert cuda_trouble(root, {}) is None  # no GPU, no trouble
    install(root, PROPRIETARY.format(driver))
    assert cuda_trouble(root, {}) is None  # a container that was given none of its host's
    touch(root, "dev/nvidia0")
    trouble = cuda_trouble(root, {})
    assert trouble is not None and said in trouble
    assert trouble.startswith(
        f"an NVIDIA GPU is here (driver {driver}), but torch {torch.__version__}"
    )
    assert cuda_trouble(root, {"DS_ACCELERATOR": "cpu"}) is None


def test_a_gpu_that_works_is_no_trouble_whatever_the_driver_says(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's compatibility package runs a newer CUDA on an older driver of a data centre."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvidia, "usable", lambda: 1)
    monkeypatch.setattr(torch.cuda, "init", lambda: pytest.fail("sets the allocator up too early"))
    install(root, PROPRIETARY.format("535.183.01"))
    touch(root, "dev/nvidia0")
    assert cuda_trouble(root, {}) is None


def test_this_torch_says_itself_why(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of torch is replaced: no build of it finds a GPU behind an empty file."""
    if torch.cuda.is_available():
        pytest.skip("CUDA works here")
    touch(root, "dev/nvidia0")
    trouble = cuda_trouble(root, {})
    assert trouble is not None
    assert trouble.startswith("an NVIDIA GPU is here (driver unknown), but torch ")
    assert ("built without CUDA" in trouble) is (torch.version.cuda is None)
    assert trouble.endswith(nvidia.INSTEAD)


@pytest.mark.parametrize(
    ("capability", "names", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),  # code for 8.0
        ((7, 0), ["sm_75", "sm_80", "sm_90", "compute_90"], False),  # a V100 and CUDA 13
        ((12, 0), ["sm_90", "compute_90"], True),  # compiled from PTX when it is loaded
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((10, 3), ["sm_100f"], True),
    ],
)
def test_a_gpu_without_kernels_is_named(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], names: list[str], runs: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: names)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    said = kernels_lacking(1)
    assert (said is None) is runs
    if said:
        major, minor = capability
        assert f"GPU 1 is of compute capability {major}.{minor}, and torch" in said
