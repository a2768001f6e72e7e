"""Checkpoints on a tiny state: exact, whole or not there at all, and damage is seen.

What many ranks do with them is in tests/integration/test_resume.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from gardo.distributed import checkpoint
from gardo.distributed.checkpoint import Checkpoints, CheckpointSettings
from gardo.distributed.local import LocalEngine
from gardo.distributed.optimizers import MOMENTS, OptimizerSettings
from gardo.distributed.saved import Saved, Unusable, committed
from gardo.distributed.shards import masters
from gardo.distributed.universal import write_universal

STATE = {"algorithm": {"updates": 3, "fraction": 0.1 + 0.2}, "first": {"reward": [0.1, 1e-300]}}


class Run:
    """A small network in training, with its checkpoints."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        slots: tuple[str, ...] = ("old",),
        name: str | None = None,
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        self.engine = LocalEngine(
            dict(self.model.named_parameters()),
            optimizer=OptimizerSettings(lr=0.1),
            accumulation=1,
            max_grad_norm=1.0,
            device=torch.device("cpu"),
        )
        self.slots = self.engine.make_slots(slots)
        settings = CheckpointSettings(every=1, keep=keep)
        self.checkpoints = Checkpoints(folder, self.engine, settings, name)
        self.step = 0

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.step += 1
            x = torch.arange(6.0).view(2, 3) / (1 + self.step)
            self.engine.backward(self.model(x).square().mean(), last=True)
            self.engine.step()
            for name in self.slots.names:
                self.slots.decay(name, 0.7)
        return self

    def save(self, *, wait: bool = True) -> str | None:
        return self.checkpoints.save(self.step, {**STATE, "step": self.step}, wait=wait)

    def train_and_save(self, steps: int) -> Run:
        for _ in range(steps):
            assert self.train(1).save() is None
        return self

    def resume(self) -> tuple[Saved | None, list[str]]:
        saved, wrong = self.checkpoints.newest()
        if saved:
            self.state = self.checkpoints.restore(saved)
            self.step = saved.step
        return saved, wrong

    def bits(self) -> list[torch.Tensor]:
        state = self.engine.optimizer.state
        moments = [state[p][kind] for p in self.model.parameters() for kind in (*MOMENTS, "step")]
        slots = [t for name in self.slots.names for t in self.slots.pieces(name)]
        return [t.clone() for t in (*masters(self.slots.shards), *moments, *slots)]


def equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_resume_is_exact(tmp_path: Path) -> None:
    uncut = Run(tmp_path).train_and_save(2)
    resumed = Run(tmp_path)
    saved, wrong = resumed.resume()
    assert saved and saved.step == 2 and not wrong
    assert resumed.state == {**STATE, "step": 2}
    assert equal(resumed.bits(), uncut.bits())
    assert equal(resumed.train(3).bits(), uncut.train(3).bits())
    assert not equal(resumed.bits(), Run(tmp_path).train(1).bits())  # the comparison can fail


def test_a_checkpoint_before_the_first_update_is_exact(tmp_path: Path) -> None:
    fresh = Run(tmp_path)
    assert fresh.save() is None
    resumed = Run(tmp_path)
    assert resumed.resume()[0]
    assert equal(resumed.train(2).bits(), fresh.train(2).bits())


def test_files_are_pieces_with_global_offsets(tmp_path: Path) -> None:
    run = Run(tmp_path).train_and_save(1)
    saved = Saved(tmp_path / "step-000001")
    kinds = {file["kind"] for file in saved.manifest["files"]}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "slot.old"}
    weight = run.model[0].weight
    assert torch.equal(saved.whole("master", "0.weight", weight.shape), weight)
    assert torch.equal(saved.read("master", "0.weight", 4, 7), weight.flatten()[4:11])
    with pytest.raises(Unusable, match="no elements 15 to 16 of '0\\.weight'"):
        saved.read("master", "0.weight", 10, 6)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


MASTER, MANIFEST = "master-00000-of-00001.safetensors", "manifest.json"
DAMAGE: dict[str, Callable[[Path, Path], Any]] = {  # (the newest, the one before)
    "a truncated piece": lambda new, old: os.truncate(new / MASTER, 100),
    "an empty piece": lambda new, old: os.truncate(new / MASTER, 0),
    "a flipped bit of a weight": lambda new, old: flip(new / MASTER, -1),
    "a flipped bit of a header": lambda new, old: flip(new / MASTER, 12),
    "a missing piece": lambda new, old: (new / MASTER).unlink(),
    "a piece of another checkpoint": lambda new, old: shutil.copy(old / MASTER, new / MASTER),
    "an older manifest": lambda new, old: shutil.copy(old / MANIFEST, new / MANIFEST),
    "a changed manifest": lambda new, old: replace_in(new / MANIFEST, '"step": 2', '"step": 9'),
    "changed state": lambda new, old: replace_in(new / MANIFEST, '"updates": 3', '"updates": 4'),
    "a truncated manifest": lambda new, old: os.truncate(new / MANIFEST, 200),
    "no manifest": lambda new, old: (new / MANIFEST).unlink(),
    "a manifest of nothing": lambda new, old: (new / MANIFEST).write_text("null"),
    "a folder for a piece": lambda new, old: ((new / MASTER).unlink(), (new / MASTER).mkdir()),
    "a manifest of another format": lambda new, old: replace_in(
        new / MANIFEST, '"format": 1', '"format": 2'
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    run = Run(tmp_path).train_and_save(1)
    before = run.bits()
    run.train_and_save(1)
    newest = tmp_path / "step-000002"
    DAMAGE[damage](newest, tmp_path / "step-000001")
    resumed = Run(tmp_path)
    saved, wrong = resumed.resume()
    assert saved and saved.step == 1
    assert len(wrong) == 1 and str(newest) in wrong[0]
    assert equal(resumed.bits(), before)
    resumed.checkpoints.set_aside(saved)  # neither counted nor lost
    assert [p.name for p in committed(tmp_path)] == ["step-000001"]
    assert len(list(tmp_path.glob("step-000002.broken-*"))) == 1
    resumed.train_and_save(3)
    kept = {p.name for p in committed(tmp_path)}
    assert kept == {"step-000004", "step-000003", "step-000001"}  # the last two, and the origin


def test_nothing_usable_is_said(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.checkpoints.newest() == (None, [])
    run.train_and_save(2)
    for folder in committed(tmp_path):
        (folder / MASTER).unlink()
    saved, wrong = Run(tmp_path).resume()
    assert saved is None and len(wrong) == 2


@pytest.mark.parametrize(
    ("slots", "said"),
    [(("old", "reference"), "slot.reference has no elements 0 to 15 of '0.weight'"), ((), None)],
)
def test_slots_must_be_there(tmp_path: Path, slots: tuple[str, ...], said: str | None) -> None:
    Run(tmp_path).train_and_save(1)
    other = Run(tmp_path, slots=slots)
    if said is None:
        assert other.resume()[0]
    else:
        with pytest.raises(Unusable, match=said):
            other.resume()


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    Run(tmp_path).train_and_save(1)
    other = Run(tmp_path)
    named = {f"adapter.{n}": p for n, p in other.model.named_parameters()}
    other.engine = LocalEngine(
        named, optimizer=OptimizerSettings(), accumulation=1, max_grad_norm=1.0,
        device=torch.device("cpu"),
    )  # fmt: skip
    checkpoints = Checkpoints(tmp_path, other.engine, CheckpointSettings())
    saved, _ = checkpoints.newest()
    assert saved
    with pytest.raises(Unusable, match=r"no weights for 'adapter\.0\.bias' and 3 more"):
        checkpoints.restore(saved)


@pytest.mark.parametrize(
    ("saved_by", "resumed_by", "fits"),
    [("a", "a", True), ("a", "b", False), (None, "b", True), ("a", None, True)],
)
def test_checkpoints_of_another_run_are_refused(
    saved_by: str | None, resumed_by: str | None, fits: bool, tmp_path: Path
) -> None:
    """Those from before runs had ids are taken as they are."""
    Run(tmp_path, name=saved_by).train_and_save(1)
    other = Run(tmp_path, name=resumed_by)
    if fits:
        assert other.resume()[0] and other.checkpoints.run == (resumed_by or saved_by)
        return
    with pytest.raises(Unusable, match=r"step-000001 is of another run \(a; this one is b\)"):
        other.resume()


def slowly(monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> threading.Event:
    """Lets no file be written before the event; then writes, or raises the error."""
    go, working = threading.Event(), safetensors.torch.save_file

    def wait(*arguments: Any) -> None:
        assert go.wait(60)
        working(*arguments)
        if error:
            raise error

    monkeypatch.setattr(safetensors.torch, "save_file", wait)
    return go


def test_what_is_saved_in_the_background_is_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, go = Run(tmp_path).train(1), slowly(monkeypatch)
    bits = run.bits()
    assert run.save(wait=False) is None
    run.train(2)  # goes on, and changes everything, while nothing is written yet
    assert run.checkpoints.settle(wait=False) is None
    assert run.checkpoints.last_step is None and not committed(tmp_path)
    go.set()
    assert run.checkpoints.settle() is None
    assert run.checkpoints.last_step == 1
    assert equal_after_resume(tmp_path, bits)
    assert not equal(run.bits(), bits)
    assert run.save(wait=False) is None and run.train(1).save() is None  # one after the other
    assert [p.name for p in committed(tmp_path)] == ["step-000004", "step-000003"]


def test_a_failure_in_the_background_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path).train_and_save(1)
    go = slowly(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert run.train(1).save(wait=False) is None
    go.set()
    problem = run.checkpoints.settle()
    assert problem and "step 2: rank 0" in problem and "No space left" in problem
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_without_memory_for_a_copy_it_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path).train(1)
    monkeypatch.setattr(checkpoint, "host_memory", lambda ranks: 1000)
    assert run.save(wait=False) is None
    assert run.checkpoints.last_step == 1
    assert [p.name for p in committed(tmp_path)] == ["step-000001"]


def test_quantised_moments_have_no_universal_layout(tmp_path: Path) -> None:
    run = Run(tmp_path / "run").train_and_save(1)
    saved = Saved(tmp_path / "run" / "step-000001")
    shapes = {name: tuple(p.shape) for name, p in run.model.named_parameters()}
    assert write_universal(saved, shapes, tmp_path / "out") == tmp_path / "out"
    assert len(list((tmp_path / "out" / "step1" / "zero" / "0.weight").iterdir())) == 4
    saved.manifest["quantised"] = True
    with pytest.raises(Unusable, match="no place for 8-bit moments"):
        write_universal(saved, shapes, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---- the disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_full_disk_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    run = Run(tmp_path).train_and_save(1)
    before, calls, working = run.bits(), 0, safetensors.torch.save_file

    def full(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        working(*arguments)
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    problem = run.train(1).save()
    assert problem and "rank 0" in problem and "No space left" in problem
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    monkeypatch.undo()
    assert equal_after_resume(tmp_path, before)
    assert run.save() is None  # and once there is room, it goes on
    assert [p.name for p in committed(tmp_path)] == ["step-000002", "step-000001"]


def equal_after_resume(folder: Path, bits: list[torch.Tensor]) -> bool:
    resumed = Run(folder)
    resumed.resume()
    return equal(resumed.bits(), bits)


def test_room_is_looked_for_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path).train(1)
    size = 4 * 32 * 4  # 32 weights, two moments and a slot, fp32
    needed = int(checkpoint.ROOM * size)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    problem = run.save()
    assert problem and f"{needed - 1} bytes free, a checkpoint may need {needed}" in problem
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert run.save() is None


def test_a_slow_disk_does_not_hold_up_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old checkpoints are removed in a thread: only where the room is needed does a save wait."""
    removes = threading.Event()
    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: removes.wait(30) and remove(*a, **k))
    run = Run(tmp_path, keep=1).train_and_save(3)
    assert len(list(tmp_path.glob("*.tmp-*"))) == 2 and not removes.is_set()
    free = iter([0, 1 << 30])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=next(free)))
    threading.Timer(0.2, removes.set).start()
    run.train_and_save(1)
    assert removes.is_set()
    run.checkpoints.close()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000004"]


CALLS = [(os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "open"),
         (safetensors.torch, "save_file"), (checkpoint.shutil, "rmtree")]  # fmt: skip


def instrumented(before: Callable[[str, tuple[Any, ...]], None]) -> Callable[[], None]:
    """Calls `before` ahead of every step towards the disk; returns what undoes that."""
    working = [(module, name, getattr(module, name)) for module, name in CALLS]

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **named: Any) -> Any:
            before(name, arguments)
            return call(*arguments, **named)

        return step

    for module, name, call in working:
        setattr(module, name, watched(name, call))
    return lambda: [setattr(m, n, call) for m, n, call in working] and None


def test_killed_at_any_step_of_a_save_a_whole_checkpoint_remains(tmp_path: Path) -> None:
    """A process that dies ahead of its k-th step towards the disk, for every k."""
    template = tmp_path / "template"
    one = Run(template, keep=1).train_and_save(1).bits()
    steps: list[str] = []
    counted = Run(shutil.copytree(template, tmp_path / "counted"), keep=1).train(2)
    undo = instrumented(lambda name, _: steps.append(name))
    assert counted.save() is None
    counted.checkpoints.close()
    undo()
    two = counted.bits()
    assert {"fsync", "rename", "mkdir", "save_file", "rmtree"} <= set(steps)
    seen = set()
    for k in range(len(steps)):
        folder = tmp_path / f"killed-{k}"
        shutil.copytree(template, folder)
        child = os.fork()
        if child == 0:
            dying = Run(folder, keep=1).train(2)
            left = iter(range(k, -1, -1))
            instrumented(lambda name, _, left=left: os._exit(9) if next(left) == 0 else None)
            dying.save()
            dying.checkpoints.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, f"{k}: {steps[k]}"
        survivor = Run(folder, keep=1)
        saved, wrong = survivor.resume()
        assert saved and not wrong, (k, steps[k])
        seen.add(saved.step)
        assert equal(survivor.bits(), {1: one, 2: two}[saved.step]), (k, steps[k])
        survivor.train_and_save(1).checkpoints.close()  # whatever was left over is swept
        assert not list(folder.glob("*.tmp-*"))
    assert seen == {1, 2}


def test_every_file_is_on_the_disk_before_the_commit(tmp_path: Path) -> None:
    run = Run(tmp_path).train(1)
    log: list[tuple[str, str]] = []

    def path_of(arguments: tuple[Any, ...]) -> str:
        first = arguments[0]
        if isinstance(first, int):
            return os.readlink(f"/proc/self/fd/{first}")
        return str(arguments[1] if isinstance(first, dict) else first)

    undo = instrumented(lambda name, arguments: log.append((name, path_of(arguments))))
    assert run.save() is None
    undo()
    commit = next(i for i, (name, path) in enumerate(log) if name == "rename" and ".tmp-" in path)
    part = log[commit][1]
    manifest = json.loads((tmp_path / "step-000001" / MANIFEST).read_text())
    named = [f"{part}/{file['name']}" for file in manifest["files"]] + [f"{part}/{MANIFEST}"]
    for path in named:
        flushed = [i for i, entry in enumerate(log) if entry == ("fsync", path)]
        written = [i for i, entry in enumerate(log) if entry == ("save_file", path)]
        assert flushed and max([*written, -1]) < flushed[-1] < commit, path
    assert ("fsync", part) in log[:commit]  # the folder's entries
    assert ("fsync", str(tmp_path)) in log[commit:]  # and the new name
