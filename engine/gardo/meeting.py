"""Before ranks join: do all run the same recipe, and has none been refused?

Each says so in the store where the launcher's ranks find each other, which takes no GPU and no
process group: so a rank whose recipe is refused is heard of by those that would wait for it in vain
for as long as `distributed.timeout` is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

import gardo
from gardo.data import digest_of
from gardo.evaluation.evaluate import HELD_OUT
from gardo.hf_prompts import is_dataset
from gardo.machine import PACKAGES, ranks
from gardo.policies.lora_files import open_lora
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError, shown
from gardo.run_folder import flat

MEETING_POINT = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # where nothing is said
PATIENCE = 60.0  # seconds that a refused rank waits for those that must hear of it


class Disagreement(RecipeError):
    """Ranks that met and do not go on together: every one of them raises it."""


@contextmanager
def meeting(recipe: Recipe, source: str) -> Iterator[None]:
    """All ranks of a launch meet here, and stay inside until they have joined.

    RecipeError on every rank where one was refused, or has other settings, prompts or versions than
    the first; and where the port at which they meet is another program's.
    """
    rank, _, world = ranks()
    if recipe.distributed.engine == "local" or _alone() or dist.is_initialized():
        yield
        return
    store = _store(recipe.distributed.timeout, source)
    mine = running(recipe)
    store.set(f"gardo/recipe/{rank}", json.dumps(mine))
    digest = hashlib.sha256(json.dumps(mine).encode()).hexdigest()
    everyone = _told(store, f"same {digest}", world)
    problem = _refusal(everyone) or _difference(store, everyone, source)
    store.add("gardo/heard", 1)
    if problem:
        _until_heard(store, world)
        raise Disagreement(problem)
    yield


def refuse(error: RecipeError) -> None:
    """Tells the ranks that are waiting for this one, if any are, why it does not come."""
    rank, _, world = ranks()
    if world == 1 or isinstance(error, Disagreement) or dist.is_initialized():
        return
    with suppress(RuntimeError, RecipeError):  # nobody came, or nobody is left
        store = _store(PATIENCE, "")
        store.set(f"gardo/said/{rank}", f"refused {socket.gethostname()}: {error}")
        store.add("gardo/heard", 1)
        _until_heard(store, world)


def running(recipe: Recipe) -> dict[str, Any]:
    """All that ranks must have in common, by name; of a file that is read, what is in it."""
    fields = flat(recipe.model_dump(mode="json"))
    lora = fields.get("train.weights.path")
    files = {
        "data.prompts": fields["data.prompts"],
        "evaluate.prompts": fields["evaluate.prompts"],
        "train.weights.path": lora and str(open_lora(lora).path),
    }
    for field, path in files.items():
        if is_dataset(path):
            fields[field] = f"prompts with SHA-256 {digest_of(recipe.prompts())[:16]}"
        elif path and path != HELD_OUT:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            fields[field] = f"a file with SHA-256 {digest[:16]}"
    return {**fields, **versions()}


def versions() -> dict[str, str]:
    """Of the packages that a run's numbers come from, and of Python."""
    found = {name: _version(name) for name in PACKAGES}
    return {**found, "gardo": gardo.__version__, "python": platform.python_version()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _alone() -> bool:
    """One process that no launcher has told where to meet: nobody else can be there."""
    return ranks()[2] == 1 and "MASTER_PORT" not in os.environ


def _store(timeout: float, source: str) -> Any:
    rank, _, world = ranks()
    for name, value in MEETING_POINT.items():
        os.environ.setdefault(name, value)
    at = ":".join(os.environ[name] for name in MEETING_POINT)
    try:
        store, *_ = next(rendezvous("env://", rank, world, timeout=timedelta(seconds=timeout)))
    except (dist.DistNetworkError, ValueError) as error:
        first, *_ = str(error).splitlines()
        raise RecipeError(
            f"{source}: the ranks cannot meet at {at} (MASTER_ADDR, MASTER_PORT): {first}; "
            "if another program has that port, give another, or none to `gardo train`"
        ) from error
    return store


def _told(store: Any, mine: str, world: int) -> list[str]:
    """What every rank says, by rank; waits for them."""
    store.set(f"gardo/said/{ranks()[0]}", mine)
    said = []
    for rank in range(world):
        try:
            said.append(store.get(f"gardo/said/{rank}").decode())
        except dist.DistStoreError as error:
            raise RecipeError(
                f"rank {rank} did not come within distributed.timeout; what it printed says why"
            ) from error
    return said


def _refusal(everyone: list[str]) -> str:
    for rank, text in enumerate(everyone):
        kind, _, rest = text.partition(" ")
        if kind == "refused":
            return f"rank {rank} cannot run: {rest}"
    return ""


def _difference(store: Any, everyone: list[str], source: str) -> str:
    """What differs between the first rank and the first that is not like it; "" where all are."""
    other = next((rank for rank, text in enumerate(everyone) if text != everyone[0]), None)
    if other is None:
        return ""
    first, second = (json.loads(store.get(f"gardo/recipe/{rank}")) for rank in (0, other))
    return "\n".join(
        f"{source}: {field}: {shown(first.get(field))} on rank 0, {shown(second.get(field))} on "
        f"rank {other}; start every rank with the same"
        for field in sorted(first.keys() | second.keys())
        if first.get(field) != second.get(field)
    )


def _until_heard(store: Any, world: int) -> None:
    """The first rank has the store in its process: it stays until all have read what they must."""
    end = time.monotonic() + PATIENCE
    while ranks()[0] == 0 and store.add("gardo/heard", 0) < world and time.monotonic() < end:
        time.sleep(0.1)
