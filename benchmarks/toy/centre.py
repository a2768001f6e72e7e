"""The toy's second question: under which conditions is the centre covered?

The cases of benchmarks/toy/centre.yaml are the toy with another centre, or without the spurious
place; all else is toy.yaml's. A run is looked at several times, for what is covered early and lost
late.
"""

from __future__ import annotations

import csv
import multiprocessing
from functools import partial
from pathlib import Path

import torch
import yaml

from gardo.settings import Strict
from toy.pulls import REGIONS, pulls
from toy.seeds import START, origin
from toy.tables import MEASURES
from toy.train import Run, positions
from toy.world import PlanePolicy, Toy, measures, pretrain

DIVERSITY = "diversity"  # the arm whose first step is taken apart
PULLS = tuple(f"pull_{name}" for name in REGIONS)
FIELDS = (
    "case", "arm", "seed", "iteration", *MEASURES, *PULLS, "revision", "torch", "python"
)  # fmt: skip


class Case(Strict):
    title: str
    centre_density: float
    spurious_height: float
    arms: list[str]

    def toy(self, toy: Toy) -> Toy:
        """The toy with this case's layout and arms."""
        spurious = toy.layout.spurious.model_copy(update={"height": self.spurious_height})
        layout = toy.layout.model_copy(
            update={"centre_density": self.centre_density, "spurious": spurious}
        )
        arms = {name: toy.arms[name] for name in self.arms}
        return toy.model_copy(update={"layout": layout, "arms": arms})


class Question(Strict):
    seeds: int
    looked_at: list[int]  # iterations
    cases: dict[str, Case]


def load_question(path: Path) -> Question:
    return Question.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def of_case(
    question: Question, toy: Toy, where: dict[str, str], piece: tuple[int, str]
) -> list[dict[str, str]]:
    """The rows of a seed and a case: the pre-trained policy, and every look at every arm."""
    torch.set_num_threads(1)
    seed, name = piece
    world = question.cases[name].toy(toy)
    policy = pretrain(world.layout, world.pretraining, seed)
    rows: list[dict[str, str]] = []

    def look(arm: str, iteration: int, policy: PlanePolicy, **more: float) -> None:
        found = measures(world.layout, positions(policy, world.training, seed)) | more
        rows.append(
            {"case": name, "arm": arm, "seed": str(seed), "iteration": str(iteration), **where}
            | {measure: f"{value:.6g}" for measure, value in found.items()}
        )

    first = pulls(world, DIVERSITY, seed, policy)
    look(START, 0, policy, **{f"pull_{region}": pull for region, pull in first.items()})
    for arm in world.arms:
        run = Run(world, arm, seed, policy)
        for step in range(max(question.looked_at)):
            run.iteration(step)
            if step + 1 in question.looked_at:
                look(arm, step + 1, run.policy)
    return rows


def of_all_seeds(question: Question, toy: Toy, path: Path, *, processes: int, resume: bool) -> None:
    """Writes the CSV anew after every case of a seed; `resume` leaves out those that it has."""
    rows = read(path) if resume and path.exists() else []
    done = {(int(row["seed"]), row["case"]) for row in rows}
    pieces = [(seed, case) for seed in range(question.seeds) for case in question.cases]
    left = [piece for piece in pieces if piece not in done]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for found in pool.imap(partial(of_case, question, toy, origin()), left):
            rows += found
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(rows)
            print(f"seed {found[0]['seed']}, {found[0]['case']}: done", flush=True)
