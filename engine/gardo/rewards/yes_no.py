"""The probability that a vision-language model answers yes: RewardDance's kind of reward.

    rewards:
      good: {kind: yes_no, role: proxy, path: Qwen/Qwen2.5-VL-7B-Instruct, where: worker:judge}

    value = P(yes) / (P(yes) + P(no))        of the first token of the answer

(arXiv 2509.08826; its checkpoints are not public, so this asks any model.) The question is whether
the picture shows what the prompt asks and has `aspect`; `question` may be another. With
`references: FOLDER` each picture is shown after a reference picture, the file of that folder which
the prompt's metadata names (`reference`), and the question is whether it is as good. Within a
group, `yes_no_pair` compares. A model that gives yes and no less than `least` together does not
answer the question: masked.

It needs probabilities: a model in this process or a worker, or an endpoint that heeds `logprobs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from gardo.rewards.base import About
from gardo.rewards.judging.base import Grader, JudgeSettings, template
from gardo.rewards.judging.questions import Unanswered
from gardo.rewards.judging.readers import Choices
from gardo.rewards.judging.templates import ALIGNED, ASPECT, REFERENCE, YES_NO
from gardo.settings import model_path
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

Question = Annotated[str, template(prompt="a", aspect="a")]


class YesNoSettings(JudgeSettings):
    """What `yes_no` and `yes_no_pair` share; `kind` is each one's own."""

    question: Question | None = Field(
        None, description="may have {prompt} and {aspect}; a word of yes or no must answer it"
    )
    aspect: str = Field(ASPECT, description="what a good picture is, after `is it`")
    least: float = Field(
        0.01, ge=0, lt=1, description="probability of yes and no together below which it is masked"
    )

    def text(self, prompt: str, default: str) -> str:
        asked = (self.question or default).format(prompt=prompt, aspect=self.aspect)
        return asked + YES_NO


class YesNoPointSettings(YesNoSettings):
    kind: Literal["yes_no"] = "yes_no"
    references: str | None = Field(
        None, description="folder of reference pictures, which prompts name as `reference`"
    )


class YesNo(Grader):
    Settings = YesNoPointSettings
    about = About(
        "P(yes) / (P(yes) + P(no)), does it show the prompt and is it good, alone or after a "
        "reference picture (RewardDance)",
        "0 to 1",
        "the model's",
        "on tiny random models; RewardDance's are not public",
    )

    def __init__(self, settings: YesNoPointSettings, device: torch.device) -> None:
        folder = settings.references
        if folder is not None and not Path(model_path(folder)).is_dir():
            raise ValueError(f"references: no folder {folder!r}")
        super().__init__(settings, device)
        self._read = lru_cache(256)(_picture)

    def reading(self) -> tuple[Choices, int]:
        return yes_or_no(self.settings), 1

    def text(self, prompt: str) -> str:
        default: str = REFERENCE if self.settings.references else ALIGNED
        return self.settings.text(prompt, default)  # type: ignore[no-any-return]

    def pictures(self, shown: Sequence[Tensor], prompt: Prompt) -> Sequence[Tensor]:
        if self.settings.references is None:
            return shown
        try:
            name = reference_of(prompt)
            return [self._read(Path(model_path(self.settings.references)) / name), *shown]
        except (OSError, ValueError) as error:
            raise Unanswered(f"no reference picture: {error}") from None

    @classmethod
    def check_for(cls, settings: YesNoPointSettings, prompt: Prompt) -> None:
        if settings.references is None or settings.where.startswith("http"):
            return  # of a server, the folder is there
        file = Path(model_path(settings.references)) / reference_of(prompt)
        try:
            with _opened(file):
                pass
        except (OSError, ValueError) as error:
            raise ValueError(f"{prompt!r}: no reference picture {str(file)!r}: {error}") from None


def yes_or_no(settings: Any) -> Choices:
    return Choices({"yes": 1.0, "no": 0.0}, settings.least)


def reference_of(prompt: Prompt) -> str:
    """The file that a prompt names, inside the folder of references. ValueError."""
    name = prompt.metadata.get("reference")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{prompt!r}: its line has no `reference`, the name of a picture")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise ValueError(f"{prompt!r}: reference {name!r} lies outside of the folder of references")
    return name


def _opened(file: Path) -> Image.Image:
    """A picture of 8 bits, its header read. OSError, ValueError."""
    try:
        picture = Image.open(file)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    if picture.mode[0] in "IF":  # 16 bits and more: converting would clip them
        raise ValueError(f"mode {picture.mode}; it must have 8 bits")
    return picture


def _picture(file: Path) -> Tensor:
    """uint8 [3, H, W]. OSError, ValueError."""
    with _opened(file) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


PLUGIN = YesNo
