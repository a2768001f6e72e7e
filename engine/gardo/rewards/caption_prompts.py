"""New captions for the rewards that judge any picture: what people like, what fits its prompt.

    still life   a copper teapot and a paper crane on a stone windowsill, soft morning light
    position     a watercolour of a tabby cat under a mint-green armchair
    landscape    a misty fjord with a red tent and an old windmill, storm clouds in the distance

A picture is one of KINDS, each as often as the others, shown plainly, in some light, by a camera or
in a medium. The words and how they join are ours: caption_grammar.txt. No two captions show the
same thing, in whatever medium or light, so what is held out is not in training under another one.
"""

from __future__ import annotations

import random
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

SHOWN = {  # each kind of picture, and the rule of how it may be made
    "still life": "indoors",
    "animal": "outdoors",
    "counting": "indoors",
    "person": "outdoors",
    "position": "indoors",
    "landscape": "outdoors",
    "food": "indoors",
    "building": "outdoors",
    "interior": "indoors",
    "vehicle": "outdoors",
    "fantasy": "outdoors",
}
KINDS = tuple(SHOWN)
MOST = 20_000  # captions; every kind can show more than ten times its share of them
RULE = re.compile(r"\{([^}]+)\}")
ARTICLE = re.compile(r"\ba (?=[aeiou])")


@lru_cache(maxsize=1)
def grammar() -> dict[str, tuple[str, ...]]:
    """Each rule's alternatives, in the file's order."""
    text = Path(__file__).with_name("caption_grammar.txt").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    rules = re.findall(r"^(\S.*?) = (.*(?:\n[ ].*)*)", lines, re.MULTILINE)
    return {name: tuple(" ".join(one.split()) for one in said.split("|")) for name, said in rules}


def _drawn(rule: str, draw: random.Random, used: set[str], it: str = "") -> str:
    """One expansion of a rule; a word that is `used` does not come again."""
    if rule == "it":
        return it
    chosen = draw.choice(grammar()[rule])
    while chosen in used:
        chosen = draw.choice(grammar()[rule])
    if "{" not in chosen:
        used.add(chosen)
    return RULE.sub(lambda found: _drawn(found[1], draw, used, it), chosen)


def captions(count: int, seed: int) -> list[tuple[str, str]]:
    """`count` pairs (kind, caption) that show different things; the same for the same seed."""
    draw, seen, found = random.Random(f"captions {seed}"), set[str](), list[tuple[str, str]]()
    while len(found) < count:
        kind = KINDS[len(found) % len(KINDS)]
        shown = _drawn(kind, draw, set())
        if shown not in seen:
            seen.add(shown)
            caption = _drawn(SHOWN[kind], draw, set(), shown)
            found.append((kind, ARTICLE.sub("an ", caption)))
    return found


def prompts(count: int, seed: int, held_out: int = 0) -> tuple[list[Any], list[Any]]:
    """(`count` objects of a .jsonl file, `held_out` others): {"prompt": ..., "tag": KIND} each.

    What one of the two shows the other does not. ValueError for more than MOST in all.
    """
    if count + held_out > MOST:
        raise ValueError(f"count: {count + held_out} prompts; at most {MOST}")
    every = [{"prompt": text, "tag": kind} for kind, text in captions(count + held_out, seed)]
    return every[held_out:], every[:held_out]
