"""A reward of one's own: an ensemble of small heads that `gardo rewards fit` fitted to pairs.

    r_k(image, prompt) = head k of the features of a frozen model         k = 1 .. K (_heads.py)
    mean     mean_k r_k
    lower    mean_k r_k - pessimism * std_k r_k
    spread   -std_k r_k

Scores are log-odds (of loss uncertainty: in units of a typical sigma): a picture that is ahead by 1
is preferred with probability sigmoid(1). The training pictures' mean is 0.

Which as an auxiliary of GARDO's gate: `lower`. The gate looks for images that the proxy ranks
higher than the auxiliaries do. Beside a proxy `mean` of the same fit, `lower` ranks alike wherever
the heads agree, so U is 0 there, and lower where they disagree on what the proxy likes: far from
the pictures of the fit, where a high score is a guess. Only ranks count: a picture that stays on
top with `pessimism` deviations taken off is not gated, so that is 3 by default. `spread` knows
nothing of the score: beside the proxy its U is high for every image that the proxy likes, sure or
not. It is for reports (role: held_out), or one auxiliary among others.

A folder has `fitted.json` and `heads.safetensors`; the first names the model of the features.
Verified: what the fit computed is what the reward gives, on tiny random models of the real classes.

Shapes: B images, K heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from pydantic import Field, ValidationError, model_validator

from gardo.rewards._files import Files, ModelRewardSettings
from gardo.rewards._head_features import FEATURES, HeadFeatures, Name
from gardo.rewards._loading import read_weights
from gardo.rewards.base import About, Held, Reward, RewardSettings
from gardo.settings import Strict, model_path
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "fitted.json", "heads.safetensors"
Loss = Literal["bradley_terry", "ties", "margin", "uncertainty"]
STATISTICS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mean": lambda r_KB, _: r_KB.mean(0),
    "lower": lambda r_KB, pessimism: r_KB.mean(0) - pessimism * r_KB.std(0),
    "spread": lambda r_KB, _: -r_KB.std(0),
}


class Fit(Strict):
    """`fitted.json`: what the heads see, their sizes, and what they were fitted to."""

    version: Literal[1] = Field(1, description="of this file's format")
    features: Name = Field(description="what the heads see: a name of FEATURES")
    path: str = Field(description="folder or hub id of the features' model")
    revision: str | None = Field(description="commit or tag of a hub id `path`")
    size: int | None = Field(description="pixels a side that the model saw; its own if null")
    width: int = Field(
        ge=1,
        description="features of a picture, with those of its prompt where it has any",
    )
    heads: int = Field(ge=1, description="in the ensemble")
    hidden: int = Field(ge=0, description="units of a head; 0: linear")
    loss: Loss = Field(description="that the heads were fitted with")
    seed: int = Field(description="of the split, the resamples and the start")
    pairs: int = Field(description="that they were fitted to, held-out ones included")
    report: dict[str, Any] = Field(description="accuracies and what else the fit measured")

    @property
    def outputs(self) -> int:
        return 2 if self.loss == "uncertainty" else 1

    def model_settings(self, **other: Any) -> ModelRewardSettings:
        """Of the reward that has the features' model; what is not None in `other` wins."""
        said = {"path": self.path, "revision": self.revision, "size": self.size}
        given = {name: value for name, value in other.items() if value is not None}
        return FEATURES[self.features].settings(**(said | given))


def read_fit(path: str, revision: str | None = None) -> Fit:
    """Of a folder, or of a hub id that is in the cache. ValueError, opening with `path`."""
    file = Path(model_path(path)) / CONFIG
    if not file.is_file():
        from transformers.utils import cached_file

        file = Path(cached_file(path, CONFIG, revision=revision))
    try:
        return Fit.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise ValueError(
            f"path: {str(file)!r}: {place}: {first['msg']}; write it with `gardo rewards fit`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"path: {str(file)!r} cannot be read: {error}") from None


class FittedSettings(ModelRewardSettings):
    kind: Literal["fitted"] = "fitted"
    path: Annotated[str, Files((CONFIG, WEIGHTS), (WEIGHTS,))] = Field(
        description="folder that `gardo rewards fit` wrote, or hub id of one"
    )
    features_path: str | None = Field(
        None, description="folder or hub id of the features' model; what the fit says if left out"
    )
    features_revision: str | None = Field(
        None, description="commit or tag of the features' model on the hub"
    )
    statistic: Literal["mean", "lower", "spread"] = Field(
        "mean", description="of the heads: their mean; mean - pessimism * std, for the gate; -std"
    )
    pessimism: float = Field(
        3.0, ge=0, le=100, description="of lower: standard deviations that are taken off"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.where == "here" and (Path(model_path(self.path)) / CONFIG).is_file():
            self.features_of(self.fit())
        return self

    def fit(self) -> Fit:
        return read_fit(self.path, self.revision)

    def features_of(self, fit: Fit) -> ModelRewardSettings:
        """Settings of the features' reward. ValueError, opening with the field that is wrong."""
        if self.statistic != "mean" and fit.heads == 1:
            raise ValueError(
                f"statistic: {self.statistic}: {self.path!r} has one head, which has no spread; "
                "fit with --heads 5"
            )
        field = "features_path" if self.features_path else "path"
        try:
            found = fit.model_settings(
                path=self.features_path,
                revision=self.features_revision,
                batch=self.batch,
                dtype=self.dtype,
            )
            said = FEATURES[fit.features].width_said(self.features_path or fit.path)
        except ValidationError as error:
            first = error.errors()[0]
            message = first["msg"].removeprefix("Value error, ")
            hint = "" if self.features_path else "; or say where it is with features_path"
            raise ValueError(f"{field}: the model of the features: {message}{hint}") from None
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        if said is not None:
            _check_width(field, self.features_path or fit.path, said, self.path, fit)
        return found

    def models_inside(self) -> Mapping[str, RewardSettings]:
        return {"features_path": self.features_of(self.fit())}

    @property
    def size(self) -> int | None:
        """Pixels a side that the features' model sees, for `gardo plan`."""
        return getattr(self.features_of(self.fit()), "size", None)


def _check_width(field: str, model: str, width: int, path: str, fit: Fit) -> None:
    if width != fit.width:
        raise ValueError(
            f"{field}: the {fit.features} features of {model!r} are {width} wide, those of "
            f"{path!r} were {fit.width}; give the model of the fit, or fit again"
        )


class Fitted(Reward):
    Settings = FittedSettings
    about = About(
        "mean over the heads of r(image, prompt), fitted to pairs (`gardo rewards fit`)",
        "log-odds: -5 to 5",
        "that of the features' model",
        "in full, on tiny random models of the features' classes",
    )
    differentiable = True

    def __init__(self, settings: FittedSettings, device: torch.device) -> None:
        from gardo.rewards._heads import Heads, filled

        super().__init__(settings, device)
        fit = settings.fit()
        self.features: HeadFeatures = FEATURES[fit.features]
        of = settings.features_of(fit)
        self.model = self.features.plugin(of, device)
        field = "features_path" if settings.features_path else "path"
        _check_width(field, of.path, self.features.width(self.model), settings.path, fit)  # type: ignore[attr-defined]
        state = read_weights(settings.path, WEIGHTS, settings.revision)
        try:
            heads = filled(Heads(fit.heads, fit.width, fit.hidden, fit.outputs), state)
        except ValueError as error:
            raise ValueError(f"path: {WEIGHTS} of {settings.path!r}: {error}") from None
        self.heads = heads.to(device).requires_grad_(False)

    def scores(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """What each head says, fp32 [K, B]."""
        return self.heads(self.features.of(self.model, images_B3HW, prompts))

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        of = STATISTICS[self.settings.statistic]
        return of(self.scores(images_B3HW, prompts), self.settings.pessimism)

    @classmethod
    def holds(cls, settings: FittedSettings) -> list[Held] | None:
        try:
            inside = settings.features_of(settings.fit())
        except (OSError, ValueError):  # a hub's, and it is not here
            return None
        found: list[Held] | None = FEATURES[settings.fit().features].plugin.holds(inside)
        return found


PLUGIN = Fitted
