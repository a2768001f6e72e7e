"""What draws: a base model, with a LoRA's weights on it or those of a run's checkpoint."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gardo.distributed.saved import Saved
from gardo.export import check_weights, checkpoint_of, pinned, recipe_of, trained
from gardo.loading import build_policy, quiet_libraries
from gardo.machine import check_device, use_allocator, use_bf16_reductions, use_device
from gardo.policies.base import Policy
from gardo.policies.lora_files import LoraFile, open_lora
from gardo.policies.settings import PolicySettings
from gardo.recipe import Recipe, policy_plugin
from gardo.recipe_errors import RecipeError
from gardo.settings import FieldError
from gardo.suite import Asked, model_settings


@dataclass(frozen=True)
class RunWeights:
    """The weights of a run after `step` iterations, or their average."""

    folder: Path
    step: int
    average: bool
    digest: str  # of the checkpoint
    base: Mapping[str, Any]  # what the run says that it trained
    recipe: Recipe


@dataclass(frozen=True)
class Contender:
    """A model, checked as far as it can be before anything loads."""

    model: PolicySettings
    precision: str
    lora: LoraFile | None = None
    run: RunWeights | None = None

    @property
    def name(self) -> str:
        """For a folder's name: the model, and what is on it."""
        if self.run:
            average = "-ema" if self.run.average else ""
            return f"{_slug(self.run.recipe.run.name)}-step-{self.run.step}{average}"
        if self.lora:
            folder = self.lora.path.parent
            given = self.lora.path.stem if "lora_weights" not in self.lora.path.stem else ""
            given = given if given and "adapter_model" not in given else folder.resolve().name
            return f"{_slug(self.model.path)}-{_slug(given)}"
        return _slug(self.model.path)

    def policy(self, device: torch.device) -> Policy:
        """The model without its transformer's weights. RecipeError."""
        dtype = getattr(torch, self.precision)
        try:
            if self.run:
                recipe = self.run.recipe
                spread = recipe.distributed.model_copy(update={"precision": self.precision})
                asked = recipe.model_copy(update={"model": self.model, "distributed": spread})
                return build_policy(asked, device)
            plugin = policy_plugin(self.model)
            policy: Policy = plugin(self.model, dtype=dtype, device=device, defer=True)
        except FieldError as error:
            raise RecipeError(str(error)) from error
        except (OSError, ValueError) as error:  # what a folder's inside can still refuse
            raise RecipeError(f"{self.model.path}: the model does not load: {error}") from error
        if self.lora:
            try:
                rank, alpha = self.lora.rank, self.lora.alpha
                policy.train_lora(rank=rank, alpha=alpha, targets=self.lora.targets, seed=0)
                policy.start_from(self.lora)
            except ValueError as error:
                _, _, said = str(error).partition(": ")
                raise RecipeError(f"--lora: {said}") from error
        return policy

    def load(self, policy: Policy) -> None:
        """The transformer's weights into a policy of `policy`. RecipeError."""
        policy.load_transformer()
        if self.run:
            with pinned(self.run.folder, self.run.step) as saved:
                self._check(saved)
                _put(policy, trained(saved, policy, average=self.run.average))
        if self.lora:
            _put(policy, self.lora.read())
        policy.transformer.requires_grad_(False)

    def _check(self, saved: Saved) -> None:
        assert self.run
        check_weights(saved, self.run.folder, average=self.run.average)
        if saved.manifest["sha256"] != self.run.digest:
            raise RecipeError(
                f"{saved.folder}: it has changed since this command began; start it again"
            )

    def identity(self, policy: Policy) -> dict[str, Any]:
        """Which weights these are: JSON, equal for equal weights. RecipeError where the base is
        not that of the run. Reads all of the transformer's files."""
        found: dict[str, Any] = {"family": self.model.family, **policy.identity}
        found |= {"precision": self.precision, "base": self.model.base}
        found |= {"guidance": self.model.guidance, "text_tokens": self.model.text_tokens}
        if self.lora:
            found["lora"] = {"path": str(self.lora.path), "sha256": self.lora.digest}
            found["lora"] |= {"rank": self.lora.rank, "alpha": self.lora.alpha}
        if self.run:
            for which in ("sha256", "revision"):
                was = self.run.base.get(which)
                if was and found.get(which) and was != found[which]:
                    raise RecipeError(
                        f"{self.run.folder}: it trained {self.run.base.get('id')} ({which} "
                        f"{was[:12]}), and {self.model.path} is another ({found[which][:12]}); "
                        "give the model that it trained, or leave it out"
                    )
            found["run"] = {
                "name": self.run.recipe.run.name,
                "step": self.run.step,
                "weights": "average" if self.run.average else "live",
                "sha256": self.run.digest,
                "trains": self.run.recipe.train.weights.kind,
            }
        return dict(json.loads(json.dumps(found)))


def contender(
    asked: Asked,
    model: str | None,
    *,
    lora: Path | None = None,
    run: Path | None = None,
    step: int | None = None,
    average: bool = False,
) -> Contender:
    """What the command names, its settings checked against its files. RecipeError."""
    check_choice(model, lora=lora, run=run, step=step, average=average)
    if run:
        return _of_run(asked, model, run, step, average)
    assert model is not None
    path, revision = named_model(model)
    settings = model_settings(asked, path, revision=revision)
    try:
        return Contender(settings, asked.precision, lora=open_lora(lora) if lora else None)
    except ValueError as error:
        raise RecipeError(f"--lora: {error}") from error


def check_device_of(one: Contender, command: str) -> None:
    """RecipeError where the model is not meant for what this machine has."""
    check_device(one.model.path, command, "MODEL", would="draw", mend="use")


def ready_device(local_rank: int, threads: int) -> torch.device:
    """Readies this process to draw, on its GPU or this many threads of a CPU."""
    quiet_libraries()
    use_allocator()
    device = use_device(local_rank)
    use_bf16_reductions(False)  # as in training
    torch.set_num_threads(threads)
    return device


def check_choice(
    model: str | None, *, lora: Path | None, run: Path | None, step: int | None, average: bool
) -> None:
    """RecipeError where the options of a command do not name one model."""
    if lora and run:
        raise RecipeError("--lora: a run has weights of its own; leave out --lora or --run")
    if not run and (step is not None or average):
        raise RecipeError(f"{'--ema' if average else '--step'}: of a run's checkpoint; give --run")
    if model is None and not run:
        raise RecipeError("MODEL: give a diffusers folder, a hub id or builtin:flux; or --run RUN")


def named_model(model: str) -> tuple[str, str | None]:
    """Path and revision of a folder, or of `ID@REVISION`."""
    if os.path.exists(model):
        return model, None
    path, _, revision = model.partition("@")
    return path, revision or None


def _of_run(
    asked: Asked, model: str | None, run: Path, step: int | None, average: bool
) -> Contender:
    saved = checkpoint_of(run, step)
    recipe = recipe_of(run)
    check_weights(saved, run, average=average, verify=False)
    like: PolicySettings = recipe.model
    path, revision = named_model(model) if model else (like.path, like.revision)
    if path == like.path:
        revision = revision or like.revision
    settings = model_settings(asked, path, revision=revision, like=like)
    state = saved.manifest.get("state") or {}
    base = state.get("base") or {}
    weights = RunWeights(run, saved.step, average, saved.manifest["sha256"], base, recipe)
    return Contender(settings, asked.precision, run=weights)


def _put(policy: Policy, weights: Mapping[str, Tensor]) -> None:
    """Overwrites what trains."""
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.copy_(weights[name])


def _slug(path: str) -> str:
    """`black-forest-labs/FLUX.1-dev` -> FLUX.1-dev, `builtin:flux` -> builtin-flux."""
    last = Path(path).name if not path.startswith("builtin:") else path
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "model"
