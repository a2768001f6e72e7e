"""What Triton needs beside a GPU, taken away: each lack is named, by real builds that fail."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from gardo_kernels._trial import cache_trouble, compiler_trouble, triton_trouble
from tests import ROOT

PACKAGE = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"


HEADERS = Path(sysconfig.get_config_var("INCLUDEPY")) / "Python.h"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with nothing on it; headers that no compiler will read."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setitem(sysconfig.get_config_vars(), "INCLUDEPY", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_a_kernel_starts_here() -> None:
    """In the interpreter where there is no GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert triton_trouble(device) == ""


@pytest.mark.skipif(
    not (HEADERS.is_file() and shutil.which("gcc")), reason="needs gcc and Python's headers"
)
def test_what_is_here_is_enough() -> None:
    assert compiler_trouble() == ""


def test_a_machine_without_a_compiler_is_told_which_package(no_compiler: Path) -> None:
    said = compiler_trouble()
    assert said.startswith("Triton needs a C compiler, and none works here (Failed to find C comp")
    assert said.endswith(f"apt-get install gcc {PACKAGE}; or name one with CC")


def test_a_compiler_that_fails_is_told_with_its_command(
    no_compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = no_compiler / "cc-of-mine"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    said = compiler_trouble()
    assert str(compiler) in said and "exit status 3" in said
    monkeypatch.setenv("CC", str(no_compiler / "elsewhere"))
    assert "No such file" in compiler_trouble()


def test_missing_headers_are_told_with_their_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As Debian's Python is without its -dev package: no folder of headers."""
    monkeypatch.setitem(sysconfig.get_config_vars(), "INCLUDEPY", str(tmp_path / "python"))
    assert compiler_trouble() == (
        f"Triton needs {tmp_path}/python/Python.h, which is not here; Debian, Ubuntu: apt-get "
        f"install {PACKAGE}"
    )


def test_a_cache_that_cannot_be_written_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cache_trouble() == ""
    (tmp_path / "file").touch()  # not a folder: root may write in any of those
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "triton"))
    assert cache_trouble() == (
        f"Triton's cache folder {tmp_path}/file/triton cannot be written (Not a directory); name "
        "one that can with TRITON_CACHE_DIR"
    )


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"TRITON_CACHE_DIR": "/dev/null/triton"}, "Triton's cache folder /dev/null/triton"),
        ({"CC": "/nowhere/cc"}, "Triton needs "),
    ],
)
def test_a_launch_that_fails_is_told_with_its_cause(environment: dict[str, str], said: str) -> None:
    """Without the interpreter no kernel starts on a CPU: what else is missing is said first."""
    code = (
        "import torch; from gardo_kernels._trial import triton_trouble;"
        "print(triton_trouble(torch.device('cpu')))"
    )
    own = {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, **own, **environment},
    )  # fmt: skip
    assert done.stdout.startswith(said)
