"""`environment.json`: with what a run was made, one entry each time it was started or resumed.

    {"starts": [{"at": "2026-01-31 12:00:00+00:00", "after_step": 0, "gardo": "0.1.0",
                 "revision": "a76aed0", "packages": {"python": "3.12.3", "torch": "2.13.0"},
                 "system": "Linux 6.8 x86_64, Ubuntu 24.04.2 LTS", "cuda": "12.8",
                 "driver": "580.65.06", "ranks": 8, "machines": 1,
                 "devices": [{"name": "NVIDIA H100 80GB HBM3", "bytes": 85174583296}]}]}

`devices` are of the ranks, in their order; on a CPU they have no bytes. Nothing of who runs it: no
user, host name, path or variable of the environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gardo import __version__
from gardo.distributed.base import Ranks, gather_text, ranks_here
from gardo.files import write_atomically
from gardo.machine import PACKAGES
from gardo.nvidia import driver_version

FILE = "environment.json"


def describe(ranks: Ranks, *, after_step: int = 0) -> dict[str, Any]:
    """An entry of the file, empty on other ranks than the first; a collective, for the names of
    their devices."""
    devices = [json.loads(said) for said in gather_text(ranks, json.dumps(_device(ranks.device)))]
    if ranks.rank:
        return {}
    return {
        "at": datetime.now(UTC).isoformat(" ", "seconds"),
        "after_step": after_step,
        "gardo": __version__,
        "revision": revision(),
        "packages": versions(),
        "system": _system(),
        "cuda": torch.version.cuda,
        "driver": driver_version() if ranks.device.type == "cuda" else None,
        "ranks": ranks.world,
        "machines": -(-ranks.world // ranks_here(ranks.world)),
        "devices": devices,
    }


def keep(folder: Path, start: dict[str, Any]) -> None:
    """Adds an entry to the file; what was damaged begins anew."""
    starts = [*_starts(folder), start]
    write_atomically(folder / FILE, json.dumps({"starts": starts}, indent=1).encode())


def _starts(folder: Path) -> list[dict[str, Any]]:
    try:
        known = json.loads((folder / FILE).read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, LookupError, TypeError):
        return []
    return known if isinstance(known, list) else []


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide about numbers, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def revision(package: Path = Path(__file__).parent) -> str | None:
    """The commit of the checkout that this package is in, short, with `+` where tracked files were
    changed; None where it is installed."""
    root = package.parents[1]
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "--short", "HEAD")
    changed = commit and _git(root, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+" if changed else "") if commit else None


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {"name": properties.name, "bytes": properties.total_memory}
    cores = len(os.sched_getaffinity(0))
    return {"name": f"CPU ({platform.machine()}), {cores} core{'' if cores == 1 else 's'}"}


def _system() -> str:
    """The kernel and the distribution: Linux 6.8.0 x86_64, Ubuntu 24.04.2 LTS."""
    said = f"{platform.system()} {platform.release()} {platform.machine()}"
    try:
        return f"{said}, {platform.freedesktop_os_release()['PRETTY_NAME']}"
    except (OSError, KeyError):
        return said
