"""GenEval's prompts (arXiv 2310.11513): what they ask for, word for word, and new ones.

    single_object  a photo of a bench
    two_object     a photo of a bowl and an apple
    counting       a photo of three benchs
    colors         a photo of an orange cup
    position       a photo of a cow right of a laptop
    color_attr     a photo of a pink handbag and a black dog

Articles and plurals are GenEval's own, which knows no irregular ones ("benchs", "sheeps").
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

Task = Literal["single_object", "two_object", "counting", "colors", "position", "color_attr"]
Relation = Literal["left of", "right of", "above", "below"]

Colour = Literal[
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"
]

TASKS: tuple[Task, ...] = get_args(Task)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
COLOURS: tuple[Colour, ...] = get_args(Colour)

# COCO's 80 classes in COCO's order, with GenEval's names for "mouse", "remote" and "keyboard"
_NAMES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
    bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard,
    sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle,
    wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
    hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    computer mouse, tv remote, computer keyboard, cell phone, microwave, oven, toaster, sink,
    refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
CLASSES = tuple(name.strip() for name in _NAMES.split(","))

# At most 16 objects of a class are looked at, so "sixteen" could not be told from more.
_WORDS = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
NUMBERS = dict(enumerate(_WORDS.split(), start=2))

_OPENING = "a photo of "


@dataclass(frozen=True)
class Asked:
    """Objects of one class that a prompt asks for."""

    name: str
    count: int = 1
    colour: str | None = None


@dataclass(frozen=True)
class Request:
    """What a prompt asks for. In `position`, the first object stands `relation` the second.

    Of each of `absent` there must be fewer than its `count`.
    """

    task: Task
    objects: tuple[Asked, ...]
    relation: Relation | None = None
    absent: tuple[Asked, ...] = ()


def plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


_SINGULAR = {plural(name): name for name in CLASSES}
_COUNTS = {word: count for count, word in NUMBERS.items()}


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _phrase(asked: Asked) -> str:
    if asked.count > 1:
        return f"{NUMBERS[asked.count]} {plural(asked.name)}"
    words = f"{asked.colour} {asked.name}" if asked.colour else asked.name
    return f"{_article(words)} {words}"


def text(request: Request) -> str:
    """The prompt that asks for this; `parse` reads it back."""
    phrases = [_phrase(asked) for asked in request.objects]
    return _OPENING + f" {request.relation or 'and'} ".join(phrases)


def known(word: str, words: Sequence[str], what: str) -> str:
    """The word. ValueError names the nearest of the words, where it is none of them."""
    if word in words:
        return word
    near = difflib.get_close_matches(word, words, n=1)
    raise ValueError(f"{word!r} is not {what}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _object(phrase: str) -> Asked:
    """ "a dog", "an orange cup": the class comes before the colour, or no orange had a class."""
    article, _, words = phrase.partition(" ")
    if article not in ("a", "an") or not words:
        raise ValueError(f"{phrase!r} opens with neither 'a', 'an' nor a number two to fifteen")
    if article != _article(words):
        raise ValueError(f"{phrase!r}: GenEval writes '{_article(words)} {words}'")
    colour, _, name = words.partition(" ")
    if words in CLASSES or colour not in COLOURS:
        return Asked(known(words, CLASSES, "one of GenEval's 80 classes, nor colour and class"))
    return Asked(known(name, CLASSES, "one of GenEval's 80 classes"), colour=colour)


def _parse(body: str) -> Request:
    number, _, name = body.partition(" ")
    if number in _COUNTS:
        name = known(name, tuple(_SINGULAR), "the plural, as GenEval writes it, of a class")
        return Request("counting", (Asked(_SINGULAR[name], _COUNTS[number]),))
    for relation in (*RELATIONS, "and"):
        first, found, second = body.partition(f" {relation} ")
        if found:
            return _pair(_object(first), relation, _object(second))
    asked = _object(body)
    return Request("colors" if asked.colour else "single_object", (asked,))


def _pair(first: Asked, relation: str, second: Asked) -> Request:
    if first.name == second.name:
        raise ValueError(f"{first.name!r} is asked for twice")
    coloured = (first.colour is not None) + (second.colour is not None)
    if relation != "and":
        if coloured:
            raise ValueError(f"a colour beside {relation!r}: GenEval asks for one or the other")
        place = next(known for known in RELATIONS if known == relation)
        return Request("position", (first, second), place)
    if coloured == 1:
        raise ValueError("one object has a colour and the other none")
    return Request("color_attr" if coloured else "two_object", (first, second))


@lru_cache(maxsize=65536)
def parse(prompt: str) -> Request:
    """What a prompt of one of the six tasks asks for.

    ValueError names the prompt and the words that GenEval's grammar does not know.
    """
    try:
        if not prompt.startswith(_OPENING):
            raise ValueError(f"it does not open with {_OPENING.strip()!r}")
        return _parse(prompt.removeprefix(_OPENING))
    except ValueError as error:
        raise ValueError(f"{prompt!r} is no GenEval prompt: {error}") from None


def prompts(
    task: Task,
    count: int,
    seed: int,
    classes: Sequence[str] = CLASSES,
    numbers: Sequence[int] = (2, 3, 4),
) -> list[str]:
    """`count` different prompts of a task, drawn evenly from all that it can ask; for the same
    arguments always the same.

    classes: the classes to draw from; some for training and the others to test unseen ones.
    numbers: how many objects `counting` asks for, each 2 to 15. GenEval's are 2 to 4.
    ValueError where the task cannot ask that many things, or cannot ask them.
    """
    for name in classes:
        known(name, CLASSES, "one of GenEval's 80 classes")
    if not set(numbers) <= set(NUMBERS):
        raise ValueError(f"numbers: {list(numbers)} are not all {min(NUMBERS)} to {max(NUMBERS)}")
    if task in ("colors", "color_attr"):
        classes = [name for name in classes if name != "person"]  # as in GenEval
    classes, numbers = list(dict.fromkeys(classes)), list(dict.fromkeys(numbers))
    possible = _possible(task, len(classes), len(numbers))
    if count > possible:
        raise ValueError(f"count: {task} can ask {possible} things of these classes, not {count}")
    drawn = random.Random(f"{task} {seed}").sample(range(possible), count)
    return [text(_request(task, index, classes, numbers)) for index in drawn]


def _possible(task: Task, n: int, numbers: int) -> int:
    """How many requests a task has, of n classes and so many numbers."""
    pairs = n * (n - 1)
    return {
        "single_object": n,
        "two_object": pairs,
        "counting": n * numbers,
        "colors": n * len(COLOURS),
        "position": pairs * len(RELATIONS),
        "color_attr": pairs * len(COLOURS) * (len(COLOURS) - 1),
    }[task]


def files(
    count: int,
    seed: int,
    held_out: int = 0,
    *,
    tasks: Sequence[str] = TASKS,
    numbers: Sequence[int] = (2, 3, 4),
) -> tuple[list[Any], list[Any]]:
    """(`count` objects of a .jsonl file, `held_out` others): {"prompt": ..., "tag": TASK} each.

    The tasks have equal shares; what one cannot ask any more, the others do. They stand in no
    order, so that the first few of a file are of all tasks. ValueError where all together cannot
    ask that many.
    """
    for name in tasks:
        known(name, TASKS, "a task of GenEval's")
    n, choices = len(CLASSES), len(set(numbers))
    room = {
        task: _possible(task, n - (task in ("colors", "color_attr")), choices)
        for task in TASKS
        if task in tasks
    }
    if count + held_out > sum(room.values()):
        raise ValueError(
            f"count: {', '.join(room)} can ask {sum(room.values())} things, not {count + held_out}"
        )
    shares: dict[Task, int] = {}
    left = count + held_out
    for at, task in enumerate(sorted(room, key=room.__getitem__)):  # the narrow ones first
        shares[task] = min(room[task], -(-left // (len(room) - at)))
        left -= shares[task]
    every = [
        {"prompt": prompt, "tag": task}
        for task in room
        for prompt in prompts(task, shares[task], seed, numbers=numbers)
    ]
    random.Random(f"held out {seed}").shuffle(every)
    return every[held_out:], every[:held_out]


def _request(task: Task, index: int, classes: Sequence[str], numbers: Sequence[int]) -> Request:
    """The `index`-th of all requests of a task."""

    def two(index: int, n: int) -> tuple[int, int]:
        """The `index`-th ordered pair of different numbers below n."""
        first, second = divmod(index, n - 1)
        return first, second + (second >= first)

    if task in ("single_object", "counting", "colors"):
        index, which = divmod(index, len(classes))
        name = classes[which]
        if task == "counting":
            return Request(task, (Asked(name, numbers[index]),))
        return Request(task, (Asked(name, colour=COLOURS[index] if task == "colors" else None),))
    index, which = divmod(index, len(classes) * (len(classes) - 1))
    first, second = (classes[at] for at in two(which, len(classes)))
    if task == "color_attr":
        one, other = (COLOURS[at] for at in two(index, len(COLOURS)))
        return Request(task, (Asked(first, colour=one), Asked(second, colour=other)))
    relation = RELATIONS[index] if task == "position" else None
    return Request(task, (Asked(first), Asked(second)), relation)
