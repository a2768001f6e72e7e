"""What the released scripts load and wrap: pipeline, two adapters, optimizer, accelerate.

accelerate does here what it does for them: precision, accumulation, gathering, DeepSpeed. Its
settings are those of their configuration files: no offload, everything else by default.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import set_seed
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from gardo.loading import build_panel, find_rewards, quiet_libraries
from gardo.machine import ranks, use_device
from gardo.policies.lora_files import lora_config
from gardo.recipe import Recipe, policy_plugin, reward_settings
from gardo.recipe_errors import RecipeError
from gardo.rewards.panel import Panel
from gardo.settings import model_path
from step.released_families import FAMILIES, Family


@dataclass
class Loaded:
    """`transformer` is what accelerate made of the pipeline's."""

    accelerator: Accelerator
    family: Family
    panel: Panel
    transformer: Any
    optimizer: Any
    trained: list[nn.Parameter]
    old: list[nn.Parameter]


def copy_weights(sources: Sequence[nn.Parameter], targets: Sequence[nn.Parameter]) -> None:
    for source, target in zip(sources, targets, strict=True):
        held(target).copy_(held(source))


def held(parameter: nn.Parameter) -> Tensor:
    """What this rank has of a parameter, without a gradient: its shard under ZeRO-3."""
    return getattr(parameter, "ds_tensor", parameter).data


def check(recipe: Recipe, batch: int, world: int, source: str) -> None:
    """RecipeError for what the released scripts do not do."""
    for field, right, wanted in _limits(recipe):
        if not right:
            raise RecipeError(f"{source}: {field}: the released scripts have only {wanted}")
    images = recipe.data.prompts_per_step * recipe.data.images_per_prompt
    updates = recipe.train.updates_per_step
    if images % (batch * world * updates):
        raise RecipeError(
            f"{source}: --batch {batch}: {images} images an iteration are no multiple of {batch} x "
            f"{world} ranks x {updates} updates; use a batch that divides {images // world}"
        )


def _limits(recipe: Recipe) -> Iterator[tuple[str, bool, str]]:
    """Field, whether the release can do what it says, and what the release has."""
    yield "model.family", recipe.model.family in FAMILIES, "flux and sd3"
    yield "train.weights", recipe.train.weights.kind == "lora", "kind: lora"
    yield "sampler.sde", recipe.sampler.sde == "flow", "sde: flow"
    roles = [settings.role for settings in reward_settings(recipe).values()]
    single = roles.count("proxy") == roles.count("features") == 1
    yield "rewards", single, "one proxy and one features"
    algorithm, base = recipe.algorithm, getattr(recipe.algorithm, "base", None)
    around = algorithm.name == "gardo" and getattr(base, "name", None) == "flow_grpo"
    yield "algorithm", around, "gardo around flow_grpo"
    mechanisms = (algorithm.gate, algorithm.diversity, algorithm.reference)
    yield "algorithm", None not in mechanisms, "gardo with gate, diversity and reference"
    advantage = (base.advantage.std, base.advantage.scale) == ("none", 1.0)
    yield "algorithm.base.advantage", advantage, "{std: none, scale: 1}"
    yield "algorithm.base.kl", base.kl == "flow_grpo", "kl: flow_grpo"
    yield "algorithm.base.kl_in_reward", not base.kl_in_reward, "a KL in the loss"


def prepare(recipe: Recipe, *, engine: str, batch: int, accumulation: int) -> Loaded:
    """Loads all that a run needs, for an `engine` local or zero.

    `batch` is the samples of a micro-batch, `accumulation` the backward passes of an update.
    ValueError, opening with its field, for a reward that does not load.
    """
    quiet_libraries()
    _, local_rank, _ = ranks()
    accelerator = _accelerator(recipe, engine, use_device(local_rank), accumulation)
    set_seed(recipe.run.seed, device_specific=True)
    find_rewards(recipe)
    pipeline = _pipeline(recipe, accelerator)
    model = pipeline.transformer
    old, trained = _trainable(model, "old"), _trainable(model, "default")
    copy_weights(trained, old)
    settings = recipe.train.optimizer
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings.lr,
        betas=tuple(settings.betas),
        weight_decay=settings.weight_decay,
        eps=settings.eps,
    )
    panel = build_panel(recipe, accelerator.device)
    if accelerator.state.deepspeed_plugin:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = batch
    transformer, optimizer = accelerator.prepare(model, optimizer)
    family = FAMILIES[recipe.model.family](pipeline, recipe, accelerator.device)
    family.prepare()
    return Loaded(accelerator, family, panel, transformer, optimizer, trained, old)


def _accelerator(
    recipe: Recipe, engine: str, device: torch.device, accumulation: int
) -> Accelerator:
    options: dict[str, Any] = {
        "mixed_precision": "bf16" if recipe.distributed.precision == "bfloat16" else "no",
        "gradient_accumulation_steps": accumulation,
    }
    if engine == "local":
        return Accelerator(cpu=device.type == "cpu", **options)
    from gardo.distributed.zero import start_process_group

    start_process_group(device, recipe.distributed.timeout)
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(
            zero_stage=recipe.distributed.stage,
            offload_optimizer_device="none",
            offload_param_device="none",
            zero3_init_flag=False,
        ),
        kwargs_handlers=[
            InitProcessGroupKwargs(backend="nccl" if device.type == "cuda" else "gloo")
        ],
        **options,
    )
    # at stage 3 transformers would take apart what no engine puts together: encoders and rewards
    unset_hf_deepspeed_config()
    return accelerator


def _pipeline(recipe: Recipe, accelerator: Accelerator) -> Any:
    """The pipeline with its VAE and transformer in fp32, the text encoders in the run's dtype."""
    plugin, weights = policy_plugin(recipe.model), recipe.train.weights
    path = model_path(recipe.model.path)
    pipeline = _of(plugin.Settings.pipeline_name).from_pretrained(path, dtype=torch.float32)
    half = accelerator.mixed_precision == "bf16"
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            encoder = name.startswith("text_encoder")
            dtype = torch.bfloat16 if encoder and half else torch.float32
            part.requires_grad_(False).eval().to(accelerator.device, dtype)
    config = lora_config(
        rank=weights.rank,
        alpha=weights.alpha,
        targets=weights.targets or plugin.lora_targets,
    )
    model = get_peft_model(pipeline.transformer, config)
    initialise(model, recipe.run.seed)
    model.add_adapter("old", config)
    pipeline.transformer = model
    return pipeline


def _of(pipeline_name: str) -> Any:
    import diffusers

    return getattr(diffusers, pipeline_name)


def initialise(model: nn.Module, seed: int) -> None:
    """Gives the adapter the values with which `gardo` starts (`Policy.train_lora`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in _layers(model):
            halves = [layer.lora_A["default"], layer.lora_B["default"]]
            places = [half.weight.device for half in halves]
            for half in halves:
                half.to("cpu").reset_parameters()
            layer.reset_lora_parameters("default", "gaussian")
            for half, place in zip(halves, places, strict=True):
                half.to(place)


def _layers(model: nn.Module) -> Iterator[Any]:
    return (layer for layer in model.modules() if isinstance(layer, LoraLayer))


def _trainable(model: Any, adapter: str) -> list[nn.Parameter]:
    model.set_adapter(adapter)
    return [p for p in model.parameters() if p.requires_grad]


class Average:
    """The moving average of what trains, asked once a micro-batch of samples."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, every: int) -> None:
        self._parameters, self._decay, self._every = parameters, decay, every
        self._average = [held(p).clone() for p in parameters]

    def step(self, update: int) -> None:
        if (update + 1) % self._every:
            return
        share = 1 - min((1 + update) / (10 + update), self._decay)
        for average, parameter in zip(self._average, self._parameters, strict=True):
            average.add_(share * (held(parameter) - average))
