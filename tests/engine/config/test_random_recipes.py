"""Whatever a recipe is: it loads, or RecipeError says in a few lines what is wrong, and soon."""

from __future__ import annotations

import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gardo.config import load, read_yaml
from gardo.planner import geometry
from gardo.recipe_errors import LINE, LINES, RecipeError
from gardo.recipe_text import write_yaml
from tests.engine.config.recipe import GOOD, written

LIMIT = 3.0  # seconds of this process
NAMES = st.sampled_from(["kind", "name", "path", "size", "steps", "lora", "json", "<<", "~", ""])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    NAMES,
    st.sampled_from(
        ["builtin:flux", "os:path", "tiny_count", "gardo", "a/b", "~", "\0", "x" * 500]
    ),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(), inner),
    max_leaves=8,
)
# characters that mean something to YAML, and fragments of recipes
TEXTS = st.lists(
    st.sampled_from([*"&*!|>'\"%@`{}[],:#?-<~\n \t", "\n  ", "&a ", "*a", "<<: ", "!!int ", "run:",
                     "model: {", "rewards:", "1e400", "\ufeff", "\x85", "0x", "kind: "])
    | st.text(),
    max_size=60,
).map("".join)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    here = tmp_path_factory.mktemp("random")
    written(here)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(here)
        yield here


def loads_or_says_why(text: str, overrides: list[str] | None = None) -> bool:
    """Whether it loads, and splits over ranks."""
    Path("recipe.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    started = time.process_time()
    try:
        geometry(load("recipe.yaml", overrides or []), rank=0, world=2)
        return True
    except RecipeError as error:
        lines = str(error).split("\n")
        assert len(lines) <= LINES + 1 and all(line.isprintable() for line in lines)
        assert all(len(line) < LINE + 10 for line in lines)
        return False
    finally:
        assert time.process_time() - started < LIMIT


def places(section: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value stands in a recipe: keys and indices from the top."""
    inside = section.items() if isinstance(section, dict) else enumerate(section)
    found = []
    for key, value in inside:
        found.append((*at, key))
        if isinstance(value, (dict, list)):
            found += places(value, (*at, key))
    return found


RECIPE = read_yaml(GOOD, "good")
PLACES = places(RECIPE)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """The good recipe with up to three values replaced, taken out, or put beside others."""
    recipe = deepcopy(RECIPE)
    for _ in range(draw(st.integers(1, 3))):
        *sections, key = draw(st.sampled_from(PLACES))
        inside: Any = recipe
        try:
            for section in sections:
                inside = inside[section]
            if draw(st.booleans()):
                inside[key] = draw(ANYTHING)
            elif draw(st.booleans()) and isinstance(inside, dict):
                inside[draw(st.text(max_size=10) | NAMES)] = draw(ANYTHING)
            else:
                del inside[key]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took this place away
    return write_yaml(recipe)


@settings(max_examples=150, deadline=None)
@given(mutated())
def test_a_good_recipe_that_is_changed(text: str) -> None:
    loads_or_says_why(text)


@settings(max_examples=150, deadline=None)
@given(TEXTS)
@example("\ud800")
@example("a: &a [*a, *a]")
def test_any_text(text: str) -> None:
    assert not loads_or_says_why(text)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(PLACES), st.text(max_size=10), TEXTS)
def test_any_override(place: tuple[Any, ...], more: str, value: str) -> None:
    name = ".".join(map(str, place)) + more
    loads_or_says_why(GOOD, [f"{name}={value}"])


def test_what_is_not_changed_loads() -> None:
    assert loads_or_says_why(GOOD) and loads_or_says_why(write_yaml(RECIPE))
