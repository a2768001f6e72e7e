"""Starting the ranks of a run: by the deepspeed launcher, on one machine's GPUs or several's."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import psutil

from gardo.distributed.nodes import for_pdsh, included, read_hostfile, sent_on
from gardo.ending import ASKING, STARTED_HERE, STDERR, dying_with, ranks_of
from gardo.settings import VISIBLE, VISIBLE_AT_FIRST

STRAY_HOSTFILE = Path("/job/hostfile")  # what DeepSpeed obeys where it is told of none
LAUNCHER = "deepspeed.launcher.launch"  # of one machine
RUNNER = "deepspeed.launcher.runner"  # of several, and of their launchers


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
        ranks = sum(map(len, included(hosts, include).values())) if include else sum(hosts.values())
        return Places(ranks, hostfile, include)
    if include:
        if not here:
            raise ValueError(f"--include {include}: no GPU here to choose from; give --gpus")
        chosen = included({"localhost": here}, include)["localhost"]
        return Places(len(chosen), include=include, gpus=[str(number) for number in chosen])
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
            launched: bool, module: str = "gardo.train") -> list[str]:  # fmt: skip
    """What starts a module on the ranks of `places`, with these arguments of its own.

    Not `launched`: in one process, without DeepSpeed. ValueError where the launcher is missing.
    """
    started = [module, *arguments]
    named = places.gpus and not all(name.isdecimal() for name in places.gpus)
    if not launched or named:
        return [sys.executable, "-m", *started]
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("the launcher is missing: pip install deepspeed")
    port = port or free_port()
    # of this very Python, wherever the launcher's script lies
    if not places.hostfile:
        # what its runner starts on one machine, without the runner: that one ends with 0 where this
        # is killed, and dies of a signal alone
        gpus = [int(name) for name in places.gpus or range(places.ranks)]
        machine = base64.urlsafe_b64encode(json.dumps({"localhost": gpus}).encode()).decode()
        return [sys.executable, "-m", LAUNCHER, "--log_level", "critical", "--world_info", machine,
                "--master_port", str(port), "--module", *started]  # fmt: skip
    # forced: else DeepSpeed starts a single machine's ranks here, whatever its name is
    launch = [sys.executable, "-m", RUNNER, "--log_level", "error", "--master_port", str(port),
              "--hostfile", str(places.hostfile), "--force_multi"]  # fmt: skip
    launch += ["--master_addr", master] if master else []
    launch += ["--include", places.include] if places.include else []
    return [*launch, "--module", module, *map(for_pdsh, arguments)]


def run(places: Places, typed: Sequence[str], *, on_cpu: bool) -> int:
    """Runs a command in a session of its own, which ends with this process; its exit code.

    Signals that ask this process to end reach the ranks, which end in their own way. `on_cpu`:
    there is no GPU here, and without a hostfile none is meant.
    """
    env = {"TRANSFORMERS_VERBOSITY": "error", **os.environ}
    env[VISIBLE_AT_FIRST] = "" if places.hostfile else env.get(VISIBLE, "")  # for rewards' workers
    if on_cpu and not places.hostfile:
        env.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it finds none
    if LAUNCHER in typed and STRAY_HOSTFILE.is_file():
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
        else:
            env[STARTED_HERE] = "1"
        process = subprocess.Popen(
            typed, start_new_session=True, env=env, preexec_fn=dying_with(os.getpid())
        )
        alone = not {LAUNCHER, RUNNER} & set(typed)
        send = process.send_signal if alone else partial(_pass_on, process.pid)
        with _Asked(process.pid, send, translated=places.hostfile is None) as asked:
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
            if ended and ended.si_status:  # what it leaves behind, before its number is free
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return asked.exit_code(process.returncode)


class _Asked:
    """Inside, signals that ask this process to end go to the ranks, by `send`.

    Ctrl-C reaches them as SIGTERM (`translated`), which a rank that still loads dies of in silence;
    a second one ends all that was started under `leader` at once.
    """

    def __init__(self, leader: int, send: Callable[[int], object], *, translated: bool) -> None:
        self._leader, self._send, self._translated = leader, send, translated
        self._first = 0  # the signal

    def __enter__(self) -> Self:
        self._earlier = {
            number: signal.signal(number, lambda number, _: self._heard(number))
            for number in ASKING
            if signal.getsignal(number) is not signal.SIG_IGN  # nohup
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _heard(self, number: int) -> None:
        again, self._first = bool(self._first), self._first or number
        if number != signal.SIGINT:
            self._send(number)
        elif again:
            with suppress(ProcessLookupError):
                os.killpg(self._leader, signal.SIGKILL)
        else:
            _say("stopping at the next place where it can be gone on from; Ctrl-C again: at once")
            self._send(signal.SIGTERM if self._translated else number)

    def exit_code(self, status: int) -> int:
        """Of what has ended so; says it where that ended of a signal, and has said nothing."""
        code = _exit_code(status)
        killed = not 0 <= status <= 128 + signal.NSIG  # else the ranks ended in their own way
        by = signal.SIGINT if self._first == signal.SIGINT else code - 128
        if self._first and killed:
            _say("ended at once; what was saved before is as it was")
        elif killed:
            _say(f"ended by {signal.Signals(by).name}, which nobody here has sent"
                 + ("; was the memory full?" if by == signal.SIGKILL else ""))  # fmt: skip
        return 128 + by if code > 128 else code


def _say(line: str) -> None:
    """On standard error, from a signal handler too; a terminal may show ^C or a bar before it."""
    start = "\r\033[K" if os.isatty(STDERR) else ""
    with suppress(OSError):
        os.write(STDERR, f"{start}{line}\n".encode())


def _pass_on(leader: int, number: int) -> None:
    """Sends a signal to the ranks that a launcher has started, which ends when they have.

    Itself it would kill them half a minute after it is told to end. Where none is there yet, and on
    several machines, everything that was started is sent it, as the signal that DeepSpeed hands on.
    """
    ranks = ranks_of(leader)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    if not ranks:
        with suppress(ProcessLookupError):
            os.killpg(leader, signal.SIGTERM if number == signal.SIGHUP else number)


def _exit_code(code: int) -> int:
    """As a shell says it: 128 + the signal of a process that one has killed. The launcher gives
    such a rank's -15 back as 241."""
    if code < 0:
        return 128 - code
    return 128 + 256 - code if code > 256 - signal.NSIG else code


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
