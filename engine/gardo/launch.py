"""Starting the ranks of a run: by the deepspeed launcher, on one machine's GPUs or several's."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gardo.distributed.nodes import for_pdsh, included, read_hostfile, sent_on

STRAY_HOSTFILE = Path("/job/hostfile")  # what DeepSpeed obeys where it is told of none
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Places:
    """Where ranks run: machines with the numbers of their GPUs, or `ranks` on this one.

    `gpus` are this machine's by number, where not simply the first; None where that is no question.
    """

    ranks: int
    hostfile: Path | None = None
    include: str | None = None
    gpus: Sequence[str] | None = None

    @property
    def option(self) -> str:
        """What the user typed for it, to be named in a message."""
        if self.hostfile:
            return f"--hostfile {self.hostfile}"
        return f"--include {self.include}" if self.include else f"--gpus {self.ranks}"


def places(
    *,
    gpus: int | None,
    hostfile: Path | None,
    include: str | None,
    here: int,
    env: Mapping[str, str] = os.environ,
) -> Places:
    """Where the options put the ranks; `here` GPUs are visible on this machine, 0: CPU processes.

    ValueError where they cannot be started.
    """
    if gpus and (hostfile or include):
        other = "--hostfile" if hostfile else "--include"
        raise ValueError(f"--gpus {gpus}: {other} says how many there are; drop --gpus")
    visible = env.get(VISIBLE) if here else None
    if visible and include and not hostfile:
        raise ValueError(f"{VISIBLE}={visible}: --include chooses the GPUs itself; unset it")
    if hostfile:
        hosts = read_hostfile(hostfile)
        if shutil.which("pdsh") is None:
            raise ValueError(
                "--hostfile: the deepspeed launcher reaches other machines with pdsh, which is not "
                "on the PATH; install it, or start the ranks with Slurm "
                "(recipes/cluster/slurm.sbatch)"
            )
        chosen = included(hosts, include) if include else hosts
        return Places(sum(chosen.values()), hostfile, include)
    if include:
        if not here:
            raise ValueError(f"--include {include}: no GPU here to choose from; give --gpus")
        return Places(sum(included({"localhost": here}, include).values()), include=include)
    ranks = gpus or 1
    if 0 < here < ranks:
        raise ValueError(
            f"--gpus {ranks}: this machine has {here}{f' ({VISIBLE}={visible})' if visible else ''}"
            f"; use --gpus {here}, or set DS_ACCELERATOR=cpu to run on the CPU"
        )
    return Places(ranks, gpus=_numbers(visible, ranks) if visible else None)


def _numbers(visible: str, ranks: int) -> list[str]:
    """The first GPUs of CUDA_VISIBLE_DEVICES, as the launcher wants them: by number.

    It takes no other names, and a single one needs no launcher. ValueError where there are more.
    """
    names = [name.strip() for name in visible.split(",")][:ranks]
    strange = [name for name in names if not name.isdecimal()]
    if ranks > 1 and strange:
        raise ValueError(
            f"{VISIBLE}={visible}: the deepspeed launcher knows GPUs by number, not {strange[0]}; "
            "give the numbers that `nvidia-smi -L` shows with CUDA_DEVICE_ORDER=PCI_BUS_ID"
            + (" (ranks cannot share a GPU's MIG parts)" if "MIG" in strange[0] else "")
        )
    return names


def command(places: Places, arguments: Sequence[str], *, master: str | None, port: int | None,
            launched: bool) -> list[str]:  # fmt: skip
    """What starts the training on the ranks of `places`, with these arguments of gardo.train.

    Not `launched`: in one process, without DeepSpeed. ValueError where the launcher is missing.
    """
    train = ["gardo.train", *arguments]
    named = places.gpus and not all(name.isdecimal() for name in places.gpus)
    if not launched or named:
        return [sys.executable, "-m", *train]
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("the launcher is missing: pip install deepspeed")
    # of this very Python, wherever the launcher's script lies
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level", "error",
              "--master_port", str(port or free_port())]  # fmt: skip
    if master:
        launch += ["--master_addr", master]
    if places.include:
        launch += ["--include", places.include]
    if places.hostfile:
        # forced: else DeepSpeed starts a single machine's ranks here, whatever its name is
        launch += ["--hostfile", str(places.hostfile), "--force_multi"]
        train = ["gardo.train", *map(for_pdsh, arguments)]
    else:
        launch += ["--hostfile", ""]
        if places.gpus:
            launch += ["--include", f"localhost:{','.join(places.gpus)}"]
        elif not places.include:
            launch += ["--num_gpus", str(places.ranks)]
    return [*launch, "--module", *train]


def run(places: Places, typed: Sequence[str], *, on_cpu: bool) -> int:
    """Runs a command in a process group of its own; signals that reach us reach all of it.

    `on_cpu`: there is no GPU here, and without a hostfile none is meant.
    """
    env = {"TRANSFORMERS_VERBOSITY": "error", **os.environ}
    launched = "deepspeed.launcher.runner" in typed
    if places.gpus and launched:
        del env[VISIBLE]  # the command says it; the launcher would remark on both
    if on_cpu and not places.hostfile:
        env.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it finds none
    if launched and not places.hostfile and STRAY_HOSTFILE.is_file():
        print(f"{STRAY_HOSTFILE} is not used; give it as --hostfile to train on several machines",
              file=sys.stderr)  # fmt: skip
    if places.hostfile and VISIBLE in env:
        print(f"{VISIBLE}={env[VISIBLE]} does not reach a hostfile's machines; --include does",
              file=sys.stderr)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="gardo-") as folder:
        if places.hostfile:
            file = Path(folder) / "environment"
            file.write_text(sent_on(env), encoding="utf-8")
            env["DS_ENV_FILE"] = str(file)
        process = subprocess.Popen(typed, start_new_session=True, env=env)

        def forward(number: int, _: Any) -> None:
            os.killpg(process.pid, number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, forward)
        code = process.wait()
    return 128 - code if code < 0 else code


def is_free(port: int) -> bool:
    """Whether nobody listens at a port of this machine, and we may."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
