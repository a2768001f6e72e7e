"""Models, rewards and the engine that trains them: all of a recipe that takes memory."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from gardo.data import run_prompts
from gardo.distributed.base import Engine, gather_text, ranks_here
from gardo.distributed.group import Group
from gardo.distributed.shards import load_masters
from gardo.machine import ranks
from gardo.planner import Geometry
from gardo.planner.forecast import forecast
from gardo.policies.attention import use_attention
from gardo.policies.base import Policy
from gardo.policies.lora_files import open_lora
from gardo.recipe import Recipe, policy_plugin, reward_settings
from gardo.recipe_errors import RecipeError
from gardo.rewards._files import find_files
from gardo.rewards.assembly import (
    ScoringSettings,
    Workers,
    assemble,
    at_endpoints,
    meet_endpoints,
)
from gardo.rewards.base import RewardSettings
from gardo.rewards.panel import Panel
from gardo.rewards.serving.line import Address
from gardo.rewards.serving.wire import TOKEN, secret
from gardo.settings import FieldError
from gardo.types import Prompt


def quiet_libraries() -> None:
    """The run's output is ours: no loading bars, no note for each prompt that CLIP cuts."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def join_ranks(recipe: Recipe, device: torch.device) -> Group:
    """This rank among those that the launcher has started; engine local has one."""
    if recipe.distributed.engine == "local":
        return Group(device)
    from gardo.distributed.zero import start_process_group

    return start_process_group(device, recipe.distributed.timeout)


def build_policy(recipe: Recipe, device: torch.device) -> Policy:
    """The model with what trains switched on, in the precision that the engine starts from.

    Its transformer has no weights yet (`Policy.load_transformer`): the engine decides where they go
    """
    policy: Policy = policy_plugin(recipe.model)(
        recipe.model, dtype=getattr(torch, recipe.distributed.precision), device=device, defer=True
    )
    weights = recipe.train.weights
    if weights.kind == "lora":
        policy.train_lora(
            rank=weights.rank,
            alpha=weights.alpha,
            targets=tuple(weights.targets) if weights.targets else None,
            seed=recipe.run.seed,
        )
        if weights.folded:
            policy.fold_lora(recipe.train.activation_checkpointing)
    else:
        policy.train_full()
    policy.checkpoint_activations(recipe.train.activation_checkpointing)
    policy.decode_batch = recipe.rollout.decode_batch or policy.decode_batch
    return policy


def free_encoders(recipe: Recipe, policy: Policy) -> None:
    """Encodes all prompts of the run; the ranks of a machine share the work, files between them.

    They lie beside the runs, so that other runs find them.
    """
    data, (_, local_rank, world) = recipe.data, ranks()
    used = run_prompts(recipe.prompts(), recipe.run.steps, data.prompts_per_step, recipe.run.seed)
    policy.free_encoders(
        [*used, *recipe.evaluation_prompts()],
        Path(recipe.run.folder) / "embeddings",
        share=(local_rank, ranks_here(world)),
        wait=join_ranks(recipe, policy.device).barrier,
    )


def find_rewards(recipe: Recipe) -> None:
    """ValueError, opening with its field, for the first file of a reward that is not to be had."""
    find_files_of(reward_settings(recipe))


def find_files_of(rewards: Mapping[str, RewardSettings]) -> None:
    """As `find_rewards`, of rewards by name."""
    for name, settings in rewards.items():
        find_files(settings, f"rewards.{name}")


def meet_endpoints_of(
    rewards: Mapping[str, RewardSettings], group: Group, *, prompt: Prompt, size: tuple[int, int]
) -> None:
    """ValueError on all ranks, opening with its field, for an endpoint that does not answer.

    The first rank of each machine asks: what is not there is known before anything loads.
    """
    if not at_endpoints(rewards):
        return
    problem = ""
    if ranks()[1] == 0:
        try:
            meet_endpoints(rewards, prompt=prompt, size=size)
        except ValueError as error:
            problem = str(error)
    for said in filter(None, gather_text(group, problem)):
        raise FieldError(said)


def start_workers(recipe: Recipe, say: Callable[[str], object] = print) -> Workers:
    """The workers of this machine, by its first rank; they load while the models do."""
    rewards = reward_settings(recipe) if ranks()[1] == 0 else {}
    reductions = recipe.run.bf16_reduced_precision_reduction
    return Workers.start(rewards, recipe.scoring, say, bf16_reductions=reductions)


def build_panel(recipe: Recipe, device: torch.device, workers: Workers | None = None) -> Panel:
    """ValueError, opening with its field, for a reward that does not load or is not reached.

    All ranks call it: they ask the workers that the first of their machine has started.
    """
    return panel_of(
        reward_settings(recipe),
        recipe.scoring,
        workers or Workers(),
        join_ranks(recipe, device),
        prompt=recipe.prompts()[0],
        size=recipe.model.size,
    )


def panel_of(
    rewards: Mapping[str, RewardSettings],
    scoring: ScoringSettings,
    workers: Workers,
    group: Group,
    *,
    prompt: Prompt,
    size: tuple[int, int],
) -> Panel:
    """As `build_panel`, of rewards by name. One rank's refusal is all ranks'."""
    reachable, own = _reachable(workers, group), None
    try:
        panel = assemble(
            rewards,
            scoring,
            group.device,
            reachable,
            prompt=prompt,
            size=size,
            token=secret(TOKEN, os.environ.get(TOKEN)),
        )
    except (OSError, ValueError) as error:
        own = error
    said = gather_text(group, str(own) if own else "")
    if own:
        raise own
    for rank, text in enumerate(said):
        if text:
            raise FieldError(f"rank {rank}: {text}")
    return panel


def _reachable(workers: Workers, group: Group) -> dict[str, Address]:
    """The workers of this machine, which its first rank has started. ValueError on all ranks."""
    try:
        own: dict[str, Any] = {n: astuple(a) for n, a in workers.addresses().items()}
    except ValueError as error:
        own = {"": str(error)}
    said = [json.loads(text) for text in gather_text(group, json.dumps(own))]
    for each in said:
        if "" in each:
            raise FieldError(each[""])
    rank, local_rank, _ = ranks()
    return {name: Address(*address) for name, address in said[rank - local_rank].items()}


def build_engine(recipe: Recipe, policy: Policy, plan: Geometry, device: torch.device) -> Engine:
    options: dict[str, Any] = {
        "optimizer": recipe.train.optimizer,
        "accumulation": plan.accumulation,
        "max_grad_norm": recipe.train.max_grad_norm,
        "device": device,
    }
    if recipe.distributed.engine == "local":
        from gardo.distributed.local import LocalEngine

        policy.load_transformer()
        host_slots = recipe.distributed.slots == "host"
        return LocalEngine(policy.trainable(), host_slots=host_slots, **options)
    from gardo.distributed.zero import ZeroEngine

    return ZeroEngine(
        policy.transformer,
        load=policy.load_transformer,
        blocks=policy.blocks(),
        settings=recipe.distributed,
        rollout=recipe.rollout,
        forecast=functools.partial(forecast, recipe, ranks()[2], device),
        **options,
    )


def load_models(
    recipe: Recipe, plan: Geometry, device: torch.device, source: str, workers: Workers
) -> tuple[Policy, Panel, Engine]:
    """The model, the rewards and the engine that trains the model: all that takes memory."""
    try:
        find_rewards(recipe)  # minutes before they load, a missing one is known
        policy = build_policy(recipe, device)
        if recipe.train.weights.kind == "lora" and recipe.train.weights.path:
            policy.start_from(open_lora(recipe.train.weights.path))
        if ranks()[0] == 0:
            policy.identify()  # asked for at the first checkpoint, while all other ranks wait
        if recipe.model.encoders == "free":
            free_encoders(recipe, policy)
        use_attention(
            policy.transformer, recipe.model.attention, deterministic=recipe.run.deterministic
        )
        if recipe.model.block_kernels:
            policy.use_block_kernels(recipe.kernels)
        if recipe.train.compile == "blocks":
            policy.compile_blocks(recipe.train.activation_checkpointing)
        panel = build_panel(recipe, device, workers)
    except FieldError as error:
        raise RecipeError(f"{source}: {error}") from error
    except (OSError, ValueError) as error:  # what a folder's inside or a hub can still refuse
        raise RecipeError(f"{source}: a model does not load: {error}") from error
    engine = build_engine(recipe, policy, plan, device)
    if policy.start:
        load_masters(engine.shards, policy.start.read())
    return policy, panel, engine
