"""What GenEval's own metadata asks for, beside prompts in any words."""

from __future__ import annotations

from typing import Any

import pytest

from gardo.rewards.geneval import Geneval
from gardo.rewards.geneval_metadata import request_of
from gardo.rewards.geneval_prompts import Asked, Request, parse
from gardo.rewards.geneval_rules import Found, judged, keep, verdicts
from gardo.types import Prompt


def saying(tag: str, *include: Any, exclude: Any = (), prompt: str = "anything") -> Prompt:
    """A line of evaluation_metadata.jsonl."""
    return Prompt(prompt, {"tag": tag, "include": list(include), "exclude": list(exclude)})


# As GenEval's generator writes them
LINES = [
    saying("single_object", {"class": "bench", "count": 1}, prompt="a photo of a bench"),
    saying(
        "two_object",
        {"class": "bowl", "count": 1},
        {"class": "apple", "count": 1},
        prompt="a photo of a bowl and an apple",
    ),
    saying(
        "counting",
        {"class": "bench", "count": 3},
        exclude=[{"class": "bench", "count": 4}],
        prompt="a photo of three benchs",
    ),
    saying(
        "colors",
        {"class": "cup", "count": 1, "color": "orange"},
        prompt="a photo of an orange cup",
    ),
    saying(
        "position",
        {"class": "laptop", "count": 1},
        {"class": "cow", "count": 1, "position": ["right of", 0]},
        prompt="a photo of a cow right of a laptop",
    ),
    saying(
        "color_attr",
        {"class": "handbag", "count": 1, "color": "pink"},
        {"class": "dog", "count": 1, "color": "black"},
        prompt="a photo of a pink handbag and a black dog",
    ),
]


@pytest.mark.parametrize("line", LINES, ids=[line.metadata["tag"] for line in LINES])
def test_the_metadata_asks_for_what_the_text_asks(line: Prompt) -> None:
    assert request_of(line) == parse(line)
    assert request_of(Prompt(line)) == parse(line)


def test_the_metadata_is_read_before_the_text() -> None:
    prompt = saying("single_object", {"class": "cat"}, prompt="a photo of a dog")
    assert request_of(prompt).objects == (Asked("cat"),)
    Geneval.check_prompt(saying("single_object", {"class": "cat"}, prompt="Mittens, asleep"))


def test_metadata_of_another_kind_leaves_the_text() -> None:
    assert request_of(Prompt("a photo of a dog", {"tag": 7})) == parse("a photo of a dog")
    assert request_of(Prompt("a photo of a dog", {"tag": 7})).absent == ()


def test_more_than_the_text_can_say() -> None:
    prompt = saying(
        "two_object",
        {"class": "dog", "count": 2, "color": "red"},
        {"class": "cat"},
        exclude=[{"class": "person"}, {"class": "cat", "count": 3}],
    )
    asked = (Asked("dog", 2, "red"), Asked("cat"))
    absent = (Asked("person"), Asked("cat", 3))
    assert request_of(prompt) == Request("two_object", asked, absent=absent)


def found(name: str, *colours: str | None, score: float = 0.95) -> list[Found]:
    return [Found(name, score, (0.0, 0.0, 10.0, 10.0), colour) for colour in colours]


def rules(prompt: Prompt, *things: Found) -> list[bool]:
    request = request_of(prompt)
    return verdicts(request, keep(things, request.task))


def test_as_many_as_asked_have_the_colour_and_few_enough_are_excluded() -> None:
    two_red_dogs = {"class": "dog", "count": 2, "color": "red"}
    prompt = saying("colors", two_red_dogs, exclude=[{"class": "cat", "count": 2}])
    assert rules(prompt) == [False, False, True]
    assert rules(prompt, *found("dog", "red")) == [False, False, True]
    assert rules(prompt, *found("dog", "red", "red")) == [True, True, True]
    assert rules(prompt, *found("dog", "red", "blue")) == [True, False, True]
    assert rules(prompt, *found("dog", "red", "red", "blue")) == [
        True,
        True,
        True,
    ]  # the surest two
    assert rules(prompt, *found("cat", None)) == [False, False, True]
    assert rules(prompt, *found("cat", None, None)) == [False, False, False]
    things = [*found("cat", None), *found("dog", "red", "red", "blue")]
    assert judged(request_of(prompt), things) == [1, 2]


def test_counting_several_classes_is_exact_in_each() -> None:
    prompt = saying("counting", {"class": "dog", "count": 2}, {"class": "cat", "count": 1})
    for dogs, cats in [(2, 1), (1, 1), (3, 1), (2, 2), (0, 0)]:
        things = [*found("dog", *[None] * dogs), *found("cat", *[None] * cats)]
        assert rules(prompt, *things) == [dogs == 2, cats == 1]


@pytest.mark.parametrize("count", [1, 2])
def test_all_that_are_asked_for_stand_in_the_place(count: int) -> None:
    prompt = saying(
        "position",
        {"class": "dog", "count": count, "position": ["left of", 1]},
        {"class": "cat", "count": 1},
    )
    cat, left, right = (
        Found(name, 0.9, (x, 0.0, x + 10, 10.0))
        for name, x in (("cat", 200.0), ("dog", 0.0), ("dog", 400.0))
    )
    assert rules(prompt, cat, left) == [count == 1, True, count == 1]
    assert rules(prompt, cat, left, right) == [True, True, count == 1]
    assert rules(prompt, cat, right, left) == [True, True, False]
    assert rules(prompt, left) == [count == 1, False, False]


DOG = {"class": "dog"}


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"include": [DOG]}, "tag: Field required"),
        ({"tag": "animals", "include": [DOG]}, "tag: 'animals': Input should be 'single_object'"),
        ({"tag": "colors", "include": 3}, "include: 3: Input should be a valid list"),
        ({"tag": "colors", "include": []}, "include: []: List should have at least 1 item"),
        ({"tag": "colors", "include": [{}]}, "include.0.class: Field required"),
        ({"tag": "colors", "include": [{"class": "dgo"}]}, "80 classes; did you mean 'dog'?"),
        ({"tag": "colors", "include": [DOG | {"colour": "red"}]}, "include.0.colour: 'red': Extra"),
        ({"tag": "colors", "include": [DOG | {"color": "mauve"}]}, "include.0.color: 'mauve'"),
        ({"tag": "counting", "include": [DOG | {"count": 16}]}, "include.0.count: 16"),
        ({"tag": "counting", "include": [DOG | {"count": "2"}]}, "include.0.count: '2'"),
        ({"tag": "counting", "include": [DOG], "exclude": [DOG | {"count": 0}]}, "exclude.0.count"),
        ({"tag": "position", "include": [DOG, DOG | {"position": ["over", 0]}]}, "1.position.0"),
        ({"tag": "position", "include": [DOG | {"position": ["above", 0]}]}, "one of two objects"),
        ({"tag": "position", "include": [DOG, DOG | {"position": ["above", 1]}]}, "from the other"),
    ],
)
def test_what_no_rule_can_judge_is_refused_at_load(metadata: Any, problem: str) -> None:
    with pytest.raises(ValueError, match="'a dog': the metadata asks for no GenEval pic") as error:
        Geneval.check_prompt(Prompt("a dog", metadata))
    assert problem in str(error.value) and "\n" not in str(error.value)
