"""Images without a value: masked while they are few; where they are many, no update is made.

A reward that is down answers nothing; what is trained then is not what the recipe asks for. It may
come back: `train.bad_updates` says when the run ends.
"""

from __future__ import annotations

from gardo.distributed.base import gather_text
from gardo.session import Session
from gardo.types import Scores


def too_many_unscored(s: Session, scores: Scores) -> str:
    """The reward that trains and lacks too many values, over all ranks; "" where none does."""
    failed = shares(s, scores)
    worst = max(failed, key=lambda name: failed[name])
    usable = bool(scores.valid_B.any()) and failed[worst] <= s.recipe.scoring.max_failed
    return "" if usable else worst


def why_unscored(s: Session, scores: Scores, name: str) -> str:
    """What to tell of it. A collective."""
    said = gather_text(s.engine, s.panel.rewards[name].trouble)
    why = next((f"; rank {rank}: {text}" for rank, text in enumerate(said) if text), "")
    images = len(scores.valid_B)
    return (
        f"rewards.{name}: {round(shares(s, scores)[name] * images)} of {images} images have no "
        f"value (scoring.max_failed: {s.recipe.scoring.max_failed:g}){why}"
    )


def shares(s: Session, scores: Scores) -> dict[str, float]:
    """The share of all ranks' images without a value, by reward that trains."""
    needed = (*s.panel.names("proxy"), *s.panel.names("auxiliary"))
    found = {name: 1 - float(scores.masks[name].double().mean()) for name in needed}
    rest_B = ~scores.valid_B
    for name in needed:
        rest_B = rest_B & scores.masks[name]
    return found | {name: float(rest_B.double().mean()) for name in s.panel.names("features")}
