"""Trained weights out of a run's checkpoint, for other programs: docs/files.md says which."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from gardo.card import card_facts
from gardo.config import check
from gardo.distributed.average import AVERAGE
from gardo.distributed.saved import Saved, Unusable, committed, no_run, step_of
from gardo.distributed.universal import write_universal
from gardo.files import made_folder
from gardo.loading import build_policy
from gardo.policies.base import Policy
from gardo.policies.folders import SHARD_BYTES, link_pipeline, save_transformer
from gardo.policies.kohya import save_kohya
from gardo.policies.lora_files import save_diffusers, save_peft
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError
from gardo.recipe_text import read
from gardo.report.model_card import write_card

ATTEMPTS = 5  # to catch a checkpoint of a run that prunes them
Weights = Mapping[str, Tensor]
Write = Callable[[Policy, Weights, Path, int], Path]  # (..., bytes a file), returns what it wrote


class Trained(Weights):
    """What trained, by parameter name: each is read from the checkpoint when it is asked for."""

    def __init__(
        self, saved: Saved, kind: str, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype
    ) -> None:
        self._saved, self._kind, self._shapes, self._dtype = saved, kind, shapes, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._saved.whole(self._kind, name, self._shapes[name]).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


# ---- the formats ---------------------------------------------------------------------------------


def _kohya(policy: Policy, weights: Weights, folder: Path, _: int) -> Path:
    if policy.kohya_layout is None:
        raise ValueError(f"kohya: {policy.settings.family} has no such layout; use diffusers")
    modules = dict(policy.transformer.named_modules())
    return save_kohya(
        weights,
        folder,
        alpha=policy.lora.lora_alpha,
        layout=policy.kohya_layout,
        rows=lambda module: modules[module].out_features,
    )


def _transformer(policy: Policy, weights: Weights, folder: Path, shard: int) -> Path:
    if folder.resolve() == (policy.folder / "transformer").resolve():
        raise ValueError(f"{folder}: the base model itself; give another --out")
    return save_transformer(policy.transformer, weights, folder, dtype=policy.dtype, limit=shard)


def _pipeline(policy: Policy, weights: Weights, folder: Path, shard: int) -> Path:
    if folder.resolve() == policy.folder.resolve():
        raise ValueError(f"{folder}: the base model itself; give another --out")
    link_pipeline(policy.folder, folder)
    _transformer(policy, weights, folder / "transformer", shard)
    return folder


FORMATS: dict[str, dict[str, Write]] = {  # by what trained; the first is the default
    "lora": {
        "diffusers": lambda p, weights, folder, _: save_diffusers(weights, p.lora, folder),
        "peft": lambda p, weights, folder, _: save_peft(weights, p.lora, folder),
        "kohya": _kohya,
    },
    "full": {"transformer": _transformer, "pipeline": _pipeline},
}


def export_run(
    folder: Path,
    *,
    format: str | None = None,
    average: bool = False,
    out: Path | None = None,
    policy: Policy | None = None,
    step: int | None = None,
    verify: bool = True,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Exports a run's weights after `step` iterations (the newest checkpoint) to `out`.

    `format` is one of FORMATS that fits what trained, `average` takes the weights' average instead
    of them. `out` is the run's `export/` unless given, with the format and `-ema` in its name where
    they are not the usual. A model card is written beside the weights.

    Builds the policy from the run's recipe unless it is given, without reading its transformer's
    weights. `verify` checks the digests first. Files of whole weights hold at most `shard_bytes`.
    Returns the file or folder. RecipeError where the run has no such weights, or they have no such
    format.
    """
    with pinned(folder, step) as saved:
        return _export(
            saved, folder, format, average=average, out=out, policy=policy, verify=verify,
            shard_bytes=shard_bytes,
        )  # fmt: skip


def _export(
    saved: Saved, folder: Path, format: str | None, *, average: bool, out: Path | None,
    policy: Policy | None, verify: bool, shard_bytes: int,
) -> Path:  # fmt: skip
    recipe = recipe_of(folder)
    format, write = _format(folder, recipe.train.weights.kind, format)
    check_weights(saved, folder, average=average, verify=verify)
    policy = policy or build_policy(recipe, torch.device("cpu"))
    weights = trained(saved, policy, average=average)
    usual = format in [next(iter(formats)) for formats in FORMATS.values()]
    name = "-".join(["export", *([] if usual else [format]), *(["ema"] if average else [])])
    try:
        out = made_folder(out or folder / name)
        written = write(policy, weights, out, shard_bytes)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    its = recipe_of(folder, whole=False)
    write_card(out, card_facts(folder, its, saved, format=format, average=average), folder)
    return written


def check_weights(saved: Saved, folder: Path, *, average: bool, verify: bool = True) -> None:
    """RecipeError where the checkpoint has no such weights, or not as they were saved."""
    kind = _kind(average)
    if not any(file["kind"] == kind for file in saved.manifest["files"]):
        raise RecipeError(
            f"{folder}: --ema: the run kept no average of its weights (train.ema); leave out --ema"
        )
    if verify and (damage := saved.damage(kind=kind)):
        raise RecipeError(damage)
    if strange := saved.not_finite(kind=kind):
        raise RecipeError(f"{strange}; choose another checkpoint with --step")


def trained(saved: Saved, policy: Policy, *, average: bool) -> Trained:
    """What the run trained, for a policy that is built as `build_policy` does."""
    shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in policy.trainable().items()}
    dtype = policy.dtype if policy.lora is None else torch.float32
    return Trained(saved, _kind(average), shapes, dtype)


def _kind(average: bool) -> str:
    return f"slot.{AVERAGE}" if average else "master"


def _format(folder: Path, kind: str, wanted: str | None) -> tuple[str, Write]:
    """The format's name and writer. RecipeError where what trained cannot be written so."""
    formats = FORMATS[kind]
    name = wanted or next(iter(formats))
    if name not in formats:
        trained = "a LoRA" if kind == "lora" else "all weights"
        why = ""
        if kind == "lora" and name in FORMATS["full"]:
            why = (" (fused, a LoRA would be rounded to the weights' precision: load the base "
                   "model, then the LoRA)")  # fmt: skip
        raise RecipeError(
            f"{folder}: --format {name}: this run trained {trained}; use {', '.join(formats)}{why}"
        )
    return name, formats[name]


def export_universal(folder: Path, *, out: Path | None = None, step: int | None = None) -> Path:
    """Writes a run's masters and moments in DeepSpeed's universal layout, to `out`.

    `out` is the run's `universal/` unless given. RecipeError where the run has no such checkpoint.
    """
    with pinned(folder, step) as saved:
        if damage := saved.damage():
            raise RecipeError(damage)
        policy = build_policy(recipe_of(folder), torch.device("cpu"))
        shapes = {n: tuple(p.shape) for n, p in policy.trainable().items()}
        try:
            return write_universal(saved, shapes, made_folder(out or folder / "universal"))
        except ValueError as error:
            raise RecipeError(str(error)) from error


def recipe_of(folder: Path, *, whole: bool = True) -> Recipe:
    """The recipe of a run, on a `whole` base: what trains has the same names there."""
    source = folder / "recipe.yaml"
    recipe = check(read(source), str(source), rules=())
    if not whole:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": None})})


@contextmanager
def pinned(folder: Path, step: int | None) -> Iterator[Saved]:
    """The checkpoint of a step, or the newest; a run that goes on cannot prune it meanwhile.

    Its files get second names for that, by hard links, where the file system has them.
    """
    with tempfile.TemporaryDirectory(dir=_writable(folder), prefix=".export-") as place:
        for attempt in range(ATTEMPTS):
            saved = checkpoint_of(folder, step)
            pinned = Path(place) / str(attempt) / saved.folder.name
            try:
                pinned.mkdir(parents=True)
                for file in saved.folder.iterdir():
                    os.link(file, pinned / file.name)
                linked = Saved(pinned)
                break
            except (FileNotFoundError, Unusable):  # pruned meanwhile: there is a newer one
                continue
            except OSError:  # no links here
                linked = saved
                break
        else:
            raise RecipeError(f"{folder}: its checkpoints go away too fast; raise checkpoint.keep")
        try:
            yield linked
        except RecipeError as error:
            raise RecipeError(str(error).replace(str(pinned), str(saved.folder))) from error


def _writable(folder: Path) -> Path | None:
    """The folder, where links to its files can be; else the system's for temporary files."""
    return folder if folder.is_dir() and os.access(folder, os.W_OK) else None


def checkpoint_of(folder: Path, step: int | None) -> Saved:
    """The checkpoint of a step, or the newest."""
    if nothing := no_run(folder):
        raise RecipeError(nothing)
    found = committed(folder / "checkpoints")
    wanted = [p for p in found if step is None or step_of(p) == step]
    if not wanted:
        have = ", ".join(p.name for p in found)
        raise RecipeError(f"{folder}: no checkpoint of step {step}; it has {have}")
    try:
        saved = Saved(wanted[0])
    except Unusable as error:
        raise RecipeError(str(error)) from error
    if problem := saved.misnamed():
        raise RecipeError(problem)
    return saved
