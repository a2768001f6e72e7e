"""The NVIDIA GPU, its driver and the CUDA that torch was built for: do they go together?

A driver that is too old looks to torch like no GPU at all, and a run would go on, on the CPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

# The oldest driver for each CUDA, on Linux: CUDA Toolkit Release Notes, table "CUDA Toolkit and
# Minimum Required Driver Version for CUDA Minor Version Compatibility".
OLDEST_DRIVER = {12: "525.60.13", 13: "580.65.06"}
# of torch, unless the environment says another; WSL's driver has been seen to fail with it
ALLOCATOR = "" if Path("/dev/dxg").exists() else "expandable_segments:True"
INSTEAD = "; DS_ACCELERATOR=cpu says that the CPU is meant"


def devices(root: Path = Path("/")) -> list[Path]:
    """The device files of the GPUs that this process may see; WSL has one for all of them."""
    found = sorted(root.glob("dev/nvidia[0-9]*"))
    windows = root / "dev/dxg"  # of any vendor's GPU: NVIDIA's driver is what tells
    if windows.exists() and (root / "usr/lib/wsl/lib/libcuda.so.1").exists():
        found.append(windows)
    control = root / "dev/nvidiactl"  # alone until the first program asks for a GPU
    return found or ([control] if control.exists() else [])


def gpus_here() -> int:
    """How many this process would use; 0 where the environment asks for the CPU."""
    import torch

    return 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()


def driver_version(root: Path = Path("/")) -> str | None:
    """The driver's version, such as "580.65.06", as the kernel or nvidia-smi says; None: neither.

    In a container this is the host's, whether or not its GPUs were handed in.
    """
    try:
        said = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        said = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    found = re.search(r"(?:^|\s)(\d+\.\d+(?:\.\d+)?)\s", said.partition("\n")[0] + "\n")
    return found[1] if found else None


def _nvidia_smi(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def unwanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment says that GPUs, if there are any, are not to be used."""
    first = environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    names_one = re.match(r"\d|GPU-|MIG-", first)  # what stands behind any other word is hidden too
    return environ.get("DS_ACCELERATOR") == "cpu" or not names_one


def usable() -> int:
    """How many GPUs CUDA can use. Nothing is set up by asking, the allocator's settings least."""
    import torch

    # What is_available() asks, until DeepSpeed is imported: then that asks the driver, whose GPUs
    # CUDA may not be able to use. A build without CUDA does not have it.
    count: Callable[[], int] = getattr(torch._C, "_cuda_getDeviceCount", int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what cuda_trouble says
        return count()


def cuda_trouble(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> str | None:
    """Why CUDA does not work though there is an NVIDIA GPU, and what to do; None where it works.

    None also where there is no such GPU, or the environment says that it is not to be used.
    """
    if not devices(root) or unwanted(environ):
        return None
    import torch

    if usable():
        return None
    words = "it counts none"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # the latter from a build without CUDA
        words = str(error).partition("\n")[0]
    driver, built = driver_version(root), torch.version.cuda
    here = f"an NVIDIA GPU is here (driver {driver or 'unknown'}), but torch {torch.__version__}"
    if built is None:
        return (
            f"{here} is built without CUDA; install torch again without the index for CPUs in "
            f"pip's configuration{INSTEAD}"
        )
    needed = OLDEST_DRIVER.get(int(built.split(".")[0]))
    if driver and needed and _number(driver) < _number(needed):
        mend = f"install driver {needed} or newer"
        if _number(OLDEST_DRIVER[12]) <= _number(driver):
            mend += ", or torch for CUDA 12: pip install 'torch==2.10.*'"
        return f"{here} is built for CUDA {built}, which needs driver {needed}; {mend}{INSTEAD}"
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    among = f", CUDA_VISIBLE_DEVICES={visible}" if visible else ""
    return (
        f"{here} (CUDA {built}{among}) cannot use it: {words}. In a container: docker run "
        "--gpus all, with the NVIDIA Container Toolkit on the host; else see that `nvidia-smi` "
        "works, /dev/nvidia* can be read and written, and with NVSwitch that "
        f"nvidia-fabricmanager runs{INSTEAD}"
    )


def kernels_lacking(index: int) -> str | None:
    """Why torch has no kernels for a GPU that CUDA can use, and what to do; None where it has."""
    import torch

    names = torch.cuda.get_arch_list()
    major, minor = torch.cuda.get_device_capability(index)
    if any(_runs_on(name, major, minor) for name in names):
        return None
    return (
        f"GPU {index} is of compute capability {major}.{minor}, and torch {torch.__version__} has "
        f"kernels for {', '.join(names)}; use a newer GPU, or a torch that has them (of an old GPU "
        "the one for CUDA 12: pip install 'torch==2.10.*')"
    )


def _runs_on(name: str, major: int, minor: int) -> bool:
    """Whether code for `sm_90`, `sm_90a` or `compute_90` runs on a GPU of that capability."""
    found = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name)
    if not found:
        return False
    kind, number, exact = found.groups()
    its_major, its_minor = divmod(int(number), 10)
    if exact == "a":
        return (its_major, its_minor) == (major, minor)
    if kind == "compute" and not exact:
        return (its_major, its_minor) <= (major, minor)
    return its_major == major and its_minor <= minor


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
