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

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gardo.distributed.base import Engine, gather_text
from gardo.distributed.shards import MOMENTS, Piece, homes, masters, prepare_moments
from gardo.settings import Strict

FORMAT = 1
COMMITTED = re.compile(r"step-(\d{6,})")
ROOM = 1.2  # times the size of a checkpoint must be free before one is written


class CheckpointSettings(Strict):
    every: int = Field(50, ge=1, description="iterations; the last one is always kept")
    keep: int = Field(2, ge=1, description="the newest so many stay")


class Unusable(ValueError):
    """A checkpoint that is damaged, or does not fit this run; says what and why."""


# ---- what is saved -------------------------------------------------------------------------------


def _tensors(engine: Engine) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(kind, tensors by key) of this rank, one kind at a time, so that one is in memory at once."""
    shards, optimizer = engine.slots.shards, engine.optimizer
    pieces = shards.pieces

    def keyed(values: Sequence[Tensor]) -> dict[str, Tensor]:
        kept = {}
        for piece, value in zip(pieces, values, strict=True):
            share, of = (engine.rank, engine.world) if shards.replicated else (0, 1)
            first, last = piece.length * share // of, piece.length * (share + 1) // of
            if last > first:
                kept[f"{piece.name}@{piece.start + first}"] = value[first:last].cpu().contiguous()
        return kept

    yield "master", keyed(masters(shards))
    if _quantised(optimizer):
        yield (
            "moments_8bit",
            {
                f"{i}/{key}": value.cpu().contiguous()
                for i, home in enumerate(homes(shards))
                for key, value in optimizer.state[home].items()
                if isinstance(value, Tensor)
            },
        )
    else:
        prepare_moments(optimizer, shards)
        for kind in MOMENTS:
            yield kind, keyed([piece.of(optimizer.state[piece.home][kind]) for piece in pieces])
    for name in engine.slots.names:
        yield f"slot.{name}", keyed(engine.slots.pieces(name))


def _quantised(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("bitsandbytes")


def _updates(engine: Engine) -> int:
    """Optimizer steps done, as AdamW counts them for its bias correction."""
    state = engine.optimizer.state[homes(engine.slots.shards)[0]]
    return int(state.get("step", 0))


def _layout(engine: Engine) -> str:
    """Equal for two engines whose ranks hold the same elements in the same flat tensors."""
    pieces = [(p.name, p.start, p.length, p.offset) for p in engine.slots.shards.pieces]
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


# ---- saving --------------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one run in `folder`. Every method is called by all ranks together."""

    def __init__(self, folder: Path, engine: Engine, settings: CheckpointSettings) -> None:
        self.folder, self.engine, self.settings = folder, engine, settings
        self.resumed_from: Path | None = None
        self.last_step: int | None = None

    def save(self, step: int, state: Mapping[str, Any]) -> str | None:
        """Commits the engine's tensors and `state` (JSON, rank 0's counts) as step `step`.

        Returns None, or why nothing was saved: then the older checkpoints are as they were.
        """
        if step == self.last_step:
            return None

        def begin() -> str:
            self._make_room()
            folder = self.folder / f"{_name(step)}.tmp-{secrets.token_hex(4)}"
            folder.mkdir(parents=True)
            return folder.name

        names, problem = self._together(begin if self.engine.rank == 0 else str)
        part = self.folder / names[0]
        if not problem:
            reports, problem = self._together(lambda: json.dumps(self._write_files(part)))
        if not problem:
            ranks = [json.loads(r) for r in reports]
            _, problem = self._together(
                (lambda: self._commit(part, step, state, ranks)) if self.engine.rank == 0 else str
            )
        if problem:
            if self.engine.rank == 0 and part != self.folder:
                shutil.rmtree(part, ignore_errors=True)
            return problem
        self.last_step = step
        return None

    def _together(self, work: Any) -> tuple[list[str], str | None]:
        """What each rank's `work` returned, and the first error of any rank."""
        try:
            said = "ok " + (work() or "")
        except (OSError, SafetensorError) as error:
            said = f"no rank {self.engine.rank}: {error}"
        everyone = gather_text(self.engine, said)
        wrong = [text[3:] for text in everyone if text.startswith("no ")]
        return [text[3:] for text in everyone], (wrong[0] if wrong else None)

    def _make_room(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("step-*.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)
        free, needed = shutil.disk_usage(self.folder).free, int(ROOM * self._size())
        if free < needed:
            raise OSError(f"{self.folder}: {free} bytes free, a checkpoint may need {needed}")

    def _size(self) -> int:
        """Bytes of a checkpoint of all ranks, if they hold about the same."""
        slots = self.engine.slots
        elements = sum(piece.length for piece in slots.shards.pieces)
        return (
            4
            * elements
            * (3 + len(slots.names))
            * (1 if slots.shards.replicated else self.engine.world)
        )

    def _write_files(self, part: Path) -> dict[str, Any]:
        engine, files = self.engine, []
        for kind, tensors in _tensors(engine):
            name = f"{kind}-{engine.rank:05d}-of-{engine.world:05d}.safetensors"
            save_file(tensors, part / name)
            _flush(part / name)
            size, digest = (part / name).stat().st_size, _sha256(part / name)
            files.append({"name": name, "kind": kind, "size": size, "sha256": digest})
        return {"files": files, "layout": _layout(engine)}

    def _commit(
        self, part: Path, step: int, state: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]
    ) -> None:
        files = [file for rank in ranks for file in rank["files"]]
        manifest = {
            "format": FORMAT,
            "step": step,
            "world": self.engine.world,
            "updates": _updates(self.engine),
            "quantised": _quantised(self.engine.optimizer),
            "layouts": [rank["layout"] for rank in ranks],
            "files": files,
            "state": json.loads(json.dumps(state)),
        }
        manifest["sha256"] = _self_digest(manifest)
        _write_flushed(part / "manifest.json", json.dumps(manifest, indent=1))
        _flush(part)
        final = self.folder / _name(step)
        if final.exists():  # a damaged one, or of a run that was taken back before this step
            final.rename(self.folder / f"{final.name}.tmp-{secrets.token_hex(4)}")
        part.rename(final)
        _flush(self.folder)
        self._prune()

    def _prune(self) -> None:
        kept = {*committed(self.folder)[: self.settings.keep], self.resumed_from}
        for old in committed(self.folder):
            if old not in kept:
                doomed = old.rename(old.with_name(f"{old.name}.tmp-{secrets.token_hex(4)}"))
                shutil.rmtree(doomed, ignore_errors=True)
        for stale in self.folder.glob("step-*.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)

    # ---- loading ---------------------------------------------------------------------------------

    def newest(self) -> tuple[Saved | None, list[str]]:
        """The newest checkpoint that verifies, and what was wrong with newer ones."""
        names = gather_text(self.engine, json.dumps([p.name for p in committed(self.folder)]))
        wrong: list[str] = []
        for name in json.loads(names[0]):
            folder = self.folder / name
            try:
                saved = Saved(folder)
                problem = saved.damage(self.engine.rank, self.engine.world)
            except Unusable as error:
                problem = str(error)
            found = [text for text in gather_text(self.engine, problem or "") if text]
            if not found:
                self.resumed_from = folder
                return saved, wrong
            wrong.append(found[0])
        return None, wrong

    def set_aside(self, newer_than: Saved | None) -> None:
        """Renames the damaged folders, so that they are neither counted nor lost."""
        if self.engine.rank == 0:
            for folder in committed(self.folder):
                if newer_than is None or _step(folder) > newer_than.step:
                    folder.rename(folder.with_name(f"{folder.name}.broken-{secrets.token_hex(4)}"))
        self.engine.barrier()

    @torch.no_grad()
    def restore(self, saved: Saved) -> Mapping[str, Any]:
        """Fills the engine's masters, moments and slots; returns the other state.

        Unusable where the checkpoint has not what this engine needs.
        """
        problem = None
        try:
            self._restore_tensors(saved)
        except Unusable as error:
            problem = str(error)
        wrong = [text for text in gather_text(self.engine, problem or "") if text]
        if wrong:
            raise Unusable(wrong[0])
        self.engine.slots.shards.refresh()
        self.last_step = saved.step
        return saved.manifest["state"]

    def _restore_tensors(self, saved: Saved) -> None:
        engine = self.engine
        shards, optimizer = engine.slots.shards, engine.optimizer
        pieces = shards.pieces

        def fill(kind: str, targets: Sequence[Tensor]) -> None:
            for piece, target in zip(pieces, targets, strict=True):
                target.copy_(saved.read(kind, piece.name, piece.start, piece.length))

        saved.check_parameters(pieces)
        fill("master", masters(shards))
        if _quantised(optimizer) != saved.manifest["quantised"]:
            raise Unusable(
                f"{saved.folder}: its moments are of another optimizer; resume with the "
                "train.optimizer.name it was saved with"
            )
        if _quantised(optimizer):
            self._restore_8bit(saved)
        else:
            prepare_moments(optimizer, shards)
            for kind in MOMENTS:
                fill(kind, [piece.of(optimizer.state[piece.home][kind]) for piece in pieces])
            for home in homes(shards):
                optimizer.state[home]["step"].fill_(saved.manifest["updates"])
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
            state = engine.optimizer.state[home]
            state.update({key: tensor.to(home.device) for key, tensor in mine.items()})
            if mine:
                state["step"] = saved.manifest["updates"]


@dataclass
class _Stored:
    start: int
    length: int
    path: Path
    key: str


class Saved:
    """A committed checkpoint. Unusable where its manifest is not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Unusable(f"{folder}: its manifest cannot be read: {error}") from error
        if self.manifest.get("format") != FORMAT:
            raise Unusable(
                f"{folder}: format {self.manifest.get('format')}, this release reads {FORMAT}"
            )
        if self.manifest.get("sha256") != _self_digest(self.manifest):
            raise Unusable(f"{folder}: its manifest was changed")
        self.step = int(self.manifest["step"])
        self._index: dict[str, dict[str, list[_Stored]]] = {}

    def damage(self, rank: int = 0, world: int = 1) -> str | None:
        """What is wrong with this rank's share of the files, if anything."""
        for file in self.manifest["files"][rank::world]:
            path = self.folder / file["name"]
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != file["size"] or _sha256(path) != file["sha256"]:
                return f"{path} is not what was saved"
        return None

    def file(self, kind: str, rank: int) -> Path:
        files = [file["name"] for file in self.manifest["files"] if file["kind"] == kind]
        return self.folder / files[rank]

    def _stored(self, kind: str) -> dict[str, list[_Stored]]:
        if kind not in self._index:
            index: dict[str, list[_Stored]] = {}
            for file in self.manifest["files"]:
                if file["kind"] == kind:
                    path = self.folder / file["name"]
                    with safe_open(path, "pt") as opened:
                        for key in opened.keys():  # noqa: SIM118
                            name, _, start = key.rpartition("@")
                            (length,) = opened.get_slice(key).get_shape()
                            index.setdefault(name, []).append(
                                _Stored(int(start), length, path, key)
                            )
            self._index[kind] = index
        return self._index[kind]

    def check_parameters(self, pieces: Sequence[Piece]) -> None:
        missing = {p.name for p in pieces} - self._stored("master").keys()
        if missing:
            raise Unusable(
                f"{self.folder}: no weights for {sorted(missing)[0]!r} and {len(missing) - 1} more;"
                " it was saved with other train.weights or another model"
            )

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Elements start ... start + length of a flattened parameter: [length], as stored."""
        stored = sorted(self._stored(kind).get(name, []), key=lambda s: s.start)
        parts, position, end = [], start, start + length
        for s in stored:
            first, last = max(position, s.start), min(end, s.start + s.length)
            if first == position and last > first:
                with safe_open(s.path, "pt") as file:
                    parts.append(file.get_slice(s.key)[first - s.start : last - s.start])
                position = last
        if position < end:
            raise Unusable(f"{self.folder}: {kind} has no elements {position} to {end} of {name!r}")
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, kind: str, name: str, shape: Sequence[int]) -> Tensor:
        """A parameter of this shape, assembled from its pieces."""
        return self.read(kind, name, 0, int(torch.Size(shape).numel())).view(*shape)


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints in a run's `checkpoints/`, newest first."""
    found = [p for p in folder.glob("step-*") if COMMITTED.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _name(step: int) -> str:
    return f"step-{step:06d}"


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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _self_digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
