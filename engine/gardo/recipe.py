"""A recipe: one training run, as checked settings. config.py reads it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from gardo import plugins
from gardo.algorithms.base import SamplerSettings, plugin_of
from gardo.bad_updates import BadUpdateSettings
from gardo.data import WEIGHT, divided, load_prompts, weighed
from gardo.distributed.average import AVERAGE, AverageSettings
from gardo.distributed.base import DistributedSettings, RolloutSettings
from gardo.distributed.checkpoint import CheckpointSettings
from gardo.distributed.optimizers import OptimizerSettings
from gardo.distributed.slots import LIVE
from gardo.evaluation.evaluate import HELD_OUT, EvaluateSettings
from gardo.hf_prompts import dataset_prompts, is_dataset
from gardo.policies.checkpointing import Checkpointing
from gardo.policies.settings import PolicySettings
from gardo.report.kept import KeepSettings
from gardo.report.trackers.base import tracker_class
from gardo.rewards.assembly import ScoringSettings
from gardo.rewards.base import RewardSettings
from gardo.settings import FieldError, Strict
from gardo.types import Prompt


def _at_home(folder: str) -> str:
    """The folder, `~` being the user's own."""
    expanded = os.path.expanduser(folder)
    if expanded.startswith("~"):
        raise ValueError(f"{folder!r}: nobody's home; write the path out")
    return expanded


def _a_tracker(name: str) -> str:
    """ValueError for one that there is not, or that lacks its package."""
    package = tracker_class(name).package
    if package and importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{name}: needs {package}, which is not here; pip install 'gardo-engine[track]'"
        )
    return name


LayerName = Annotated[str, Field(min_length=1)]


class Lora(Strict):
    kind: Literal["lora"] = Field(
        description="low-rank adapters train, the model's own weights do not",
    )
    rank: int = Field(32, ge=1, le=16_384, description="r: width of an adapter")
    alpha: float = Field(64, gt=0, description="an adapter's output is multiplied by alpha / rank")
    targets: Annotated[list[LayerName], Field(min_length=1)] | None = Field(
        None, description="module names; the family's list if left out"
    )
    path: str | None = Field(
        None, description="a LoRA to start from, of diffusers or PEFT; relative to the recipe"
    )
    folded: bool = Field(
        False,
        description="adds the adapters of blocks up inside the layers' own outputs, in fewer "
        "passes than PEFT does",
    )


class Full(Strict):
    kind: Literal["full"] = Field(description="all weights of the transformer train")


class TrainSettings(Strict):
    weights: Annotated[Lora | Full, Field(discriminator="kind")] = Field(
        description="what trains: a LoRA, or everything",
    )
    optimizer: OptimizerSettings = Field(
        OptimizerSettings(),
        description="AdamW: whose, how many bits, its numbers",
    )
    ema: AverageSettings | None = Field(None, description="an average of what trains")
    updates_per_step: int = Field(1, ge=1, le=10_000, description="gradient steps an iteration")
    micro_batch: int | None = Field(
        None, ge=1, description="rows (sample x step) a forward; all of an update if left out"
    )
    max_grad_norm: float = Field(
        1.0,
        gt=0,
        description="gradients of a larger norm, over all ranks, are scaled down to it",
    )
    bad_updates: BadUpdateSettings = Field(
        BadUpdateSettings(),
        description="when updates that could not be made (NaN, infinities) end the run",
    )
    keep_all_rows: bool = Field(
        False, description="train rows that weigh nothing too: for comparisons of speed"
    )
    activation_checkpointing: Checkpointing = Field(
        "none",
        description="what blocks run again in the backward pass: nothing, all but attention, all "
        "but attention and matmuls, all",
    )
    compile: Literal["none", "blocks", "auto"] = Field(
        "none",
        description="has torch compile the transformer's blocks, for rollout, teachers and "
        "training alike; auto: where a GPU is, and a compiler",
    )


class DataSettings(Strict):
    prompts: str = Field(
        description="text file, one prompt a line, or .jsonl, one object with `prompt` a line; "
        "relative to the recipe. hf:owner/name, hf:FOLDER: a data set, by the library datasets"
    )
    prompts_per_step: int = Field(
        ge=1,
        le=100_000,
        description="prompts an iteration, over all ranks",
    )
    images_per_prompt: int = Field(
        ge=1,
        le=10_000,
        description="images of each, its group: advantages compare them; algorithms that do "
        "want 2 or more",
    )
    weights: str | None = Field(
        WEIGHT, min_length=1, description="field of a prompt's metadata: how often it comes, "
        "relative to the others (1 where it is not said); null: all alike",
    )  # fmt: skip
    held_out: float = Field(
        0.0, ge=0, lt=1, description="share of the prompts that is kept out of training, by a hash "
        "of their texts; evaluations use them",
    )  # fmt: skip
    split: str | None = Field(None, min_length=1, description="of a data set; train if left out")
    column: str | None = Field(
        None, min_length=1, description="of a data set: the prompts'; prompt if left out"
    )
    revision: str | None = Field(None, description="commit or tag of a data set on the hub")

    @model_validator(mode="after")
    def _a_file_is_whole(self) -> Self:
        for field in ("split", "column", "revision"):
            if not is_dataset(self.prompts) and getattr(self, field) is not None:
                raise ValueError(
                    f"{field}: {getattr(self, field)!r}: is of a data set, and data.prompts is "
                    "a file; leave it out, or write data.prompts: hf:owner/name"
                )
        return self


class RunSettings(Strict):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=200,
        description="of the run's folder: letters, digits, dots, - and _",
    )
    steps: int = Field(ge=1, le=10_000_000, description="iterations")
    seed: int = Field(
        42,
        ge=0,
        description="of prompts, noise and all that is drawn; the same seed is the same run on any "
        "number of ranks",
    )
    folder: Annotated[str, AfterValidator(_at_home)] = Field(
        "runs", min_length=1, description="runs are written to FOLDER/NAME"
    )
    keep_samples: KeepSettings | None = Field(
        KeepSettings(), description="training pictures that are kept for the report; null: none"
    )
    watchdog: float = Field(
        1800, ge=0, description="seconds without progress, once all is loaded, after which a rank "
        "writes where it stands and ends the run; 0: never"
    )  # fmt: skip
    deterministic: bool = Field(
        False,
        description="only kernels that give the same bits every time, on a GPU slower; a CPU has "
        "no others",
    )
    bf16_reduced_precision_reduction: bool = Field(
        False,
        description="lets a GPU add up the parts of a bf16 matmul in bf16, torch's default; fp32 "
        "keeps the small ones",
    )
    track: list[Annotated[str, AfterValidator(_a_tracker)]] = Field(
        [], description="where the run is watched too: tensorboard, wandb, or my_module:MyTracker"
    )


class Recipe(Strict):
    """One training run. `load` replaces the plug-in sections by the exact settings classes."""

    model: Any = Field(description="what is fine-tuned")
    train: TrainSettings = Field(description="what trains, and how")
    data: DataSettings = Field(description="prompts, and images of each")
    sampler: SamplerSettings = Field(description="how training images are drawn")
    algorithm: Any = Field(description="what is learned from them, and what holds it")
    rewards: dict[str, Any] = Field(description="what images are worth, by name; each has a role")
    scoring: ScoringSettings = Field(
        ScoringSettings(),
        description="rewards that are not scored in the training process",
    )
    rollout: RolloutSettings = Field(
        RolloutSettings(),
        description="how sampling, teachers and evaluations run",
    )
    evaluate: EvaluateSettings = Field(
        EvaluateSettings(),
        description="the same images again and again, to see what training does",
    )
    checkpoint: CheckpointSettings = Field(
        CheckpointSettings(),
        description="when a run is saved, and how much of it stays",
    )
    distributed: DistributedSettings = Field(
        default_factory=DistributedSettings,
        description="how a run spreads over GPUs",
    )
    run: RunSettings = Field(description="name, length, seed, folder")
    kernels: Literal["auto", "triton", "torch"] = Field(
        "auto",
        description="fused arithmetic by Triton kernels or by plain torch; auto: Triton on a GPU "
        "where it starts",
    )

    @model_validator(mode="before")
    @classmethod
    def _stage_by_what_trains(cls, raw: Any) -> Any:
        """A LoRA's frozen base is small enough to be whole on every rank where nothing else is
        asked for: then no pass gathers."""
        distributed, train = (raw.get(name, {}) for name in ("distributed", "train"))
        if not (isinstance(distributed, dict) and isinstance(train, dict)):
            return raw  # their own check says it
        weights = train.get("weights")
        lora = isinstance(weights, dict) and weights.get("kind") == "lora"
        return {**raw, "distributed": {"stage": 1, **distributed}} if lora else raw

    @property
    def run_folder(self) -> Path:
        return Path(self.run.folder) / self.run.name

    @property
    def checkpoint_folder(self) -> Path:
        return self.run_folder / "checkpoints"

    @property
    def rows_per_sample(self) -> int:
        """Training rows that a sample becomes."""
        return plugin_of(self.algorithm).rows_per_sample(self.algorithm, self.sampler)

    @property
    def teachers_per_row(self) -> float:
        """Forward passes of other weights that a training row needs, as expected."""
        return sum(plugin_of(self.algorithm).needs(self.algorithm).teachers.values())

    @property
    def differentiable(self) -> bool:
        """Whether gradients go through the decoder and the proxies."""
        return plugin_of(self.algorithm).needs(self.algorithm).differentiable

    @property
    def slots(self) -> tuple[str, ...]:
        """Copies of the trained weights: those that the algorithm needs, and the average."""
        own = plugin_of(self.algorithm).slots_of(self.algorithm)
        return (*own, AVERAGE) if self.train.ema else own

    @property
    def evaluated(self) -> str:
        """The weights that evaluations draw with: the live ones, or a slot."""
        return AVERAGE if self.train.ema and self.train.ema.evaluate else LIVE

    def prompts(self) -> list[Prompt]:
        """Those to train on. ValueError; FieldError where it is not `data.prompts` that is wrong"""
        every, share = self._every_prompt(), self.data.held_out
        return divided(every, share)[0] if share else every

    def evaluation_prompts(self) -> list[Prompt]:
        """As `prompts`, of `evaluate.prompts`."""
        named, share = self.evaluate.prompts, self.data.held_out
        if named == HELD_OUT and not share:
            raise FieldError(
                "evaluate.prompts: held_out: data.held_out keeps none out of training; give it a "
                "share, such as 0.1"
            )
        if named in (None, HELD_OUT):
            every = self._every_prompt()
            found = divided(every, share)[1] if share else every
        else:
            found = load_prompts(Path(named))
        return found[: self.evaluate.prompt_count]

    def _every_prompt(self) -> list[Prompt]:
        data = self.data
        if is_dataset(data.prompts):
            split, column = data.split or "train", data.column or "prompt"
            prompts = [*dataset_prompts(data.prompts, split, column, data.revision)]
        else:
            prompts = load_prompts(Path(data.prompts))
        return weighed(prompts, data.weights)


def reward_settings(recipe: Recipe) -> dict[str, RewardSettings]:
    return dict(recipe.rewards)


def reward_plugin(settings: RewardSettings) -> Any:
    return plugins.resolve("gardo.rewards", settings.kind)


def policy_plugin(settings: PolicySettings) -> Any:
    return plugins.resolve("gardo.policies", settings.family)
