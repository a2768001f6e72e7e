"""A suite: prompts, noise and rewards on which models are compared; what `gardo eval` is told.

A strict YAML file, as a recipe is one. Models may be compared where their suites ask the same
(`Suite.identity`), whatever they are called and however they were computed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field, ValidationError

from gardo import plugins
from gardo.config import found_file, load_rewarded
from gardo.data import load_prompts
from gardo.evaluation.evaluate import DiversitySettings
from gardo.policies.quantised import BASES
from gardo.policies.settings import PolicySettings, check_parts
from gardo.recipe import reward_plugin
from gardo.recipe_errors import RecipeError, explained
from gardo.recipe_rules import check_prompts
from gardo.rewards import geneval_prompts
from gardo.rewards.assembly import ScoringSettings, check_places
from gardo.rewards.base import RewardSettings, provides
from gardo.settings import Pair, check_installed, config_folder, read_object
from gardo.types import Prompt

GENEVAL = "geneval:"  # prompts of GenEval's grammar, so many
HOW = {  # not what is asked, but how it is computed: models may differ in it and be compared
    "name", "batch", "precision", "base", "encoders", "family", "scoring", "shown", "threads",
}  # fmt: skip
WHAT = {"role", "weight", "model"}  # of what is a reward's client's, that which changes the result


class Asked(Protocol):
    """How a model is to draw, whatever it is; None: as it does by default."""

    @property
    def family(self) -> str | None: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def guidance(self) -> float | None: ...
    @property
    def text_tokens(self) -> int | None: ...
    @property
    def precision(self) -> str: ...
    @property
    def base(self) -> str | None: ...
    @property
    def encoders(self) -> str: ...
    @property
    def family_option(self) -> str: ...  # how the command is told the family


class Suite(DiversitySettings):
    """What models are asked to draw, and how it is judged."""

    family_option: ClassVar[str] = "--set family="

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
        description="of the folder that results are written to: evaluations/NAME",
    )
    prompts: str = Field(
        description="a .txt or .jsonl file as data.prompts of a recipe, relative to the suite; or "
        "geneval:N, so many of GenEval's grammar"
    )
    prompt_count: int | None = Field(None, ge=1, description="the first so many; all if left out")
    images_per_prompt: int = Field(
        4,
        ge=1,
        le=10_000,
        description="images of each prompt, the noise the same for every model",
    )
    seed: int = Field(0, ge=0, description="of the noise, and of generated prompts")
    steps: int = Field(ge=1, le=1000, description="denoise steps")
    guidance: float | None = Field(
        None, ge=0, description="guidance scale; the model's default if left out"
    )
    size: Pair[Annotated[int, Field(gt=0, le=16_384)]] = Field(
        description="height and width in pixels"
    )
    text_tokens: int | None = Field(
        None, ge=1, le=512, description="T5 tokens of a prompt; the model's default if left out"
    )
    batch: int = Field(16, ge=1, le=100_000, description="images a forward")
    precision: Literal["float32", "bfloat16"] = Field("bfloat16", description="of the model")
    base: Literal["nf4", "int8"] | None = Field(
        None, description="how the model's weights are kept; as precision if left out"
    )
    encoders: Literal["resident", "offload"] = Field(
        "offload", description="where the text encoders wait, as model.encoders of a recipe"
    )
    family: str | None = Field(
        None, description="the model's, where its folder or hub id does not tell"
    )
    rewards: dict[str, Any] = Field(
        description="what judges, by name, as in a recipe; role: proxy for what the run optimised",
    )
    scoring: ScoringSettings = Field(
        ScoringSettings(),
        description="rewards that are scored elsewhere: workers, servers, limits",
    )
    shown: int = Field(6, ge=1, description="prompts in the picture")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads a rank, on which last bits depend; cores / "
        "ranks if left out"
    )  # fmt: skip

    @cached_property
    def texts(self) -> list[Prompt]:
        """The prompts. ValueError where there are none to be had."""
        if self.prompts.startswith(GENEVAL):
            return _generated(self.prompts.removeprefix(GENEVAL), self.seed)[: self.prompt_count]
        return load_prompts(Path(self.prompts))[: self.prompt_count]

    @property
    def reward_settings(self) -> dict[str, RewardSettings]:
        return dict(self.rewards)

    @property
    def asks(self) -> dict[str, Any]:
        """What images are asked for and how they are judged, as JSON."""
        said = self.model_dump(mode="json", exclude={*HOW, "prompt_count"})
        said["prompts"] = [[str(text), dict(text.metadata)] for text in self.texts]
        for name, section in said["rewards"].items():
            for how in self.rewards[name].of_the_client - WHAT:
                section.pop(how, None)
        said["pixels"] = self.scoring.pixels  # how pictures travel to rewards elsewhere
        return dict(json.loads(json.dumps(said, default=str)))

    @property
    def identity(self) -> str:
        return identity_of(self.asks)


def identity_of(asks: Mapping[str, Any]) -> str:
    """SHA-256 of `Suite.asks`."""
    return hashlib.sha256(json.dumps(asks, sort_keys=True).encode()).hexdigest()


def load_suite(path: Path, overrides: list[str]) -> Suite:
    """The suite of a file, with `a.b=c` overrides applied. RecipeError says what to mend."""
    if not os.path.isfile(path):
        raise RecipeError(f"{path}: no such suite; give a YAML file, such as suites/tiny.yaml")

    def prepare(raw: dict[str, Any]) -> None:
        prompts = raw.get("prompts")
        if isinstance(prompts, str) and not prompts.startswith(GENEVAL):
            raw["prompts"] = found_file(prompts, path.parent)

    return load_rewarded(
        Suite, path, overrides, prepare=prepare, rules=(_rewards_fit, _prompts_fit, _base_fits)
    )


def _rewards_fit(suite: Suite) -> None:
    features = []
    for name, settings in suite.reward_settings.items():
        plugin = reward_plugin(settings)
        if provides(plugin, "score_together"):
            raise ValueError(
                f"rewards.{name}: {settings.kind} compares the images of a group, and here each is "
                "scored alone; use its judge as a reward"
            )
        try:
            plugin.check(settings, suite.images_per_prompt)
        except ValueError as error:
            raise ValueError(f"rewards.{name}.{error}") from None
        features += [name] if plugin.gives_features else []
    check_places(suite.reward_settings, suite.scoring)
    if len(features) > 1:
        raise ValueError(f"rewards: {', '.join(features)} all give features; keep one")
    if len(features) == len(suite.rewards):
        raise ValueError("rewards: none scores images; name one, such as pickscore")
    if suite.measures_features and not features:
        raise ValueError(f"diversity: {suite.diversity} needs a reward with role features")
    if suite.measures_features and suite.images_per_prompt < 2:
        raise ValueError("images_per_prompt: 1 image has no other to differ from; use 2 or more")


def _prompts_fit(suite: Suite) -> None:
    check_prompts("prompts", lambda: suite.texts, suite.reward_settings)
    for line, text in enumerate(suite.texts, start=1):
        try:
            suite.check_prompt(text)
        except ValueError as error:
            raise ValueError(f"diversity: prompt {line}: {error}") from None


def _base_fits(suite: Suite) -> None:
    if suite.base in BASES:
        check_installed("bitsandbytes", f"base: {suite.base}")


def _generated(count: str, seed: int) -> list[Prompt]:
    """Prompts of GenEval's six tasks, as evenly as they can be asked; tasks take turns."""
    if not count.isdecimal() or not int(count):
        raise ValueError(f"{GENEVAL}{count}: give how many, such as {GENEVAL}553")
    rows, _ = geneval_prompts.files(int(count), seed)
    asked = {
        task: [r["prompt"] for r in rows if r["tag"] == task] for task in geneval_prompts.TASKS
    }
    turns = zip_longest(*asked.values())
    return [Prompt(text) for turn in turns for text in turn if text is not None]


# ---- the model ----------------------------------------------------------------------------------


def model_settings(
    asked: Asked, path: str, *, revision: str | None = None, like: PolicySettings | None = None
) -> PolicySettings:
    """The settings of a model that draws as it is asked. RecipeError.

    `like` are those that a run trained it with: what only its family knows is taken from there.
    """
    family = like.family if like else asked.family or family_of(path, asked.family_option)
    try:
        plugin = plugins.resolve("gardo.policies", family)
    except ValueError as error:
        raise RecipeError(f"family: {error}") from None
    settings: type[PolicySettings] = plugin.Settings
    own = like.model_dump() if like else {}
    wanted = {
        **{name: own[name] for name in own.keys() - PolicySettings.model_fields.keys()},
        "family": family,
        "path": path,
        "revision": revision,
        **{name: getattr(asked, name) for name in ("base", "size", "encoders")},
        **{name: getattr(asked, name) for name in ("guidance", "text_tokens")},
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    try:
        found = settings.model_validate(given)
        check_parts(path)
    except ValidationError as error:
        raise RecipeError(explained(settings, error, path, {})) from None
    except ValueError as error:
        raise RecipeError(str(error)) from None
    return found


def family_of(path: str, option: str) -> str:
    """The family whose pipeline a folder or a published hub id holds. RecipeError."""
    names = plugins.names("gardo.policies")
    folder = config_folder(path)
    index = folder / "model_index.json" if folder else None
    if index is None or not index.is_file():
        raise RecipeError(
            f"{path}: no diffusers folder, and no hub id whose family is known; say which with "
            f"{option}NAME, one of {', '.join(names)}"
        )
    try:
        held = read_object(index).get("_class_name")
    except ValueError as error:
        raise RecipeError(str(error)) from None
    for name in names:
        if plugins.resolve("gardo.policies", name).Settings.pipeline_name == held:
            return name
    raise RecipeError(
        f"{path}: holds a {held}, of no family that is built in ({', '.join(names)}); say which "
        f"with {option}my_module:MyFamily"
    )
