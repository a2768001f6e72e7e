"""What must hold between sections of a recipe: a rule raises ValueError, opening with a field."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence

from gardo.algorithms.base import plugin_of
from gardo.distributed.optimizers import check_optimizer
from gardo.policies.attention import check_settings
from gardo.policies.lora_files import open_lora
from gardo.policies.quantised import check_base
from gardo.policies.settings import check_parts
from gardo.recipe import Recipe, policy_plugin, reward_plugin, reward_settings
from gardo.rewards.assembly import check_places, with_judges
from gardo.rewards.base import RewardSettings
from gardo.settings import FieldError
from gardo.types import Prompt


def _rewards_fit(recipe: Recipe) -> None:
    by_role: dict[str, list[str]] = {}
    for name, settings in reward_settings(recipe).items():
        by_role.setdefault(settings.role, []).append(name)
        try:
            reward_plugin(settings).check(settings, recipe.data.images_per_prompt)
        except ValueError as error:
            raise ValueError(f"rewards.{name}.{error}") from None
    check_places(reward_settings(recipe), recipe.scoring)
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
    if recipe.evaluate.measures_features and not by_role.get("features"):
        diversity = recipe.evaluate.diversity
        raise ValueError(f"evaluate.diversity: {diversity} needs a reward with role features")


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
        if settings.role == "proxy" and settings.where != "here":
            raise ValueError(
                f"rewards.{name}.where: {settings.where}: no gradient comes from there, and the "
                "algorithm needs one; leave it out"
            )
        if settings.role == "proxy" and not reward_plugin(settings).differentiable:
            raise ValueError(
                f"rewards.{name}: {settings.kind} has no gradient, and the algorithm needs one"
            )


def _prompts_fit(recipe: Recipe) -> None:
    for field, prompts in (
        ("data.prompts", recipe.prompts),
        ("evaluate.prompts", recipe.evaluation_prompts),
    ):
        check_prompts(field, prompts, reward_settings(recipe))


def check_prompts(
    field: str, prompts: Callable[[], Sequence[Prompt]], rewards: Mapping[str, RewardSettings]
) -> None:
    """ValueError, opening with the field, where prompts cannot be read or a reward could never
    score one of them."""
    rewards = with_judges(rewards)
    try:
        texts = prompts()
    except FieldError:
        raise
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
    for line, text in enumerate(texts, start=1):
        for name, settings in rewards.items():
            try:
                reward_plugin(settings).check_for(settings, text)
            except ValueError as error:
                raise ValueError(f"{field}: prompt {line}: {error} (rewards.{name})") from None


def _diversity_fits(recipe: Recipe) -> None:
    for line, text in enumerate(recipe.evaluation_prompts(), start=1):
        try:
            recipe.evaluate.check_prompt(text)
        except ValueError as error:
            raise ValueError(f"evaluate.diversity: prompt {line}: {error}") from None


def _distributed_fits(recipe: Recipe) -> None:
    if recipe.rollout.overlap and recipe.distributed.precision == "float32":
        judges = {n: getattr(r, "judge", r) for n, r in reward_settings(recipe).items()}
        in_tf32 = [n for n, judge in judges.items() if getattr(judge, "dtype", "") == "tf32"]
        if in_tf32:
            raise ValueError(
                f"rollout.overlap: rewards.{in_tf32[0]} in TF32 would have a model in float32 "
                "sampled in TF32 now and then; use distributed.precision: bfloat16, or give the "
                "reward dtype: float32"
            )
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


def _attention_fits(recipe: Recipe) -> None:
    check_settings(
        recipe.model.attention,
        precision=recipe.distributed.precision,
        deterministic=recipe.run.deterministic,
    )


def _model_fits(recipe: Recipe) -> None:
    check_parts(recipe.model.path)


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


def _folder_fits(recipe: Recipe) -> None:
    """The run's folder is made when the models have loaded; so much can be said before."""
    folder = recipe.run_folder.absolute()
    for at in (*reversed(folder.parents), folder):
        field, name = ("run.name", recipe.run.name) if at == folder else ("run.folder", str(at))
        try:
            is_folder = stat.S_ISDIR(os.stat(at).st_mode)
        except FileNotFoundError:
            if os.path.islink(at):
                raise ValueError(
                    f"{field}: {name!r} is a link that leads nowhere; give another"
                ) from None
            break
        except OSError as error:  # a circle of links, a name that is too long
            raise ValueError(f"{field}: {name!r}: {error.strerror}; give another") from None
        if not is_folder:
            raise ValueError(f"{field}: {name!r} is there, and no folder; give another")
        there = at
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"run.folder: {str(there)!r} cannot be written to; give a folder that this user may "
            "write to"
        )


WITHOUT_PROMPTS = (_rewards_fit, _algorithm_fits, _distributed_fits, _attention_fits)
OF_FILES = (_folder_fits, _start_fits)
OF_PROMPTS = (_prompts_fit, _diversity_fits)
ALL = (*WITHOUT_PROMPTS, _model_fits, *OF_FILES, *OF_PROMPTS)
