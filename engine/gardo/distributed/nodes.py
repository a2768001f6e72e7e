"""Several machines: which they are, how a command reaches them, the folder that all must see."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from gardo.distributed.base import Ranks, gather_text

ESCAPED = r"\\\g<0>"
UNSAFE = re.compile(r'[\\"$`]')  # between double quotes, to a shell
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


def included(hosts: Mapping[str, int], text: str) -> dict[str, list[int]]:
    """GPUs of each machine that `NAME[:GPU[,GPU ...]][@NAME ...]` leaves, as DeepSpeed reads it.

    ValueError where it names what `hosts` has not.
    """
    chosen: dict[str, set[int]] = {}
    for part in text.split("@"):
        found = re.fullmatch(r"([^:]+)(?::(\d+(?:,\d+)*))?", part)
        if not found:
            raise ValueError(f"--include {text}: {part!r} is not NAME or NAME:GPU,GPU")
        name, gpus = found.groups()
        if name not in hosts:
            raise ValueError(f"--include {text}: no {name!r}; there is {', '.join(hosts)}")
        numbers = [int(n) for n in gpus.split(",")] if gpus else range(hosts[name])
        if beyond := [n for n in numbers if n >= hosts[name]]:
            raise ValueError(f"--include {text}: {name} has GPUs 0 to {hosts[name] - 1}, no "
                             f"{beyond[0]}")  # fmt: skip
        chosen.setdefault(name, set()).update(numbers)
    return {name: sorted(chosen[name]) for name in hosts if name in chosen}


# ---- on the way to other machines ----------------------------------------------------------------

# of the environment: what a run reads, where libraries look for models and how they compute
SENT_ON = re.compile(
    r"(GARDO|HF|HUGGINGFACE|TRANSFORMERS|DIFFUSERS|TOKENIZERS|NCCL|GLOO|TORCH|PYTORCH|TRITON|CUDA|CUBLAS|"
    r"DS|DEEPSPEED|OMP|MKL|UCX)_.+|(HTTPS?|NO)_PROXY|XDG_CACHE_HOME",
    re.IGNORECASE,
)
# each machine has its own GPUs; what is secret would stand in the command, for everyone to read
NOT_SENT_ON = re.compile(
    r"CUDA_VISIBLE_DEVICES|DS_ENV_FILE|.*_(TOKEN|SECRET|PASSWORD|KEY)", re.IGNORECASE
)
OF_A_USER = re.compile(r"://[^/@]+@")  # a proxy's password


def sent_on(env: Mapping[str, str]) -> str:
    """DeepSpeed's environment file: the variables that go with the command to other machines.

    What the user's own `.deepspeed_env` says, at home or here, comes last and counts.
    """
    lines = [
        f"{name}={re.sub(UNSAFE, ESCAPED, value)}"
        for name, value in sorted(env.items())
        if SENT_ON.fullmatch(name)
        and not NOT_SENT_ON.fullmatch(name)
        and not OF_A_USER.search(value)
        and "\n" not in value
    ]
    own = env.get("DS_ENV_FILE", ".deepspeed_env")
    for folder in (Path.home(), Path()):
        if (folder / own).is_file():
            text = (folder / own).read_text(encoding="utf-8")
            lines += [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines)


def for_pdsh(argument: str) -> str:
    """The argument as DeepSpeed's pdsh launcher must be given it, to arrive whole.

    The other machine's shell reads the command. The launcher puts double quotes around what has a
    space, and a backslash before a double quote in it; nothing else.
    """
    if " " not in argument:
        return shlex.quote(argument)
    return re.sub(r"[\\$`]", ESCAPED, argument)


def check_folder(folder: Path, ranks: Ranks) -> None:
    """ValueError on every rank unless all of them can write to one folder; leaves nothing there."""
    made = ranks.rank == 0 and not os.path.exists(folder)  # False too where it cannot be seen
    token = gather_text(ranks, secrets.token_hex(4))[0]
    mark = folder / f".written-by-{token}-{ranks.rank}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        problem = ""
    except OSError as error:
        problem = (
            f"run.folder: {folder} on {socket.gethostname()} cannot be written to: "
            f"{error.strerror}; give a folder that this user may write to"
        )
    try:
        _refuse_together(ranks, problem)
        blind = "" if _sees(folder, token, ranks.world) else socket.gethostname()
        _refuse_together(ranks, blind and (
            f"run.folder: {folder} on {blind} is not the folder that the other ranks write to; "
            "give one on a file system that all machines share"
        ))  # fmt: skip
    finally:
        with suppress(OSError):
            mark.unlink()
    ranks.barrier()
    if made:
        with suppress(OSError):
            folder.rmdir()


def _refuse_together(ranks: Ranks, problem: str) -> None:
    """ValueError on every rank where one has a problem: that of the first."""
    if problems := [text for text in gather_text(ranks, problem) if text]:
        raise ValueError(problems[0])


def _sees(folder: Path, token: str, world: int) -> bool:
    """Whether the marks of all ranks are in the folder, soon."""
    end = time.monotonic() + PATIENCE
    while len(list(folder.glob(f".written-by-{token}-*"))) < world:
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True
