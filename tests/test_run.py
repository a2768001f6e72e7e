"""`./run` on machines that are not here: which torch it takes for a driver, what it says of Python.

The script is a checkout's own but for the place of the device files and of the driver's; a Python
that only writes down what it is asked stands in for the one that would download gigabytes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import ROOT

TOOLS = "cat chmod cksum cp dirname env grep ls mkdir mv readlink rm rmdir sed sh sleep uname"
PYTHON = """#!/bin/sh
case "$*" in
    *print*) echo VERSION ;;
    *sys.exit*) [ VERSION != 3.10 ] ;;
    *"-m venv"*)
        for folder; do :; done
        mkdir -p "$folder/bin"
        cp "$0" "$folder/bin/python"
        printf '#!/bin/sh\\n' >"$folder/bin/gardo"
        chmod +x "$folder/bin/gardo"
        ;;
    *"-m pip"*) echo "$*" >>"$PIPS" ;;
esac
"""
KERNEL = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs@U22)\n"


class Checkout:
    """A copy of what `./run` needs, on a machine without a GPU."""

    def __init__(self, folder: Path, python: str) -> None:
        self.root, self.bin = folder / "checkout", folder / "bin"
        self.driver, self.pips = folder / "proc-version", folder / "pips"
        self.root.mkdir()
        self.bin.mkdir()
        files = ["setup.py", "pyproject.toml", *(f.name for f in ROOT.glob("constraints*.txt"))]
        for name in files:
            shutil.copy(ROOT / name, self.root)
        script = (ROOT / "run").read_text()
        for there in ("/proc/driver/nvidia/version", "/dev/nvidiactl"):
            assert there in script
            script = script.replace(there, str(self.driver))
        (self.root / "run").write_text(script.replace("/dev/dxg", "/nowhere"))
        for tool in TOOLS.split():
            (self.bin / tool).symlink_to(shutil.which(tool) or "/nowhere")
        self.write("python3", PYTHON.replace("VERSION", python))

    def write(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self) -> tuple[int, str, set[str]]:
        """Exit code, what is said, the constraints that pip was given."""
        self.pips.unlink(missing_ok=True)
        done = subprocess.run(
            ["sh", str(self.root / "run"), "schema"], capture_output=True, text=True, timeout=60,
            env={"PATH": str(self.bin), "PIPS": str(self.pips), "HOME": os.environ["HOME"]},
        )  # fmt: skip
        asked = self.pips.read_text().splitlines() if self.pips.exists() else []
        return done.returncode, done.stderr, {line.split(" -c ")[1].split()[0] for line in asked}


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path, "3.12")


@pytest.mark.parametrize("said_by", ["kernel", "nvidia-smi"])
@pytest.mark.parametrize(
    ("driver", "name", "says"),
    [
        ("535.183.01", "constraints-cuda12.txt", "NVIDIA driver (535.183.01) is older than 580"),
        ("525.60.13", "constraints-cuda12.txt", "taking torch for CUDA 12"),
        ("580.65.06", "constraints.txt", "ready"),
        ("470.256.02", "constraints.txt", "(470.256.02) is too old for the torch that this in"),
    ],
)
def test_torch_fits_the_driver(
    checkout: Checkout, driver: str, name: str, says: str, said_by: str
) -> None:
    if said_by == "kernel":
        checkout.driver.write_text(KERNEL.format(driver))
    else:  # WSL
        checkout.write("nvidia-smi", f"#!/bin/sh\necho {driver}\necho {driver}\n")
    code, said, constraints = checkout.run()
    assert (code, constraints) == (0, {name}), said
    assert says in said


def test_another_driver_is_noticed(checkout: Checkout) -> None:
    assert checkout.run()[2] == {"constraints.txt"}
    assert checkout.run() == (0, "", set())  # nothing to do
    checkout.driver.write_text(KERNEL.format("535.183.01"))
    assert checkout.run()[2] == {"constraints-cuda12.txt"}
    checkout.driver.unlink()
    assert checkout.run() == (0, "", set())  # a machine without a GPU that shares the folder
    checkout.write("nvidia-smi", "#!/bin/sh\necho NVIDIA-SMI has failed because 1.2 3; exit 9\n")
    assert checkout.run() == (0, "", set())
    (checkout.root / "constraints-shared.txt").write_text("six==1.17.0\n")
    _, said, constraints = checkout.run()
    assert constraints == {"constraints-cuda12.txt"} and "of an earlier set-up" in said
    checkout.driver.write_text(KERNEL.format("580.65.06"))
    assert checkout.run()[2] == {"constraints.txt"}


def test_an_old_python_is_told_where_a_newer_one_is(tmp_path: Path) -> None:
    code, said, _ = Checkout(tmp_path, "3.10").run()
    assert code == 2
    assert "needs Python 3.11 or newer; found: python3 (3.10)." in said
    for mend in ("python3.11 python3.11-venv python3.11-dev gcc", "conda create -n gardo python="):
        assert mend in said
