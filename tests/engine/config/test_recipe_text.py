"""The text of a recipe: what is a value of which type, and what is refused, in how much time."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest

from gardo.recipe_errors import RecipeError
from gardo.recipe_text import MAX_BYTES, read_yaml, write_yaml

LETTERS = "abcdefghi"
TIMES_NINE = [  # each is nine times the one before
    f"{this}: &{this} [{', '.join([f'*{before}'] * 9)}]"
    for before, this in itertools.pairwise(LETTERS)
]
MERGED = [
    f"{this}: &{this} {{<<: [{', '.join([f'*{before}'] * 9)}]}}"
    for before, this in itertools.pairwise(LETTERS)
]
VALUES: dict[str, Any] = {  # as YAML 1.2 reads it; 1.1 took many of these for numbers, or dates
    "10": 10,
    "010": 10,
    "0o17": 15,
    "0x1F": 31,
    "-3": -3,
    "1_000": "1_000",
    "1:30": "1:30",
    "2020-01-01": "2020-01-01",
    "1e-4": 1e-4,
    "1.": 1.0,
    ".5": 0.5,
    "-.inf": float("-inf"),
    "yes": "yes",
    "off": "off",
    "True": True,
    "~": None,
    "''": "",
    "!!str 5": "5",
    "!!float 5": 5.0,
}
REFUSED = {
    "no number": ("a: !!int abc", "'abc' is no int"),
    "no truth value": ("a: !!bool maybe", "'maybe' is no bool"),
    "a date": ("a: !!timestamp 2020-99-99", "the tag 'tag:yaml.org,2002:timestamp'"),
    "bytes": ("a: !!binary abc=", "the tag 'tag:yaml.org,2002:binary'"),
    "a set": ("a: !!set {b, c}", "the tag 'tag:yaml.org,2002:set'"),
    "code": ("a: !!python/name:os.system", "python/name:os.system"),
    "a tag of its own": ("a: !mine 5", "the tag '!mine'"),
    "a number too large": ("a: 9223372036854775808", "whole numbers end at 9223372036854775807"),
    "a number of many digits": (f"a: {'1' * 5000}", "whole numbers end at"),
    "a NUL": ("a: \0", "special characters are not allowed"),
    "an escaped NUL": ('a: "\\0"', "the character '\\x00', which does not print"),
    "half a character": ('a: "\\ud800"', "the character '\\ud800', which does not print"),
    "a tab": ("a:\n\t- b", "that cannot start any token"),
    "a key that is a number": ("1: 2", "the key 1 is no name"),
    "a key that is a list": ("? [a]\n: 1", "the key ['a'] is no name"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
    "an alias of nothing": ("a: *b", "found undefined alias"),
    "a merge of a number": ("a: {<<: 3}", "<< takes a mapping"),
    "a billion laughs": ("\n".join(["a: &a [1, 2]", *TIMES_NINE]), "more than 10000 values"),
    "merged laughs": ("\n".join(["a: &a {x: 1}", *MERGED]), "more than 10000 values"),
    "in itself": ("a: &a [*a]", "nested more than 32 deep, or in itself"),
    "lists in lists": ("[" * 100_000, "nested more than 32 deep"),
    "mappings in mappings": ("{a: " * 100_000, "nested more than 32 deep"),
    "a long list": (f"a: [{'1,' * 400_000}]", "more than 10000 values"),
    "too much": ("#" * (MAX_BYTES + 1), "longer than 1 MiB"),
}


@pytest.mark.parametrize("text", VALUES)
def test_values(text: str) -> None:
    value = read_yaml(f"a: {text}", "recipe")["a"]
    assert value == VALUES[text] and type(value) is type(VALUES[text])


@pytest.mark.parametrize("case", REFUSED)
def test_refused_soon_and_in_one_line(case: str) -> None:
    text, said = REFUSED[case]
    started = time.process_time()
    with pytest.raises(RecipeError) as raised:
        read_yaml(text, "recipe")
    assert time.process_time() - started < 3
    message = str(raised.value)
    assert message.startswith("recipe: ") and said in message
    assert len(message) < 500 and message.isprintable()


@pytest.mark.parametrize(
    "text",
    ["a: " + "x" * 10**6, 'a: "' + "x y" * 300_000 + '"', "#" * 10**6, "\n" * 10**6, " " * 10**6,
     "a: |\n" + " x\n" * 300_000, "a: b\n" + "  c\n" * 200_000],
    ids=["a word", "words", "a comment", "lines", "spaces", "a block", "a scalar of many lines"],
)  # fmt: skip
def test_a_text_within_the_limit_is_read_soon(text: str) -> None:
    started = time.process_time()
    read_yaml(text, "recipe")
    assert time.process_time() - started < 5


def test_a_byte_order_mark_is_no_part_of_it() -> None:
    assert read_yaml("\ufeffa: 1", "recipe") == {"a": 1}


def test_what_an_alias_stands_for_is_a_copy() -> None:
    read = read_yaml("a: &a {b: [1]}\nc: *a\nd: {<<: *a, e: 2}", "recipe")
    assert read == {"a": {"b": [1]}, "c": {"b": [1]}, "d": {"b": [1], "e": 2}}
    lists = [section["b"] for section in read.values()]
    assert len({id(one) for one in [*read.values(), *lists]}) == 6


def test_own_keys_win_over_merged_ones_and_the_first_merged_over_the_others() -> None:
    text = "{a: &a {x: 1, y: 1}, b: &b {y: 2, z: 2}, c: {z: 3, <<: [*a, *b]}}"
    assert read_yaml(text, "recipe")["c"] == {"x": 1, "y": 1, "z": 3}


def test_what_is_written_reads_as_it_was() -> None:
    """Also a text that only one version of YAML takes for a number."""
    texts = [text for text in VALUES if text.isprintable()] + ["1e5", "<<", "=", "a: b", "é", "[1"]
    values = {"texts": texts, "numbers": [1, -0.5, 1e-8, 1e300, True, None], "empty": [{}, [], ""]}
    assert read_yaml(write_yaml(values), "written") == values
