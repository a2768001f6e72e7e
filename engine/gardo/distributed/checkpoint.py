"""Checkpoints that any world size can read, and that a crash cannot tear.

    checkpoints/step-000040/
        master-00000-of-00002.safetensors           what the optimizer updates, rank 0's pieces
        exp_avg-00000-of-00002.safetensors          AdamW's moments
        exp_avg_sq-00000-of-00002.safetensors
        slot.reference-00000-of-00002.safetensors   one for each slot, fp32
        ...                                         the same of rank 1
        manifest.json                               every file's size and sha256, all other state

A tensor in a file is a piece: `NAME@START` holds consecutive elements of the flattened parameter
NAME from START on. So any number of ranks, at any ZeRO stage, reads the ranges that it owns.

Saving: all ranks write into `step-N.tmp-ID/` and flush to the disk, then tell each other size and
digest of what they wrote, or what went wrong; rank 0 writes the manifest and renames the folder.
That rename is the commit: before it the checkpoint does not exist, after it it is whole.

8-bit moments are quantised in blocks of the rank's own flat tensors, so they can only be read back
by the same number of ranks at the same stage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open

from gardo.distributed.base import Engine, gather_text, host_memory
from gardo.distributed.optimizers import (
    MOMENTS,
    load_blocks,
    moments_of,
    prepare_moments,
    set_updates,
)
from gardo.distributed.saved import (
    FORMAT,
    MANIFEST,
    Saved,
    Unusable,
    committed,
    is_misnamed,
    name_of,
    not_finite,
    self_digest,
    sha256,
    step_of,
)
from gardo.distributed.shards import homes, masters
from gardo.lazily import no_grad
from gardo.settings import Strict

if TYPE_CHECKING:
    from torch import Tensor

ROOM = 1.2  # times the size of a checkpoint must be free on the disk before one is written
COPIES = 2.0  # times a rank's share must be free in memory to write it while training goes on


class CheckpointSettings(Strict):
    every: int = Field(50, ge=1, description="iterations; the last one is always kept")
    keep: int = Field(2, ge=1, description="the newest so many stay")
    background: bool = Field(
        True, description="write while training goes on, where the host has memory for a copy"
    )


# ---- what is saved -------------------------------------------------------------------------------


Kinds = Iterator[tuple[str, dict[str, "Tensor"]]]


def _tensors(engine: Engine, *, copy: bool) -> Kinds:
    """(kind, tensors by key) of this rank in host memory, one kind at a time.

    What lives there already is copied only if asked for.
    """
    shards, optimizer = engine.slots.shards, engine.optimizer
    pieces = shards.pieces

    def keyed(values: Sequence[Tensor]) -> dict[str, Tensor]:
        kept = {}
        for piece, value in zip(pieces, values, strict=True):
            share, of = (engine.rank, engine.world) if shards.replicated else (0, 1)
            first, last = piece.length * share // of, piece.length * (share + 1) // of
            if last > first:
                kept[f"{piece.name}@{piece.start + first}"] = value[first:last].to("cpu", copy=copy)
        return kept

    yield "master", keyed(masters(shards))
    names = moments_of(optimizer)
    if names is None:
        yield (
            "moments_8bit",
            {
                f"{i}/{key}": value.to("cpu", copy=copy)
                for i, home in enumerate(homes(shards))
                for key, value in optimizer.state[home].items()
                if isinstance(value, torch.Tensor)
            },
        )
    else:
        prepare_moments(optimizer, homes(shards))
        for kind, name in zip(MOMENTS, names, strict=True):
            yield kind, keyed([piece.of(optimizer.state[piece.home][name]) for piece in pieces])
    for name in engine.slots.names:
        yield f"slot.{name}", keyed(engine.slots.pieces(name))


def _updates(engine: Engine) -> int:
    """Optimizer steps done, as AdamW counts them for its bias correction. A collective."""
    states = [engine.optimizer.state[home] for home in homes(engine.slots.shards)]
    return engine.agree_max(max((int(state.get("step", 0)) for state in states), default=0))


def _layout(engine: Engine) -> str:
    """Equal for two engines whose ranks hold the same elements in the same flat tensors."""
    flats = [id(home) for home in homes(engine.slots.shards)]
    pieces = [
        (p.name, p.start, p.length, flats.index(id(p.home)), p.offset)
        for p in engine.slots.shards.pieces
    ]
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


# ---- saving --------------------------------------------------------------------------------------


@dataclass
class _Begun:
    """A checkpoint on its way."""

    step: int
    part: Path  # the folder it is written into
    manifest: dict[str, Any]
    files: Future[list[dict[str, Any]]]


class Checkpoints:
    """The checkpoints of one run in `folder`. Every method is called by all ranks together.

    The run owns the folder (run_lock.py): what an earlier process of it left unfinished is swept.
    `run` is its id; None: not known, or from before there were such, and then any checkpoint will
    do.
    """

    def __init__(
        self, folder: Path, engine: Engine, settings: CheckpointSettings, run: str | None = None
    ) -> None:
        self.folder, self.engine, self.settings, self.run = folder, engine, settings, run
        self.resumed_from: Path | None = None
        self.last_step: int | None = None  # the last one that is committed
        self._begun: _Begun | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._sweeper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sweep")

    def save(self, step: int, state: Mapping[str, Any], *, wait: bool = True) -> str | None:
        """Commits the engine's tensors and `state` (JSON, rank 0's counts) as step `step`.

        With `wait=False`, where the settings and the memory allow it, only copies them and lets
        `settle` commit later. Returns None, or why nothing was saved: then the older checkpoints
        are as they were.
        """
        earlier = self.settle()
        if step == self.last_step:
            return earlier

        def begin() -> str:
            self._make_room()
            folder = self.folder / f"{name_of(step)}.tmp-{secrets.token_hex(4)}"
            folder.mkdir(parents=True)
            return folder.name

        names, problem = self._together(begin if self.engine.rank == 0 else str)
        if problem:
            return f"step {step}: {problem}"
        part = self.folder / names[0]
        manifest = {
            "format": FORMAT,
            "step": step,
            "run": self.run,
            "world": self.engine.world,
            "updates": _updates(self.engine),
            "quantised": moments_of(self.engine.optimizer) is None,
            "layouts": gather_text(self.engine, _layout(self.engine)),
            "state": json.loads(json.dumps(state)),
        }
        copy = not wait and self.settings.background and self._has_memory()
        files: Future[list[dict[str, Any]]] = Future()
        try:
            kinds = _tensors(self.engine, copy=copy)
            if copy:
                files = self._writer.submit(self._write_files, part, iter(list(kinds)))
            else:
                files.set_result(self._write_files(part, kinds))
        except Exception as error:  # of any kind: it must reach the other ranks
            files.set_exception(error)
        self._begun = _Begun(step, part, manifest, files)
        return earlier if copy else self.settle() or earlier

    def settle(self, *, wait: bool = True) -> str | None:
        """Commits what `save` has begun, if that is written (or once it is, with `wait`).

        Returns why it could not be saved, or None.
        """
        begun = self._begun
        if begun is None:
            return None
        if not wait and self.engine.agree_max(int(not begun.files.done())):
            return None
        self._begun = None
        reports, problem = self._together(lambda: json.dumps(begun.files.result()))
        if not problem:
            begun.manifest["files"] = [file for r in reports for file in json.loads(r)]
            _, problem = self._together(
                (lambda: self._commit(begun)) if self.engine.rank == 0 else str
            )
        if problem is None:
            self.last_step = begun.step
            if self.engine.rank == 0:
                self._prune()
            return None
        if self.engine.rank == 0:
            shutil.rmtree(begun.part, ignore_errors=True)
        return f"step {begun.step}: {problem}"

    def close(self) -> None:
        """Ends the threads; what is written and not committed is swept by the next save."""
        self._writer.shutdown(wait=True)
        self._sweeper.shutdown(wait=True)

    def _together(self, work: Callable[[], str | None]) -> tuple[list[str], str | None]:
        """What each rank's `work` returned, and the first error of any rank."""
        try:
            said = "ok " + (work() or "")
        except Exception as error:  # of any kind: the other ranks are waiting
            said = f"no rank {self.engine.rank}: {error or type(error).__name__}"
        everyone = gather_text(self.engine, said)
        wrong = [text[3:] for text in everyone if text.startswith("no ")]
        return [text[3:] for text in everyone], (wrong[0] if wrong else None)

    def _bytes(self) -> int:
        """Of this rank's share, if masters are fp32."""
        slots = self.engine.slots
        elements = sum(piece.length for piece in slots.shards.pieces)
        shares = self.engine.world if slots.shards.replicated else 1
        return 4 * elements * (3 + len(slots.names)) // shares

    def _has_memory(self) -> bool:
        """Whether every rank's host has room for a copy of its share."""
        free = host_memory(self.engine.world)
        return not self.engine.agree_max(int(free < COPIES * self._bytes()))

    def _make_room(self) -> None:
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            _flush(self.folder.parent)
        swept = self._sweep()
        needed = int(ROOM * self._bytes() * self.engine.world)
        if shutil.disk_usage(self.folder).free < needed:
            swept.result()
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(f"{self.folder}: {free} bytes free, a checkpoint may need {needed}")

    def _write_files(self, part: Path, kinds: Kinds) -> list[dict[str, Any]]:
        """Writes this rank's files and describes them. No collectives: may run in a thread."""

        from safetensors.torch import save_file

        files = []
        for kind, tensors in kinds:
            if (strange := not_finite(tensors)) is not None:
                raise ValueError(f"{kind} of {strange} is not finite")
            name = f"{kind}-{self.engine.rank:05d}-of-{self.engine.world:05d}.safetensors"
            save_file(tensors, part / name)
            _flush(part / name)
            size, digest = (part / name).stat().st_size, sha256(part / name)
            files.append({"name": name, "kind": kind, "size": size, "sha256": digest})
        return files

    def _commit(self, begun: _Begun) -> None:
        manifest = begun.manifest
        manifest["sha256"] = self_digest(manifest)
        _write_flushed(begun.part / MANIFEST, json.dumps(manifest, indent=1))
        _flush(begun.part)
        final = self.folder / name_of(begun.step)
        if final.exists():  # a damaged one, or of a run that was taken back before this step
            final.rename(self.folder / f"{final.name}.tmp-{secrets.token_hex(4)}")
        begun.part.rename(final)
        _flush(self.folder)

    def _prune(self) -> None:
        """What cannot be removed stays, until the next time."""
        kept = {*committed(self.folder)[: self.settings.keep], self.resumed_from}
        for old in committed(self.folder):
            if old not in kept:
                with contextlib.suppress(OSError):
                    old.rename(old.with_name(f"{old.name}.tmp-{secrets.token_hex(4)}"))
        self._sweep()

    def _sweep(self) -> Future[None]:
        """Removes what no save is writing, in a thread: the other ranks do not wait for a disk."""
        stale = list(self.folder.glob("step-*.tmp-*"))

        def remove() -> None:
            for folder in stale:
                shutil.rmtree(folder, ignore_errors=True)

        return self._sweeper.submit(remove)

    # ---- loading ---------------------------------------------------------------------------------

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest checkpoint that verifies, and what was wrong with newer ones."""
        names = gather_text(self.engine, json.dumps([p.name for p in committed(self.folder)]))
        wrong: list[str] = []
        for name in json.loads(names[0]):
            folder = self.folder / name
            try:
                saved = Saved(folder)
                mine = self.engine.rank, self.engine.world
                problem = saved.misnamed() or saved.damage(*mine) or saved.not_finite(*mine)
            except Unusable as error:
                problem = str(error)
            found = [text for text in gather_text(self.engine, problem or "") if text]
            if not found:
                self.resumed_from = folder
                return saved, wrong
            wrong.append(found[0])
        return None, wrong

    def set_aside(self, newer_than: Saved | None) -> None:
        """Renames what was passed over, so that it is neither counted nor lost."""
        if self.engine.rank == 0:
            for folder in committed(self.folder):
                if newer_than is None or step_of(folder) > newer_than.step:
                    why = "misnamed" if is_misnamed(folder) else "broken"
                    folder.rename(folder.with_name(f"{folder.name}.{why}-{secrets.token_hex(4)}"))
        self.engine.barrier()

    @no_grad
    def restore(self, saved: Saved) -> Mapping[str, Any]:
        """Fills the engine's masters, moments and slots; returns the other state.

        Unusable where the checkpoint is another run's, or has not what this engine needs.
        """
        problem = None
        try:
            saved.check_run(self.run)
            self._restore_tensors(saved)
        except Unusable as error:
            problem = str(error)
        except (OSError, SafetensorError) as error:
            problem = f"{saved.folder}: cannot be read: {error}"
        wrong = [text for text in gather_text(self.engine, problem or "") if text]
        if wrong:
            raise Unusable(wrong[0])
        self.engine.slots.shards.refresh()
        self.last_step = saved.step
        self.run = self.run or saved.manifest.get("run")
        return saved.manifest["state"]

    def _restore_tensors(self, saved: Saved) -> None:
        engine = self.engine
        shards, optimizer = engine.slots.shards, engine.optimizer
        pieces = shards.pieces

        def fill(kind: str, targets: Sequence[Tensor]) -> None:
            for piece, target in zip(pieces, targets, strict=True):
                target.copy_(saved.read(kind, piece.name, piece.start, piece.length))

        saved.check_parameters([piece.name for piece in pieces])
        fill("master", masters(shards))
        names = moments_of(optimizer)
        if (names is None) != saved.manifest["quantised"]:
            raise Unusable(
                f"{saved.folder}: its moments are of another optimizer; resume with the "
                "train.optimizer.name it was saved with"
            )
        if names is None:
            self._restore_8bit(saved)
        else:
            prepare_moments(optimizer, homes(shards))
            for kind, name in zip(MOMENTS, names, strict=True):
                fill(kind, [piece.of(optimizer.state[piece.home][name]) for piece in pieces])
            for home in homes(shards):
                set_updates(optimizer.state[home], saved.manifest["updates"])
        for name in engine.slots.names:
            fill(f"slot.{name}", engine.slots.pieces(name))

    def _restore_8bit(self, saved: Saved) -> None:
        engine = self.engine
        layouts = saved.manifest["layouts"]
        if len(layouts) != engine.world or layouts[engine.rank] != _layout(engine):
            raise Unusable(
                f"{saved.folder}: 8-bit moments of {len(layouts)} ranks can only be resumed by as "
                f"many ranks at the same ZeRO stage, and these are {engine.world}; use those, or "
                "train.optimizer.name: adamw from the start"
            )
        path = saved.file("moments_8bit", engine.rank)
        with safe_open(path, "pt") as file:
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for i, home in enumerate(homes(engine.slots.shards)):
            mine = {k.partition("/")[2]: t for k, t in stored.items() if k.startswith(f"{i}/")}
            load_blocks(engine.optimizer, home, mine, saved.manifest["updates"])


# ---- the disk ------------------------------------------------------------------------------------


def _flush(path: Path) -> None:
    """Forces a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_flushed(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
