"""GenEval's rules (arXiv 2310.11513): does what a detector found fulfil a prompt?

    kept      per class the 16 surest objects surer than 0.3 (counting: 0.9), the surest first
    counting  exactly the asked number of objects was kept
    others    as many objects of the class were kept as are asked for (one, in GenEval's prompts);
              the surest have the colour and the place
    A is right of B where  d_x / |c_A - c_B| > 0.5  (left: < -0.5; below and above: d_y)
        d = sign(c_A - c_B) max(|c_A - c_B| - 0.1 (size_A + size_B), 0)   c: centres of the boxes

So two relations may hold at once, and none where the boxes lie nearly on one another. A colour or a
place is not fulfilled where its object is missing. (Flow-GRPO's reward also adds 1 for a place that
is wrong, asks for exactly one object where GenEval asks for one or more, and falls below zero for
many objects.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from gardo.rewards.geneval_prompts import RELATIONS, Asked, Relation, Request, Task

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MOST = 16
MARGIN = 0.1
_NOTHING = 1e-3  # pixels: an offset this small is none

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels; y grows downwards


@dataclass(frozen=True)
class Found:
    """An object that the detector found."""

    name: str
    score: float
    box: Box
    colour: str | None = None


Thing = TypeVar("Thing", bound=Found)


def keep(found: Sequence[Thing], task: Task) -> list[Thing]:
    """The objects that count in a task, the surest first; of equally sure ones the earlier."""
    least = COUNTING_THRESHOLD if task == "counting" else THRESHOLD
    kept: list[Thing] = []
    for thing in sorted(found, key=lambda thing: -thing.score):
        if thing.score > least and sum(other.name == thing.name for other in kept) < MOST:
            kept.append(thing)
    return kept


def relations(a: Box, b: Box) -> set[Relation]:
    """Where box a lies, seen from box b: none, one or two of the four relations."""
    centre = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    size = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    beyond = [max(abs(c) - MARGIN * s, 0.0) for c, s in zip(centre, size, strict=True)]
    if max(beyond) < _NOTHING:
        return set()
    x, y = (math.copysign(d, c) / math.hypot(*centre) for d, c in zip(beyond, centre, strict=True))
    holds = (x < -0.5, x > 0.5, y < -0.5, y > 0.5)
    return {relation for relation, true in zip(RELATIONS, holds, strict=True) if true}


def _number(kept: Sequence[Found], name: str) -> int:
    return sum(thing.name == name for thing in kept)


def _surest(kept: Sequence[Found], asked: Asked) -> list[int]:
    """The surest objects of the class, as indices of `kept`, as many as are asked for."""
    return [at for at, thing in enumerate(kept) if thing.name == asked.name][: asked.count]


def judged(request: Request, kept: Sequence[Found]) -> list[int]:
    """The objects, as indices of `kept`, whose colour the rules look at."""
    return [at for asked in request.objects if asked.colour for at in _surest(kept, asked)]


def verdicts(request: Request, kept: Sequence[Found]) -> list[bool]:
    """Which of the rules hold that a prompt sets, from what `keep` returned.

    For each class that is asked for: the number, and the colour if one is asked; then the place;
    then for each class that is not wanted, that there are few enough. The objects of `judged` must
    bring their colour.
    """
    rules: list[bool] = []
    seen: list[list[Found]] = []
    for asked in request.objects:
        things = [kept[at] for at in _surest(kept, asked)]
        enough = len(things) == asked.count
        exact = request.task != "counting" or _number(kept, asked.name) == asked.count
        rules.append(enough and exact)
        if asked.colour:
            rules.append(enough and all(thing.colour == asked.colour for thing in things))
        seen.append(things if enough else [])
    if request.relation:
        pairs = list(itertools.product(*seen))
        holds = [request.relation in relations(a.box, b.box) for a, b in pairs]
        rules.append(bool(pairs) and all(holds))
    return rules + [_number(kept, unwanted.name) < unwanted.count for unwanted in request.absent]


def strict(rules: Sequence[bool]) -> float:
    """1 if all rules hold, else 0: what GenEval reports."""
    return float(all(rules))


def fraction(rules: Sequence[bool]) -> float:
    """The share of the rules that hold."""
    return sum(rules) / len(rules)
