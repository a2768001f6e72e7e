"""New prompts for the reward `ocr`: templates with a text to write in quotes.

    a shop window with a sign that says "Fresh Bread"

The texts are words, numbers and prices, mixed case and several words, each kind as often as the
others as long as it has texts left. No text comes twice, nor one that `plain` makes the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

TEMPLATES = (
    'a shop window with a sign that says "{text}"',
    'a poster on a brick wall that reads "{text}"',
    'a neon sign above a bar that says "{text}"',
    'a cardboard box with the label "{text}"',
    'a chalkboard in a cafe with the words "{text}" on it',
    'a road sign at a crossing that reads "{text}"',
    'a book on a wooden table with the title "{text}" on its cover',
    'a white t-shirt with "{text}" printed on the front',
    'a coffee mug with "{text}" written on it',
    'a birthday cake with "{text}" in icing',
    'a train station board that shows "{text}"',
    'a graffiti of the words "{text}" on a concrete wall',
    'a wooden door with a brass plate that says "{text}"',
    'a newspaper with the headline "{text}"',
    'a phone on a desk whose screen shows "{text}"',
    'a paper note on a fridge that says "{text}"',
)
_WORDS = """amber, anchor, apple, autumn, bakery, bamboo, beacon, bicycle, blossom, bottle, bread,
    bridge, bright, bronze, candle, canyon, castle, cedar, cherry, chess, circle, city, clear,
    closed, cloud, coast, coffee, copper, coral, corner, cotton, crystal, daily, dance, dawn, delta,
    diner, discount, dragon, dream, eagle, early, east, echo, electric, ember, empire, engine,
    entrance, evening, exit, falcon, farm, fast, ferry, festival, field, first, flower, forest,
    fresh, frozen, future, galaxy, gallery, garage, garden, gentle, giant, ginger, glass, golden,
    grand, granite, green, guitar, harbor, harvest, heart, hidden, honey, horizon, hotel, island,
    ivory, jazz, journey, jungle, kitchen, lantern, laser, lemon, library, light, little, lunar,
    magic, maple, marble, market, meadow, melody, midnight, mirror, modern, morning, mountain,
    museum, music, north, novel, ocean, office, olive, open, orange, orchid, organic, palace, paper,
    parking, pearl, pepper, piano, pine, planet, platform, pocket, polar, power, quartz, quick,
    quiet, radio, rainbow, river, robot, rocket, royal, sale, salon, school, secret, shadow, silent,
    silver, simple, sky, snow, solar, south, spark, spice, spring, station, stone, storm, studio,
    sugar, summer, sunset, sweet, tea, temple, theatre, ticket, tiger, today, tomorrow, tower,
    travel, tropical, tunnel, urban, valley, velvet, victory, village, vintage, violet, warm, water,
    welcome, west, whale, wild, window, winter, wonder, yellow, yoga, zebra, zenith"""
WORDS = tuple(word.strip() for word in _WORDS.split(","))
TRIES = 20  # of a kind of text, before it counts as used up
MOST = 1_000_000  # prompts


def plain(text: str) -> str:
    """Lower case, without spaces: how the reward compares texts."""
    return "".join(text.lower().split())


def _word(draw: random.Random) -> str:
    return draw.choice((str.upper, str.capitalize, str.lower))(draw.choice(WORDS))


def _number(draw: random.Random) -> str:
    return draw.choice((
        f"{draw.randint(10, 9999)}", f"${draw.randint(1, 199)}.{draw.randint(0, 99):02}",
        f"{draw.randint(5, 95)}%", f"{draw.randint(0, 23)}:{draw.randint(0, 59):02}",
    ))  # fmt: skip


def _mixed_case(draw: random.Random) -> str:
    """One word of two, as names of firms have it, or capitals here and there."""
    first, second = draw.sample(WORDS, 2)
    scattered = "".join(draw.choice((c.upper(), c)) for c in first)
    return draw.choice((first.capitalize() + second.capitalize(), first + second.upper(),
                        scattered))  # fmt: skip


def _word_and_number(draw: random.Random) -> str:
    return f"{draw.choice(WORDS).capitalize()} {draw.randint(1, 99)}"


def _two_words(draw: random.Random) -> str:
    text = " ".join(draw.sample(WORDS, 2))
    return draw.choice((str.title, str.upper, str.lower))(text)


def _several_words(draw: random.Random) -> str:
    text = " ".join(draw.sample(WORDS, draw.randint(3, 4)))
    return draw.choice((str.title, str.capitalize, str.upper))(text)


KINDS: tuple[Callable[[random.Random], str], ...] = (
    _word, _number, _mixed_case, _word_and_number, _two_words, _several_words
)  # fmt: skip


def texts(count: int, seed: int) -> list[str]:
    """`count` texts of which no two are `plain`ly the same; for the same seed always the same."""
    draw, seen, found = random.Random(f"ocr {seed}"), set[str](), list[str]()
    while len(found) < count:
        # the last kind has more texts than MOST
        for kind in (KINDS[len(found) % len(KINDS)], KINDS[-1]):
            tries = TRIES if kind is not KINDS[-1] else MOST
            text = next((t for t in (kind(draw) for _ in range(tries)) if plain(t) not in seen), "")
            if text:
                break
        seen.add(plain(text))
        found.append(text)
    return found


def prompts(count: int, seed: int, held_out: int = 0) -> tuple[list[Any], list[Any]]:
    """(`count` objects of a .jsonl file, `held_out` others): {"prompt": ..., "text": ...} each.

    No text is in both, whichever templates they stand in. ValueError for more than MOST in all.
    """
    if count + held_out > MOST:
        raise ValueError(f"count: {count + held_out} prompts; at most {MOST}")
    draw = random.Random(f"ocr templates {seed}")
    every = [
        {"prompt": draw.choice(TEMPLATES).format(text=text), "text": text}
        for text in texts(count + held_out, seed)
    ]
    kept = set(draw.sample(range(len(every)), held_out))
    return (
        [one for at, one in enumerate(every) if at not in kept],
        [one for at, one in enumerate(every) if at in kept],
    )
