"""Images without a value: masked while they are few, the end of the run where they are many.

A reward that is down answers nothing; what is trained then is not what the recipe asks for.
"""

from __future__ import annotations

from gardo.bad_updates import RunStopped
from gardo.distributed.base import gather_text
from gardo.session import Session
from gardo.types import Scores


def stop_where_unscored(s: Session, step: int, scores: Scores) -> None:
    """RunStopped, by all ranks alike, where too many images of the iteration lack a value.

    Of a reward that trains, over all ranks. The iterations before are saved first.
    """
    failed = shares(s, scores)
    name = max(failed, key=lambda each: failed[each], default="")
    if not name or failed[name] <= s.recipe.scoring.max_failed:
        return
    said = gather_text(s.engine, s.panel.rewards[name].trouble)
    why = next((f"; rank {rank}: {text}" for rank, text in enumerate(said) if text), "")
    problem = None
    if step and step != s.checkpoints.last_step:
        with s.progress.phase("checkpoint"):
            problem = s.checkpoints.save(step, s.state())
    saved = s.checkpoints.last_step
    after = f"--resume goes on after step {saved}" if saved else "nothing is saved yet"
    not_saved = f" (not saved: {problem})" if problem else ""
    images = len(scores.valid_B)
    raise RunStopped(
        f"rewards.{name}: {round(failed[name] * images)} of {images} images of iteration "
        f"{step + 1} have no value, more than scoring.max_failed: "
        f"{s.recipe.scoring.max_failed:g}{why}. {after}{not_saved}"
    )


def shares(s: Session, scores: Scores) -> dict[str, float]:
    """The share of all ranks' images without a value, by reward that trains."""
    needed = (*s.panel.names("proxy"), *s.panel.names("auxiliary"))
    found = {name: 1 - float(scores.masks[name].double().mean()) for name in needed}
    rest_B = ~scores.valid_B
    for name in needed:
        rest_B = rest_B & scores.masks[name]
    return found | {name: float(rest_B.double().mean()) for name in s.panel.names("features")}
