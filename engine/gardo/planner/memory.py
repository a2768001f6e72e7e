"""What a recipe takes of a GPU's memory, part by part and phase by phase, before it runs.

Parts that stay are counted from parameter numbers and the precision of each copy; what comes and
goes is counted on fake tensors (shadow.py). Two numbers are assumptions and say so: what CUDA and
NCCL keep for themselves, and how much of what comes and goes the allocator cannot use again.

A phase's peak is what stays, and what the phase adds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import ceil

from gardo.config import Recipe, reward_plugin, reward_settings
from gardo.planner.geometry import Geometry
from gardo.planner.shadow import Shadow

CONTEXT = 1_000_000_000  # assumed: CUDA's context, NCCL's buffers, libraries' workspaces
FRAGMENTED = 0.05  # assumed, of what comes and goes

FEW, MORE = 1, 4  # rows or images that are counted; others lie on a line
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOMENTS = {"adamw": 8, "adamw_8bit": 2}  # bytes a trained number


@dataclass(frozen=True)
class Part:
    name: str
    bytes: int
    assumed: bool = False


@dataclass(frozen=True)
class Phase:
    """What a phase adds to what stays."""

    name: str
    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True)
class Memory:
    """Of one rank, in bytes."""

    stays: tuple[Part, ...]
    phases: tuple[Phase, ...]
    unknown: tuple[str, ...] = field(default=())  # what could not be counted

    @property
    def resident(self) -> int:
        return sum(part.bytes for part in self.stays)

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def peak(self) -> int:
        return self.resident + self.peak_phase.bytes


class Counted:
    """The memory of a recipe, and of its variants: what a model costs is asked for once."""

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow
        self._known: dict[tuple[object, ...], tuple[int, int]] = {}

    def cost(self, kind: str, count: int, *how: object) -> int:
        """`Shadow.KIND_bytes(count, *how)`, on the line through two counts of it."""
        key = (kind, *how)
        if key not in self._known:
            of = getattr(self.shadow, f"{kind}_bytes")
            self._known[key] = of(FEW, *how), of(MORE, *how)
        few, more = self._known[key]
        return few + (count - FEW) * (more - few) // (MORE - FEW)

    def memory(self, recipe: Recipe, plan: Geometry, world: int) -> Memory:
        rewards, unknown = self._rewards
        stays = (*self._trained(recipe, world), *self._around(recipe), *rewards,
                 Part("CUDA, NCCL", CONTEXT, assumed=True))  # fmt: skip
        images = min(recipe.rollout.batch or plan.samples, plan.samples)
        phases = (
            self._forward("sample", recipe, plan, "sampling", images),
            self._forward("decode", recipe, plan, "decoding", images),
            self._forward("teachers", recipe, plan, "sampling", plan.micro_batch),
            self._training(recipe, plan),
            self._updating(recipe, world),
        )
        return Memory(stays, tuple(map(_with_fragments, phases)), unknown)

    @cached_property
    def _rewards(self) -> tuple[list[Part], tuple[str, ...]]:
        """What they hold, and which do not say it; no variant of a recipe changes them."""
        parts, unknown = [], []
        for name, settings in reward_settings(self.shadow.recipe).items():
            count = reward_plugin(settings).parameters(settings)
            if count is None:
                unknown.append(f"rewards.{name}")
            elif count:
                width = BYTES[getattr(settings, "dtype", "float32")]
                parts.append(Part(f"reward {name}", count * width))
        return parts, tuple(unknown)

    # What stays -----------------------------------------------------------------------------------

    def _trained(self, recipe: Recipe, world: int) -> tuple[Part, ...]:
        """The transformer and what training keeps of it."""
        settings, shadow = recipe.distributed, self.shadow
        model, trained = shadow.parameters, shadow.trainable
        width = BYTES[settings.precision]
        stage = settings.stage if settings.engine == "zero" else 0
        weights = model * width
        if stage == 3:
            weights = 0 if settings.offload == "parameters" else ceil(weights / world)
        share = ceil(trained / world) if stage else trained
        optimizer, gradients = 0, trained * 4
        moments = MOMENTS[recipe.train.optimizer.name]
        if settings.masters == "bfloat16":
            moments, master, gradient = 4, 2, 2
        else:
            master, gradient = (4 if stage else 0), 4
        if settings.offload == "none":
            optimizer = share * (master + moments)
        gradients = (share if stage >= 2 else trained) * gradient
        slots = len(recipe.slots) * share * 4 if settings.slots == "device" else 0
        return (
            Part("weights", weights),
            Part("optimizer state", optimizer),
            Part("gradient sums", gradients),
            Part("slots", slots),
        )

    def _around(self, recipe: Recipe) -> tuple[Part, ...]:
        width = BYTES[recipe.distributed.precision]
        encoders = sum(self.shadow.encoder_parameters.values())
        return (
            Part("text encoders", encoders * width),
            Part("VAE", self.shadow.vae_parameters * width),
        )

    # What comes and goes --------------------------------------------------------------------------

    def _gathered(self, recipe: Recipe, *, once: bool) -> Part:
        """Weights of stage 3 that are whole at a time."""
        settings, shadow = recipe.distributed, self.shadow
        if settings.engine == "local" or settings.stage < 3:
            return Part("gathered weights", 0)
        whole = shadow.parameters
        blocks = [count for count, _ in shadow.block_parameters]
        live = whole - sum(blocks) + 3 * max(blocks)
        live = settings.live_parameters or live
        count = whole if once and recipe.rollout.gather != "step" else min(whole, live)
        return Part("gathered weights", count * BYTES[settings.precision])

    def _recorded(self, recipe: Recipe, plan: Geometry) -> Part:
        """States, noises (fp32) and velocities of the recorded steps, and the images."""
        latent = 1
        for side in self.shadow.policy.latent_shape:
            latent *= side
        steps = recipe.rows_per_sample
        width = BYTES[recipe.distributed.precision]
        height, columns = recipe.model.size
        of_sample = steps * latent * (4 + 4 + width) + latent * 4 + 3 * height * columns * 4
        return Part("rollout", plan.samples * of_sample)

    def _forward(self, name: str, recipe: Recipe, plan: Geometry, kind: str, count: int) -> Phase:
        """A phase without gradients, the weights gathered once."""
        return Phase(name, (
            self._gathered(recipe, once=True), self._recorded(recipe, plan),
            Part("activations", self.cost(kind, count)),
        ))  # fmt: skip

    def _training(self, recipe: Recipe, plan: Geometry) -> Phase:
        checkpointing = recipe.train.activation_checkpointing
        buckets = 0
        if recipe.distributed.engine == "zero":
            bucket = recipe.distributed.reduce_bucket or max(
                trained for _, trained in self.shadow.block_parameters
            )
            buckets = 2 * bucket * BYTES[recipe.distributed.precision]
        return Phase("train", (
            self._gathered(recipe, once=False), self._recorded(recipe, plan),
            Part("activations", self.cost("training", plan.micro_batch, checkpointing)),
            Part("gradient buckets", buckets),
        ))  # fmt: skip

    def _updating(self, recipe: Recipe, world: int) -> Phase:
        """AdamW makes new tensors of a group's size; DeepSpeed updates `sub_group` at a time."""
        settings = recipe.distributed
        share = ceil(self.shadow.trainable / world)
        at_once = min(share, settings.sub_group) if settings.stage == 3 else share
        return Phase("update", (Part("of the optimizer's step", 3 * 4 * at_once),))


def _with_fragments(phase: Phase) -> Phase:
    lost = Part("fragments", round(FRAGMENTED * phase.bytes), assumed=True)
    return Phase(phase.name, (*phase.parts, lost))
