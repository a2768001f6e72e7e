"""What a judge is asked and what it answers, wherever its model runs.

A prompt is shown as data: between two lines that no prompt can hold, and with nothing in it that a
chat template would take for its own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, Union

if TYPE_CHECKING:
    from torch import Tensor

Parts = tuple[
    Union[str, "Tensor"], ...
]  # texts and pictures, uint8 [3, H, W] on the host, as shown


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of a model, in one turn at temperature 0.

    With `choices` the probabilities of these words as the first of the answer are wanted, and no
    more of the answer than that; without, its text, of at most `max_tokens`.
    """

    system: str
    parts: Parts
    choices: tuple[str, ...] = ()
    max_tokens: int = 256


@dataclass(frozen=True)
class Answer:
    """What a model said.

    `chances` are the probabilities of the question's choices, by choice: each the sum over the
    tokens that begin it and no other (`choice_of`). What they lack to 1 went to other tokens.
    """

    text: str
    chances: Mapping[str, float] | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cut: bool = False  # at `max_tokens`, before the model had ended
    seconds: float = field(default=0.0, compare=False)  # from asking to it, all tries together
    known: bool = False  # the same question had been asked before


class Unanswered(Exception):
    """No answer to a question, why, and after how many seconds."""

    def __init__(self, why: str, seconds: float = 0.0) -> None:
        super().__init__(why)
        self.seconds = seconds


Answers = Callable[[], "list[Answer | Unanswered]"]  # waits for an answer to each question


class Voice(Protocol):
    """A model that answers; another for an endpoint, another for this process."""

    def begin(self, questions: Sequence[Question]) -> Answers:
        """Begins to ask. Nothing that a question can cause raises: it is an answer's place."""

    def close(self) -> None:
        """The run is over."""


def choice_of(token: str, choices: Sequence[str]) -> str | None:
    """The choice that a token is, or begins and no other does; case and spaces do not count.

    One letter is no beginning: "b" may begin anything. Some vocabularies write a space as a sign.
    """
    said = token.strip(" \t\n▁Ġ").casefold()
    if said in choices:
        return said
    found = [choice for choice in choices if choice.startswith(said)] if len(said) > 1 else []
    return found[0] if len(found) == 1 else None


def as_data(prompt: str) -> str:
    """The prompt without what chat templates and tokenizers read as their own.

    `<|im_end|>`, `</s>`, `<image>`, `[INST]` and the like become text: the bracket is followed by
    a space.
    """
    text = prompt.encode(errors="replace").decode()
    text = re.sub(r"<(?=\S)", "< ", text)
    return re.sub(r"\[(?=/?[A-Za-z_]+\])", "[ ", text)


def mark_of(prompt: str) -> str:
    """A line that the prompt cannot hold: it is made of its digest."""
    digest = hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()
    return f"=== {digest[:16]} ==="
