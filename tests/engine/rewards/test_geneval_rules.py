"""GenEval's grammar and rules: no model, no picture."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gardo.rewards import geneval_prompts
from gardo.rewards.geneval_prompts import (
    CLASSES,
    COLOURS,
    NUMBERS,
    RELATIONS,
    TASKS,
    Asked,
    Request,
    parse,
    prompts,
    text,
)
from gardo.rewards.geneval_rules import (
    COUNTING_THRESHOLD,
    MOST,
    THRESHOLD,
    Found,
    fraction,
    judged,
    keep,
    relations,
    strict,
    verdicts,
)

HERE = (0.0, 0.0, 10.0, 10.0)
FAR_RIGHT = (100.0, 0.0, 110.0, 10.0)


def found(name: str, score: float = 0.95, box: Any = HERE, colour: str | None = None) -> Found:
    return Found(name, score, box, colour)


# ---- the grammar ---------------------------------------------------------------------------------

EXAMPLES = {
    "a photo of a bench": Request("single_object", (Asked("bench"),)),
    "a photo of an orange": Request("single_object", (Asked("orange"),)),
    "a photo of a bowl and an apple": Request("two_object", (Asked("bowl"), Asked("apple"))),
    "a photo of three benchs": Request("counting", (Asked("bench", 3),)),
    "a photo of two wine glasses": Request("counting", (Asked("wine glass", 2),)),
    "a photo of eleven tv remotes": Request("counting", (Asked("tv remote", 11),)),
    "a photo of an orange cup": Request("colors", (Asked("cup", colour="orange"),)),
    "a photo of an orange orange": Request("colors", (Asked("orange", colour="orange"),)),
    "a photo of a black tv remote": Request("colors", (Asked("tv remote", colour="black"),)),
    "a photo of a dog right of a teddy bear": Request(
        "position", (Asked("dog"), Asked("teddy bear")), "right of"
    ),
    "a photo of an orange below an apple": Request(
        "position", (Asked("orange"), Asked("apple")), "below"
    ),
    "a photo of a purple wine glass and a black apple": Request(
        "color_attr", (Asked("wine glass", colour="purple"), Asked("apple", colour="black"))
    ),
}


@pytest.mark.parametrize("prompt", EXAMPLES)
def test_a_prompt_says_what_it_asks(prompt: str) -> None:
    assert parse(prompt) == EXAMPLES[prompt]
    assert text(EXAMPLES[prompt]) == prompt


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a dog", "does not open with 'a photo of'"),
        ("A photo of a dog", "does not open"),
        ("a photo of ", "opens with neither 'a', 'an' nor a number"),
        ("a photo of sixteen dogs", "'sixteen dogs' opens with neither"),
        ("a photo of one dog", "'one dog' opens with neither"),
        ("a photo of a dgo", "'dgo'.*did you mean 'dog'"),
        ("a photo of a turquoise dog", "'turquoise dog' is not one of GenEval's 80 classes"),
        ("a photo of a dog.", "'dog.'"),
        ("a photo of a red ", "''"),
        ("a photo of a red unicorn", "'unicorn'"),
        ("a photo of a orange", "GenEval writes 'an orange'"),
        ("a photo of an dog", "GenEval writes 'a dog'"),
        ("a photo of two benches", "'benches'.*did you mean 'benchs'"),
        ("a photo of two dog", "'dog'.*did you mean 'dogs'"),
        ("a photo of two red dogs", "'red dogs'"),
        ("a photo of a red dog and a cat", "one object has a colour and the other none"),
        ("a photo of a dog and a red cat", "one object has a colour and the other none"),
        ("a photo of a red dog above a cat", "a colour beside 'above'"),
        ("a photo of a dog and a dog", "'dog' is asked for twice"),
        ("a photo of a red dog and a black dog", "'dog' is asked for twice"),
        ("a photo of a dog above a dog", "'dog' is asked for twice"),
        ("a photo of a dog and a cat and a cow", "'cat and a cow'"),
        ("a photo of a dog left of a cat and a cow", "'cat and a cow'"),
        ("a photo of a dog  above a cat", "'dog '"),
    ],
)
def test_other_prompts_are_refused_by_name(prompt: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        parse(prompt)
    assert repr(prompt) in str(error.value)


def test_the_classes_are_cocos() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert [CLASSES.index(name) for name in ("person", "traffic light", "dog")] == [0, 9, 16]
    assert [CLASSES.index(name) for name in ("computer mouse", "toothbrush")] == [64, 79]
    plurals = {geneval_prompts.plural(name) for name in CLASSES}
    assert len(plurals) == 80 and not plurals & set(CLASSES)
    assert {"buses", "benchs", "skises", "knifes", "sheeps"} <= plurals


@given(
    st.sampled_from(TASKS),
    st.integers(0, 2**40),
    st.lists(st.sampled_from(CLASSES), min_size=3, unique=True),
    st.lists(st.sampled_from(sorted(NUMBERS)), min_size=1, unique=True),
)
def test_new_prompts_are_read_back(
    task: Any, seed: int, classes: list[str], numbers: list[int]
) -> None:
    made = prompts(task, 2, seed, classes, numbers)
    assert len(set(made)) == 2 and made == prompts(task, 2, seed, classes, numbers)
    for prompt in made:
        request = parse(prompt)
        assert request.task == task and text(request) == prompt
        assert {asked.name for asked in request.objects} <= set(classes)
        if task == "counting":
            assert request.objects[0].count in numbers


def everything(task: str, names: list[str], numbers: list[int]) -> set[Request]:
    """All that a task can ask, written out."""
    bare = [Asked(name) for name in names]
    hues = [Asked(name, colour=c) for name in names if name != "person" for c in COLOURS]
    return {
        "single_object": {Request("single_object", (a,)) for a in bare},
        "two_object": {Request("two_object", p) for p in itertools.permutations(bare, 2)},
        "counting": {Request("counting", (Asked(n, k),)) for n in names for k in numbers},
        "colors": {Request("colors", (a,)) for a in hues},
        "position": {
            Request("position", pair, relation)
            for pair in itertools.permutations(bare, 2)
            for relation in RELATIONS
        },
        "color_attr": {
            Request("color_attr", (a, b))
            for a, b in itertools.permutations(hues, 2)
            if a.name != b.name and a.colour != b.colour
        },
    }[task]


@pytest.mark.parametrize("task", TASKS)
def test_the_draw_reaches_all_that_a_task_can_ask(task: Any) -> None:
    names, numbers = ["person", "orange", "skis", "dog"], [2, 11, 15]
    everyone = everything(task, names, numbers)
    made = prompts(task, len(everyone), 3, names, numbers)
    assert {parse(prompt) for prompt in made} == everyone
    assert made != prompts(task, len(everyone), 4, names, numbers)
    with pytest.raises(ValueError, match=f"count: {task} can ask {len(everyone)} things"):
        prompts(task, len(everyone) + 1, 3, names, numbers)


def test_repeated_classes_and_numbers_ask_nothing_new() -> None:
    assert prompts("counting", 4, 0, ["dog", "dog", "cat"], [2, 3, 3]) == prompts(
        "counting", 4, 0, ["dog", "cat"], [2, 3]
    )


def test_prompts_that_no_rule_could_judge_are_not_made() -> None:
    with pytest.raises(ValueError, match="unicorn"):
        prompts("single_object", 1, 0, ["unicorn"])
    for number in (1, MOST):  # 16 objects look like 17: no more are looked at
        with pytest.raises(ValueError, match="not all 2 to 15"):
            prompts("counting", 1, 0, numbers=[2, number])
    assert max(NUMBERS) == MOST - 1


# ---- which objects count -------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_the_threshold_itself_is_not_above_it(task: Any) -> None:
    least = COUNTING_THRESHOLD if task == "counting" else THRESHOLD
    assert least == (0.9 if task == "counting" else 0.3)
    above = found("dog", math.nextafter(least, 1))
    assert keep([found("dog", least), above, found("dog", 0.0)], task) == [above]
    assert keep([], task) == []


def test_sixteen_of_each_class_are_kept_the_surest_first() -> None:
    dogs = [found("dog", 0.4 + 0.02 * i) for i in range(MOST + 3)]
    cats = [found("cat", 0.5) for _ in range(2)]
    kept = keep([*dogs, *cats], "two_object")
    assert [t for t in kept if t.name == "dog"] == dogs[:2:-1]
    assert [t for t in kept if t.name == "cat"] == cats
    assert [t.score for t in kept] == sorted((t.score for t in kept), reverse=True)


def test_of_equally_sure_objects_the_earlier_comes_first() -> None:
    pair = [found("dog", 0.5, HERE), found("dog", 0.5, FAR_RIGHT)]
    assert keep(pair, "colors") == pair
    assert keep(pair[::-1], "colors") == pair[::-1]


# ---- where a box lies ----------------------------------------------------------------------------


def by_angle(a: Any, b: Any) -> set[str]:
    """The rule without the margin, for small boxes: within 60 degrees of a direction."""
    angle = math.degrees(math.atan2(a[1] - b[1], a[0] - b[0]))
    at = {"right of": 0, "below": 90, "left of": 180, "above": -90}
    return {r for r, degrees in at.items() if abs((angle - degrees + 180) % 360 - 180) < 60}


def test_points_lie_where_their_angle_says() -> None:
    for x, y in itertools.product(range(-7, 8), repeat=2):
        a, b = (x, y, x, y), (0, 0, 0, 0)
        assert relations(a, b) == (by_angle(a, b) if (x, y) != (0, 0) else set())


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 10, 10), set()),  # the same place
        ((2, 0, 12, 10), set()),  # 2 apart = 0.1 (10 + 10): a tie within the margin
        ((2.0009, 0, 12.0009, 10), set()),  # less than a thousandth of a pixel beyond it
        ((2.5, 0, 12.5, 10), set()),  # 0.5 beyond, 0.5 / 2.5 of the distance
        ((4, 0, 14, 10), set()),  # 2 beyond: just half the distance
        ((4.1, 0, 14.1, 10), {"right of"}),
        ((-4, 0, 6, 10), set()),
        ((-4.1, 0, 5.9, 10), {"left of"}),
        ((0, 4.1, 10, 14.1), {"below"}),
        ((0, -4.1, 10, 5.9), {"above"}),
        ((5, 5, 15, 15), set()),  # 3 / 7.07 on both axes
        ((10, 10, 20, 20), {"right of", "below"}),  # 8 / 14.1
        ((-10, 10, 0, 20), {"left of", "below"}),
        ((10, -10, 20, 0), {"right of", "above"}),
        ((-10, -10, 0, 0), {"left of", "above"}),
        ((100, 58, 110, 68), {"right of"}),  # below by 56 / 115.6 only
        ((-90, 0, 110, 10), set()),  # 5 apart, but 210 pixels of width: margin 21
        ((20, -500, 30, 510), {"right of"}),  # 18 / 20.6; the tall box's 5 lie within its margin
    ],
)
def test_where_a_box_lies_by_hand(box: Any, expected: set[str]) -> None:
    assert relations(box, HERE) == expected


def by_arrays(a: Any, b: Any, margin: float = 0.1) -> set[str]:
    """The paper's rule with arrays: corners [box, corner, axis]."""
    corners = np.array([a, b], dtype=np.float64).reshape(2, 2, 2)
    offset = np.subtract(*corners.mean(axis=1))
    size = (corners[:, 1] - corners[:, 0]).sum(axis=0)
    beyond = np.sign(offset) * np.clip(np.abs(offset) - margin * size, 0, None)
    if np.abs(beyond).max() < 1e-3:
        return set()
    x, y = beyond / np.sqrt((offset**2).sum())
    rules = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in rules.items() if holds}


def test_where_boxes_lie_over_a_grid() -> None:
    spans = [(low, low + size) for low in range(-9, 10, 3) for size in (1, 7, 20)]
    seen: set[frozenset[str]] = set()
    for (left, right), (top, bottom) in itertools.product(spans, repeat=2):
        box, other = (left, top, right, bottom), (-2.0, -1.0, 3.0, 6.0)
        assert relations(box, other) == by_arrays(box, other)
        assert relations(other, box) == by_arrays(other, box)
        seen.add(frozenset(relations(box, other)))
    assert len(seen) == 9  # none, the four, and the four corners


SIDES = st.integers(-400, 400)
BOXES = st.tuples(SIDES, SIDES, st.integers(1, 300), st.integers(1, 300)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@given(BOXES, BOXES)
def test_each_box_sees_the_other_on_the_opposite_side(a: Any, b: Any) -> None:
    seen = relations(a, b)
    assert {OPPOSITE[r] for r in seen} == relations(b, a)
    assert not any(OPPOSITE[r] in seen for r in seen)


# ---- the rules of each task ----------------------------------------------------------------------


def rules(prompt: str, *things: Found) -> list[bool]:
    request = parse(prompt)
    return verdicts(request, keep(things, request.task))


def test_single_object() -> None:
    assert rules("a photo of a dog") == [False]
    assert rules("a photo of a dog", found("cat")) == [False]
    assert rules("a photo of a dog", found("dog", 0.3)) == [False]
    assert rules("a photo of a dog", found("dog", 0.31)) == [True]
    assert rules("a photo of a dog", *[found("dog")] * 5, found("cat")) == [True]  # more is fine


def test_two_objects() -> None:
    prompt = "a photo of a dog and a cat"
    for dogs, cats in itertools.product(range(3), repeat=2):
        things = [found("dog")] * dogs + [found("cat")] * cats
        assert rules(prompt, *things) == [dogs > 0, cats > 0]


@pytest.mark.parametrize("asked", sorted(NUMBERS))
def test_counting_wants_the_exact_number(asked: int) -> None:
    prompt = f"a photo of {NUMBERS[asked]} dogs"
    for number in range(MOST + 4):
        things = [found("dog", 0.95)] * number + [found("dog", 0.9)] * 2 + [found("cat")] * 3
        assert rules(prompt, *things) == [number == asked]


def test_colours() -> None:
    prompt = "a photo of a red dog"
    red, blue = found("dog", 0.6, colour="red"), found("dog", 0.6, colour="blue")
    assert rules(prompt) == [False, False]
    assert rules(prompt, found("cat", colour="red")) == [False, False]
    assert rules(prompt, red) == [True, True]
    assert rules(prompt, blue) == [True, False]
    assert rules(prompt, found("dog")) == [True, False]
    # the surest dog counts, and no other
    assert rules(prompt, red, found("dog", 0.7, colour="blue")) == [True, False]
    assert rules(prompt, blue, found("dog", 0.7, colour="red")) == [True, True]


def test_two_colours() -> None:
    prompt = "a photo of a red dog and a black cat"
    for dog, cat in itertools.product([None, "red", "black"], repeat=2):
        things = [found(n, colour=c) for n, c in (("dog", dog), ("cat", cat)) if c]
        expected = [dog is not None, dog == "red", cat is not None, cat == "black"]
        assert rules(prompt, *things) == expected


@pytest.mark.parametrize("relation", RELATIONS)
def test_position(relation: Any) -> None:
    prompt = f"a photo of a dog {relation} a cat"
    at = {
        "left of": (-100.0, 0.0, -90.0, 10.0),
        "right of": FAR_RIGHT,
        "above": (0.0, -100.0, 10.0, -90.0),
        "below": (0.0, 100.0, 10.0, 110.0),
    }
    cat = found("cat")
    assert rules(prompt) == [False, False, False]
    assert rules(prompt, cat) == [False, True, False]
    for place, box in at.items():
        dog = found("dog", 0.6, box)
        assert rules(prompt, dog) == [True, False, False]
        assert rules(prompt, dog, cat) == [True, True, place == relation]
        # the surest of each class counts
        assert rules(prompt, dog, found("dog", 0.5, at[relation]), cat) == rules(prompt, dog, cat)
    assert rules(prompt, found("dog"), cat) == [True, True, False]  # the same place


def test_the_objects_whose_colour_is_looked_at() -> None:
    request = parse("a photo of a red dog and a black cat")
    things = [found("cow"), found("dog"), found("dog"), found("cat"), found("cat")]
    assert judged(request, things) == [1, 3]
    assert judged(request, things[3:]) == [0]
    assert judged(request, []) == []
    for prompt in ("a photo of a dog", "a photo of two dogs", "a photo of a dog above a cat"):
        assert judged(parse(prompt), things) == []


@given(st.lists(st.booleans(), min_size=1, max_size=4))
def test_scores_of_rules(holds: list[bool]) -> None:
    assert fraction(holds) == pytest.approx(np.mean(holds), abs=0)
    assert strict(holds) == (1.0 if False not in holds else 0.0)
    assert 0 <= strict(holds) <= fraction(holds) <= 1


@given(
    st.sampled_from(sorted(EXAMPLES)),
    st.lists(
        st.builds(
            Found,
            st.sampled_from(CLASSES[:4] + ("dog", "apple", "orange", "cup", "wine glass")),
            st.floats(0, 1),
            BOXES,
            st.sampled_from(COLOURS),
        ),
        max_size=40,
    ),
)
def test_a_score_lies_between_nothing_and_all(prompt: str, things: list[Found]) -> None:
    """However many objects are found, and wherever: never below 0, never above 1."""
    request = parse(prompt)
    holds = verdicts(request, keep(things, request.task))
    sizes = {"single_object": 1, "two_object": 2, "counting": 1, "colors": 2, "position": 3}
    assert len(holds) == sizes.get(request.task, 4)
    assert 0 <= fraction(holds) <= 1
    assert holds == verdicts(request, keep(things + [found("bird", 1.0)], request.task))
