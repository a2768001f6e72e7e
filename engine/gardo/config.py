"""The recipe: a strict schema, and its loader (safe YAML plus `--set a.b=c`).

A recipe's plug-in sections (model, algorithm, rewards) are checked by the settings of the plug-in
that they name; an error names the file, the field, the value and the mend, before anything heavy
loads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model

from gardo import plugins
from gardo.algorithms.base import SamplerSettings, Wrapper, plugin_of
from gardo.data import load_prompts
from gardo.distributed.average import AVERAGE, AverageSettings
from gardo.distributed.base import DistributedSettings, RolloutSettings
from gardo.distributed.checkpoint import CheckpointSettings
from gardo.distributed.optimizers import OptimizerSettings, check_optimizer
from gardo.distributed.slots import LIVE
from gardo.evaluation.evaluate import EvaluateSettings
from gardo.policies.attention import check_settings
from gardo.policies.base import PolicySettings
from gardo.policies.checkpointing import Checkpointing
from gardo.policies.lora_files import open_lora
from gardo.policies.quantised import check_base
from gardo.recipe_errors import Origin, RecipeError, explain, placed
from gardo.rewards.base import RewardSettings
from gardo.settings import Strict
from gardo.types import Prompt


class Lora(Strict):
    kind: Literal["lora"]
    rank: int = Field(32, ge=1)
    alpha: float = Field(64, gt=0)
    targets: list[str] | None = Field(
        None, description="module names; the family's list if left out"
    )
    path: str | None = Field(
        None, description="a LoRA to start from, of diffusers or PEFT; relative to the recipe"
    )


class Full(Strict):
    kind: Literal["full"]


class TrainSettings(Strict):
    weights: Annotated[Lora | Full, Field(discriminator="kind")]
    optimizer: OptimizerSettings = OptimizerSettings()
    ema: AverageSettings | None = Field(None, description="an average of what trains")
    updates_per_step: int = Field(1, ge=1, description="gradient steps an iteration")
    micro_batch: int | None = Field(
        None, ge=1, description="rows (sample x step) a forward; all of an update if left out"
    )
    max_grad_norm: float = Field(1.0, gt=0)
    keep_all_rows: bool = Field(
        False, description="train rows that weigh nothing too: for comparisons of speed"
    )
    activation_checkpointing: Checkpointing = Field(
        "none",
        description="what blocks run again in the backward pass: nothing, all but attention, all "
        "but attention and matmuls, all",
    )


class DataSettings(Strict):
    prompts: str = Field(
        description="text file, one prompt a line, or .jsonl, one object with `prompt` a line; "
        "relative to the recipe"
    )
    prompts_per_step: int = Field(ge=1)
    images_per_prompt: int = Field(ge=1)


class RunSettings(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    steps: int = Field(ge=1, description="iterations")
    seed: int = Field(42, ge=0)
    folder: str = Field("runs", description="runs are written to FOLDER/NAME")
    deterministic: bool = Field(
        False,
        description="only kernels that give the same bits every time, on a GPU slower; a CPU has "
        "no others",
    )


class Recipe(Strict):
    """One training run. `load` replaces the plug-in sections by the exact settings classes."""

    model: Any
    train: TrainSettings
    data: DataSettings
    sampler: SamplerSettings
    algorithm: Any
    rewards: dict[str, Any]
    rollout: RolloutSettings = RolloutSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    distributed: DistributedSettings = DistributedSettings()
    run: RunSettings
    kernels: Literal["auto", "triton", "torch"] = Field(
        "auto",
        description="fused arithmetic by Triton kernels or by plain torch; auto: Triton on a GPU",
    )

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
        return load_prompts(Path(self.data.prompts))

    def evaluation_prompts(self) -> list[Prompt]:
        path = self.evaluate.prompts or self.data.prompts
        return load_prompts(Path(path))[: self.evaluate.prompt_count]


# ---- reading -------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and reads 1e-4 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(text: str, source: str) -> Any:
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error


def load(path: str | Path, overrides: Sequence[str] = (), *, prompts: bool = True) -> Recipe:
    """The recipe of a file with `a.b=c` overrides applied. RecipeError says what to mend.

    `prompts=False` leaves alone what need not be there to plan: prompt files, a starting LoRA.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(
            f"{path}: no such recipe; give a YAML file, such as recipes/tiny_flux_gardo.yaml"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error
    raw = read_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections; this is {type(raw).__name__}"
        )
    origin: Origin = {}
    for override in overrides:
        _override(raw, override, origin)
    _absolute_paths(raw, path.parent)
    return check(raw, str(path), origin, rules=_RULES if prompts else _WITHOUT_PROMPTS)


def check(
    raw: dict[str, Any],
    source: str,
    origin: Origin | None = None,
    *,
    rules: Sequence[Callable[[Recipe], None]] | None = None,
) -> Recipe:
    """The recipe of a mapping; `source` names the file in errors, `origin` the --set of a field.

    `rules` are those between sections; all of them if left out.
    """
    origin = origin or {}
    if isinstance(raw.get("rewards"), dict):  # a reward that is null is not there
        raw = {**raw, "rewards": {n: r for n, r in raw["rewards"].items() if r is not None}}
    try:
        schema = recipe_schema(raw)
        recipe = schema.model_validate(raw)
    except ValidationError as error:
        lines = [explain(schema, e, source, origin) for e in error.errors()]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None
    except _BadName as error:
        raise RecipeError(placed(error, source, origin)) from None
    for rule in _RULES if rules is None else rules:
        try:
            rule(recipe)
        except ValueError as error:
            raise RecipeError(placed(error, source, origin)) from None
    return recipe


def _override(raw: dict[str, Any], override: str, origin: Origin) -> None:
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise RecipeError(
            f"--set {override}: expected FIELD=VALUE, such as --set train.optimizer.lr=1e-4"
        )
    keys = tuple(name.split("."))
    here: Any = raw
    for key in keys[:-1]:
        if here.get(key) is None:
            here[key] = {}
        here = here[key]
        if not isinstance(here, dict):
            raise RecipeError(f"--set {name}: {key!r} is a value, not a section")
    new = read_yaml(value, f"--set {name}")
    if keys[0] == "rewards" and len(keys) == 2 and new is None and keys[1] not in here:
        raise RecipeError(
            f"--set {name}: there is no such reward to take out; there are {', '.join(here)}"
        )
    here[keys[-1]] = new
    origin[keys] = f"--set {name}"


def _absolute_paths(raw: dict[str, Any], folder: Path) -> None:
    """Files are looked for beside the recipe, then where the command runs."""
    train = raw.get("train")
    weights = train.get("weights") if isinstance(train, dict) else None
    for part, field in (
        (raw.get("data"), "prompts"),
        (raw.get("evaluate"), "prompts"),
        (weights, "path"),
    ):
        if isinstance(part, dict) and isinstance(part.get(field), str):
            given = Path(part[field]).expanduser()
            beside = folder / given
            part[field] = str((beside if beside.exists() else given).absolute())


# ---- plug-in sections ----------------------------------------------------------------------------


class _BadName(Exception):
    pass


def _plugin(package: str, section: Any, field: str, location: str) -> Any:
    if not isinstance(section, dict) or not isinstance(section.get(field), str):
        raise _BadName(f"{location}.{field}: missing; one of {', '.join(plugins.names(package))}")
    try:
        plugin = plugins.resolve(package, section[field])
    except ValueError as error:
        raise _BadName(f"{location}.{field}: {error}") from None
    if not hasattr(plugin, "Settings"):
        raise _BadName(f"{location}.{field}: {section[field]!r} is no plug-in: it has no Settings")
    return plugin


def _algorithm_settings(section: Any, location: str = "algorithm") -> type[BaseModel]:
    plugin = _plugin("gardo.algorithms", section, "name", location)
    settings: type[BaseModel] = plugin.Settings
    own: dict[str, Any] = {"name": (str, ...)} if ":" in section["name"] else {}
    if issubclass(plugin, Wrapper):
        own["base"] = (_algorithm_settings(section.get("base"), f"{location}.base"), ...)
    return create_model(settings.__name__, __base__=settings, **own) if own else settings


def _reward_settings(name: str, section: Any) -> type[BaseModel]:
    location = f"rewards.{name}"
    if isinstance(section, dict):
        section.setdefault("kind", name)
    settings = _plugin("gardo.rewards", section, "kind", location).Settings
    own: dict[str, Any] = {"kind": (str, ...)} if ":" in section["kind"] else {}
    if "judge" in settings.model_fields:
        own["judge"] = (_judge_settings(section.get("judge"), f"{location}.judge"), ...)
    return create_model(settings.__name__, __base__=settings, **own) if own else settings


def _judge_settings(section: Any, location: str) -> type[BaseModel]:
    """A reward inside another: it has no role and no weight of its own."""
    settings = _plugin("gardo.rewards", section, "kind", location).Settings
    own: dict[str, Any] = {"role": (Literal["judge"], "judge"), "weight": (None, None)}
    if ":" in section["kind"]:
        own["kind"] = (str, ...)
    return create_model(settings.__name__, __base__=settings, **own)


def recipe_schema(raw: dict[str, Any]) -> type[Recipe]:
    """The schema of this recipe: its plug-in sections have the plug-ins' own settings."""
    rewards = raw.get("rewards")
    if not isinstance(rewards, dict) or not rewards:
        raise _BadName("rewards: missing; name at least one with role proxy")
    for name in rewards:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", str(name)):
            raise _BadName(f"rewards.{name}: a name is a letter, then letters, digits, - or _")
    model = _plugin("gardo.policies", raw.get("model"), "family", "model").Settings
    fields: dict[str, Any] = {
        str(n): (_reward_settings(str(n), section), ...) for n, section in rewards.items()
    }
    panel = create_model("Rewards", __base__=Strict, **fields)
    return create_model(
        "Recipe",
        __base__=Recipe,
        model=(model, ...),
        algorithm=(_algorithm_settings(raw.get("algorithm")), ...),
        rewards=(panel, ...),
    )


def full_schema() -> dict[str, Any]:
    """JSON schema of recipes with every built-in plug-in (`gardo schema`)."""

    def union(package: str) -> Any:
        classes = [plugins.resolve(package, n).Settings for n in plugins.names(package)]
        return Union[tuple(classes)]  # noqa: UP007  built at run time

    sections: dict[str, Any] = {
        "model": (union("gardo.policies"), ...),
        "algorithm": (union("gardo.algorithms"), ...),
        "rewards": (GenericAlias(dict, (str, union("gardo.rewards"))), ...),
    }
    schema = create_model("Recipe", __base__=Recipe, **sections)
    return schema.model_json_schema()


# ---- rules between sections ----------------------------------------------------------------------


def _rewards_fit(recipe: Recipe) -> None:
    by_role: dict[str, list[str]] = {}
    for name, settings in reward_settings(recipe).items():
        by_role.setdefault(settings.role, []).append(name)
        try:
            reward_plugin(settings).check(settings, recipe.data.images_per_prompt)
        except ValueError as error:
            raise ValueError(f"rewards.{name}.{error}") from None
    if not by_role.get("proxy"):
        raise ValueError(
            "rewards: none has role proxy; give the reward that is optimised `role: proxy`"
        )
    if len(by_role.get("features", [])) > 1:
        raise ValueError(
            f"rewards: {', '.join(by_role['features'])} all have role features; keep one"
        )
    for need in plugin_of(recipe.algorithm).needs(recipe.algorithm).rewards:
        there, role = by_role.get(need.role, []), need.role
        if need.name and need.name not in there:
            raise ValueError(
                f"algorithm.{need.field}: {need.name!r} is no reward with role {role}; "
                f"add `{need.name}: {{role: {role}}}` to rewards"
            )
        if not there:
            raise ValueError(
                f"algorithm.{need.field}: needs rewards with role {role}{need.why}; add one, "
                f"or leave the {need.field.rpartition('.')[2]} out"
            )
    if recipe.evaluate.diversity == "features" and not by_role.get("features"):
        raise ValueError("evaluate.diversity: features needs a reward with role features")


def _algorithm_fits(recipe: Recipe) -> None:
    plugin = plugin_of(recipe.algorithm)
    plugin.check(recipe.algorithm, recipe.sampler)
    needs, images = plugin.needs(recipe.algorithm), recipe.data.images_per_prompt
    if recipe.differentiable:
        _all_differentiable(recipe)
    if images < needs.images_per_prompt:
        raise ValueError(
            f"data.images_per_prompt: {images} image has no group to compare with, every advantage "
            f"is 0; use at least {needs.images_per_prompt}"
        )


def _all_differentiable(recipe: Recipe) -> None:
    for name, settings in reward_settings(recipe).items():
        if settings.role == "proxy" and not reward_plugin(settings).differentiable:
            raise ValueError(
                f"rewards.{name}: {settings.kind} has no gradient, and the algorithm needs one"
            )


def _prompts_fit(recipe: Recipe) -> None:
    rewards = reward_settings(recipe)
    judges = {f"{name}.judge": getattr(s, "judge", None) for name, s in rewards.items()}
    rewards |= {name: judge for name, judge in judges.items() if judge}
    for field, prompts in (
        ("data.prompts", recipe.prompts),
        ("evaluate.prompts", recipe.evaluation_prompts),
    ):
        try:
            texts = prompts()
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from None
        for line, text in enumerate(texts, start=1):
            for name, settings in rewards.items():
                try:
                    reward_plugin(settings).check_prompt(text)
                except ValueError as error:
                    raise ValueError(f"{field}: prompt {line}: {error} (rewards.{name})") from None


def _diversity_fits(recipe: Recipe) -> None:
    for line, text in enumerate(recipe.evaluation_prompts(), start=1):
        try:
            recipe.evaluate.check_prompt(text)
        except ValueError as error:
            raise ValueError(f"evaluate.diversity: prompt {line}: {error}") from None


def _distributed_fits(recipe: Recipe) -> None:
    check_base(
        recipe.model.base,
        trains_all=recipe.train.weights.kind == "full",
        precision=recipe.distributed.precision,
        partitions_weights=recipe.distributed.engine == "zero" and recipe.distributed.stage == 3,
        offload=recipe.distributed.offload,
    )
    recipe.distributed.check(recipe.slots)
    check_optimizer(
        recipe.train.optimizer.name,
        engine=recipe.distributed.engine,
        offload=recipe.distributed.offload,
        masters=recipe.distributed.masters,
    )


def _start_fits(recipe: Recipe) -> None:
    weights = recipe.train.weights
    if weights.kind == "full" or weights.path is None:
        return
    try:
        start = open_lora(weights.path)
    except ValueError as error:
        raise ValueError(f"train.weights.path: {error}") from None
    targets = weights.targets or policy_plugin(recipe.model).lora_targets
    try:
        start.check(rank=weights.rank, alpha=weights.alpha, targets=targets)
    except ValueError as error:
        raise ValueError(f"train.weights.{error}") from None


def _attention_fits(recipe: Recipe) -> None:
    check_settings(
        recipe.model.attention,
        precision=recipe.distributed.precision,
        deterministic=recipe.run.deterministic,
    )


_WITHOUT_PROMPTS = (_rewards_fit, _algorithm_fits, _distributed_fits, _attention_fits)
_RULES = (*_WITHOUT_PROMPTS, _start_fits, _prompts_fit, _diversity_fits)


def reward_settings(recipe: Recipe) -> dict[str, RewardSettings]:
    panel: Any = recipe.rewards  # a settings class once it is checked
    return {name: getattr(panel, name) for name in type(panel).model_fields}


def reward_plugin(settings: RewardSettings) -> Any:
    return plugins.resolve("gardo.rewards", settings.kind)


def policy_plugin(settings: PolicySettings) -> Any:
    return plugins.resolve("gardo.policies", settings.family)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
