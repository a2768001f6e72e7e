"""One process at a time owns a run: a file beside its folder, `.NAME.lock`, says which.

Beside it, because a run that starts anew moves the old folder away, with all that is inside. The
file is made by a call that fails where it exists (O_EXCL), so that of many starts one wins. One
that was left behind is removed under an flock of that very file, so that two who find it cannot
remove each other's new one.

Whether the owner lives: on this machine its process is looked for, by its number and the instant at
which it started, since numbers are used again. Another machine of a shared file system, or this one
before it was last started, can only be watched: an owner touches its file every BEAT seconds.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Self

from gardo.ending import leave_at_once

BEAT = 10.0  # seconds; network file systems show a change within a few
POLL = 0.2
PATIENCE = 45.0  # without a beat, until an owner elsewhere counts as gone


class Taken(ValueError):
    """Another process owns the run; says which, and what to do."""


@dataclass(frozen=True)
class Owner:
    """A process that holds a lock, this one time (`id`): `machine` is one start of one machine,
    `started` in that machine's clock ticks."""

    id: str
    host: str
    machine: str
    pid: int
    started: int
    since: str
    user: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.user}, since {self.since})"

    @classmethod
    def here(cls) -> Owner:
        return cls(
            id=secrets.token_hex(4),
            host=socket.gethostname(),
            machine=this_machine(),
            pid=os.getpid(),
            started=started(os.getpid()) or 0,
            since=datetime.now(UTC).isoformat(" ", "seconds"),
            user=os.environ.get("USER") or f"user {os.getuid()}",
        )


class RunLock:
    """The ownership of a run's folder, once `take` has returned; a context that gives it back.

    `patience`: seconds that an owner on another machine may keep silent.
    """

    def __init__(self, run: Path, *, patience: float = PATIENCE, beat: float = BEAT) -> None:
        self.path = run.with_name(f".{run.name}.lock")
        self._run, self._patience, self._beat = run, patience, beat
        self._owner: Owner | None = None  # this process, once it is
        self._made_folder = False
        self._ended = threading.Event()

    def take(self) -> str:
        """Makes this process the owner; returns what is to be said of a lock that was left behind.

        Taken where another process is; OSError where the folder cannot be written to.
        """
        self._made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        note = ""
        while not self._create():
            with suppress(FileNotFoundError):  # given back meanwhile
                note = self._remove_left_behind() or note
        threading.Thread(target=self._keep_beating, name="run-lock", daemon=True).start()
        return note

    def release(self) -> None:
        """Gives the ownership back; nothing to do where there is none."""
        self._ended.set()
        with suppress(FileNotFoundError):
            if self._owner and self._named() == self._owner:
                self.path.unlink()
        self._owner = None
        if self._made_folder:
            with suppress(OSError):  # not empty: the run has begun
                self.path.parent.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def _create(self) -> bool:
        owner = Owner.here()
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                json.dump(asdict(owner), file, indent=1)
        except FileExistsError:
            return False
        except OSError:  # no room to write it
            self.path.unlink(missing_ok=True)
            raise
        self._owner = owner
        return True

    def _remove_left_behind(self) -> str:
        """Removes the lock of an owner that is gone, and says whose it was; Taken where it lives.

        "" where there is another to be looked at.
        """
        with open(self.path, "r+b") as found:
            with suppress(OSError):  # a file system without locks: O_EXCL alone must do there
                fcntl.flock(found, fcntl.LOCK_EX)
            seen = os.fstat(found.fileno()).st_mtime_ns
            owner = _read(found)
            lives = self._lives(found, owner, seen)
            # from here on nobody else removes it: its owner is gone, and the flock is ours
            if not self._is_at_path(found) or (lives and owner is None):
                return ""
            if lives:
                raise Taken(
                    f"{self._run.name}: {self._run} is being trained by {owner}; give another "
                    f"run.name, or stop that one (its lock is {self.path})"
                )
            self.path.unlink()
        return f"the lock of {owner or 'an unknown process'}, which is gone, was left behind"

    def _lives(self, found: BinaryIO, owner: Owner | None, seen: int) -> bool:
        """Whether the owner does, or, of one that cannot be asked, its lock changes: it was `seen`
        as of then. An owner that is not known is one that has not written its name yet, or died.
        """
        if owner and owner.machine == this_machine():
            return started(owner.pid) == owner.started
        if owner:
            print(f"{self.path}: waiting {self._patience:.0f} s for a sign of {owner}", flush=True)
        end = time.monotonic() + self._patience
        while time.monotonic() < end:
            with open(self.path, "rb") as again:  # opened anew: that is when NFS looks
                if os.fstat(again.fileno()).st_mtime_ns != seen or (not owner and _read(again)):
                    return True
            time.sleep(POLL)
        return False

    def _keep_beating(self) -> None:
        """Touches the lock; a run that somebody has taken over, thinking it dead, ends at once."""
        mine = self._owner
        while not self._ended.wait(self._beat):
            with suppress(OSError):  # a disk that does not answer now; the next beat may
                named = self._named()
                if named == mine:
                    os.utime(self.path)
                elif named and not self._ended.is_set():
                    print(f"{self.path}: {named} has taken this run over", file=sys.stderr)
                    leave_at_once(1)

    def _named(self) -> Owner | None:
        """The owner by the file; FileNotFoundError where it is not there."""
        with open(self.path, "rb") as file:
            return _read(file)

    def _is_at_path(self, file: BinaryIO) -> bool:
        """Whether the open file is the lock, and not one that was there before."""
        return os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))


def _read(file: BinaryIO) -> Owner | None:
    """None of a file that is torn, or not yet written."""
    file.seek(0)
    try:
        return Owner(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None


def this_machine() -> str:
    """What process numbers are unique in: a machine since it was started, and a container in it."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def started(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since the machine did; None where
    there is no such process, or only what its parent has not asked for yet."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *others = text.rpartition(")")[2].split()  # the name before may hold anything
    return None if state in "ZX" else int(others[18])
