"""What a study trains: arms, seeds and what they share, as a file says it.

A protocol is a recipe without algorithm and run, arms that each give an algorithm and perhaps more
of a recipe, and lists of seeds. A cell is an arm with a seed.
"""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from gardo.settings import Pair, Strict
from pages import ROOT

SIGNS_TITLES = {"paper": "paper's sign", "official_code": "release's sign"}
WATCHED = "study.watched:Watched"  # around every arm's algorithm; it changes nothing


class Arm(Strict):
    title: str
    question: str = Field("main", description="arms of one question are compared")
    seeds: str = Field(description="one of the protocol's lists")
    iterations: int | None = Field(None, description="the protocol's if left out")
    recipe: dict[str, Any] = Field(description="over the shared recipe, section by section")


class Rules(Strict):
    """Where a measure has a limit; changes are in percent points."""

    hacked: float = Field(5.0, description="a held-out that has fallen this far is hacked")
    level: float = Field(5.0, description="rise of the proxy that images are counted to")
    tolerance: float = Field(1.0, description="fall of the held-out that does not count yet")
    auxiliary_fall: float = Field(
        2.0, description="fall of an auxiliary from its best at which early stopping stops"
    )
    calm: int = Field(5, description="first iterations, which say what is usual of a signal")
    window: int = Field(5, description="iterations that a signal is averaged over")
    sigmas: float = Field(3.0, description="standard deviations above its calm that raise it")


class Protocol(Strict):
    title: str
    iterations: int
    rules: Rules = Rules()
    seeds: dict[str, list[int]]
    quick: dict[str, int] = Field(
        default_factory=dict, description="arms of --quick, and how many seeds of each"
    )
    recipe: dict[str, Any] = Field(description="what all arms share")
    arms: dict[str, Arm]
    headline: list[str] = Field([], description="arms of the curves and the pictures")
    watched_arm: str = Field("no_kl", description="early stopping is made of its cells")
    ours: dict[str, str] = Field(
        default_factory=dict, description="of a question, the arm that the others are compared with"
    )
    parts: dict[str, dict[str, Pair[int]]] = Field(
        default_factory=dict,
        description="of the evaluated prompts, reported on their own by a question: from, to",
    )
    page: str = Field(description="the page that shows the tables, in docs")
    results: str = Field(description="where raw metrics, tables and figures go, in results")

    @property
    def images(self) -> int:
        """Sampled in an iteration."""
        data = self.recipe["data"]
        return int(data["prompts_per_step"] * data["images_per_prompt"])

    def cells(self, *, quick: bool = False) -> list[Cell]:
        """Seed by seed, so that what is finished early can be compared."""
        wanted = {
            name: self.seeds[arm.seeds][: self.quick.get(name, 0) if quick else None]
            for name, arm in self.arms.items()
        }
        seeds = dict.fromkeys(seed for listed in wanted.values() for seed in listed)
        return [
            Cell(self, name, seed) for seed in seeds for name in self.arms if seed in wanted[name]
        ]


def load(path: Path) -> Protocol:
    return Protocol.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Cell:
    """An arm with a seed."""

    protocol: Protocol
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """As `gardo train` takes it, but for where it runs."""
        arm = self.protocol.arms[self.arm]
        recipe = merged(self.protocol.recipe, arm.recipe)
        recipe["algorithm"] = {"name": WATCHED, "base": recipe["algorithm"]}
        steps = arm.iterations or self.protocol.iterations
        recipe["run"] = {"name": self.name, "seed": self.seed, "steps": steps}
        return recipe

    @property
    def identity(self) -> str:
        """Equal for cells that train the same."""
        return hashlib.sha256(json.dumps(self.recipe, sort_keys=True).encode()).hexdigest()[:16]

    def write_recipe(self, runs: Path) -> Path:
        """Its recipe as a file in the folder of runs, which it names."""
        recipe = deepcopy(self.recipe)
        for section in (recipe["data"], recipe["evaluate"]):
            section["prompts"] = str(ROOT / section["prompts"])
        recipe["run"]["folder"] = str(runs)
        path = runs / f"{self.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Sections of `above` over those of `below`; an algorithm takes the place of the other."""
    result = deepcopy(below)
    for name, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], value) if both and name != "algorithm" else value
    return deepcopy(result)
