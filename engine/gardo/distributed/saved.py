"""A committed checkpoint on the disk: which there are, whether one is whole, what it holds."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
COMMITTED = re.compile(r"step-(\d{6,})")


class Unusable(ValueError):
    """A checkpoint that is damaged, or does not fit this run; says what and why."""


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
            self.manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Unusable(f"{folder}: its manifest cannot be read: {error}") from error
        if not isinstance(self.manifest, dict) or self.manifest.get("format") != FORMAT:
            found = self.manifest.get("format") if isinstance(self.manifest, dict) else "no"
            raise Unusable(
                f"{folder}: a manifest of {found} format; this release reads format {FORMAT}"
            )
        if self.manifest.get("sha256") != self_digest(self.manifest):
            raise Unusable(f"{folder}: its manifest was changed")
        self.step = int(self.manifest["step"])
        self._index: dict[str, dict[str, list[_Stored]]] = {}

    def misnamed(self) -> str | None:
        """What the folder should be called, if it has another step's name."""
        name = name_of(self.step)
        return None if self.folder.name == name else f"{self.folder}: this is {name}; rename it"

    def damage(self, rank: int = 0, world: int = 1, *, kind: str | None = None) -> str | None:
        """What is wrong with this rank's share of the files (of one kind), if anything."""
        files = [f for f in self.manifest["files"] if kind in (None, f["kind"])]
        for file in files[rank::world]:
            path = self.folder / file["name"]
            try:
                if not path.is_file():
                    return f"{path} is missing"
                if path.stat().st_size != file["size"] or sha256(path) != file["sha256"]:
                    return f"{path} is not what was saved"
            except OSError as error:
                return f"{path} cannot be read: {error}"
        return None

    def not_finite(self, rank: int = 0, world: int = 1, *, kind: str | None = None) -> str | None:
        """Where this rank's share of the files (of one kind) has numbers that are not finite."""
        files = [f for f in self.manifest["files"] if kind in (None, f["kind"])]
        for file in files[rank::world]:
            with safe_open(self.folder / file["name"], "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    if not_finite({key: opened.get_tensor(key)}):
                        return f"{self.folder}: {file['kind']} of {key} is not finite"
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

    def check_run(self, run: str | None) -> None:
        """Unusable where it is another run's, as far as both have an id."""
        found = self.manifest.get("run")
        if run and found and found != run:
            raise Unusable(
                f"{self.folder} is of another run ({found}; this one is {run}); take it out of the "
                "folder"
            )

    def check_parameters(self, names: Sequence[str]) -> None:
        """Unusable where the weights of some parameter are not there at all."""
        missing = set(names) - self._stored("master").keys()
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


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor with a number that is not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            least, most = tensor.aminmax()  # NaN comes through; one pass, no copy
            if not (least.isfinite() and most.isfinite()):
                return name
    return None


def no_run(folder: Path) -> str:
    """What is said of a folder that should be a run's and has no checkpoint; "" of one with any."""
    if committed(folder / "checkpoints"):
        return ""
    return f"{folder}: no checkpoints; name the folder of a run, such as runs/tiny-flux-gardo"


def committed(folder: Path) -> list[Path]:
    """The committed checkpoints in a run's `checkpoints/`, newest first."""
    found = [p for p in folder.glob("step-*") if COMMITTED.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def is_misnamed(folder: Path) -> bool:
    """Whether a checkpoint is whole and has got another step's name."""
    try:
        saved = Saved(folder)
    except Unusable:
        return False
    return saved.misnamed() is not None and saved.damage() is None


def step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def self_digest(manifest: Mapping[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
