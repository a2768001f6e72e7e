"""Several machines: which they are, how a command reaches them, the folder that all must see."""

from __future__ import annotations

import re
import secrets
import shlex
import socket
import time
from pathlib import Path

from gardo.distributed.base import Engine, gather_text, ranks_here

PATIENCE = 20.0  # seconds that a network file system may take to show a new file everywhere


def read_hostfile(path: Path) -> dict[str, int]:
    """Ranks of each machine, in the file's order: the first has rank 0.

    A line is `NAME slots=N`, empty, or a comment. ValueError says which line is something else:
    without the file the deepspeed launcher would train on this machine alone.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such hostfile; write a line `NAME slots=GPUS` a machine")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if not found:
            raise ValueError(f"{path}, line {number}: {text!r} is not `NAME slots=GPUS`")
        if found[1] in hosts:
            raise ValueError(f"{path}, line {number}: {found[1]!r} stands twice; add its slots up")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise ValueError(f"{path}: no machine in it; write a line `NAME slots=GPUS` each")
    return hosts


def for_pdsh(argument: str) -> str:
    """The argument as DeepSpeed's pdsh launcher must be given it, to arrive whole.

    The other machine's shell reads the command. The launcher puts double quotes around what has a
    space, and a backslash before a double quote in it; nothing else.
    """
    if " " not in argument:
        return shlex.quote(argument)
    return re.sub(r"[\\$`]", r"\\\g<0>", argument)


def check_shared(folder: Path, engine: Engine) -> None:
    """ValueError on every rank unless all of them see one folder. Does nothing on one machine."""
    if ranks_here(engine.world) == engine.world:
        return
    mark = ""
    if engine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark = f".seen-by-all-{secrets.token_hex(4)}"
        (folder / mark).touch()
    mark = gather_text(engine, mark)[0]
    end = time.monotonic() + PATIENCE
    while not (seen := (folder / mark).exists()) and time.monotonic() < end:
        time.sleep(0.5)
    blind = [name for name in gather_text(engine, "" if seen else socket.gethostname()) if name]
    if engine.rank == 0:
        (folder / mark).unlink()
    if blind:
        raise ValueError(
            f"run.folder: {folder} on {blind[0]} is not the folder that rank 0 writes to; give one "
            "on a file system that all machines share"
        )
