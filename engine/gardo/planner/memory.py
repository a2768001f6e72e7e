"""What a recipe takes of a GPU's memory, part by part and phase by phase, before it runs.

Parts that stay are counted from parameter numbers and the precision of each copy; what comes and
goes is counted on fake tensors (shadow.py). Two numbers are assumptions and say so: what CUDA and
NCCL keep for themselves, and how much of what comes and goes the allocator cannot use again.

A phase's peak is what stays, and what the phase adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil

from gardo.distributed.base import DistributedSettings
from gardo.distributed.optimizers import moment_bytes
from gardo.planner.geometry import Geometry
from gardo.planner.scorers import Scorer, own_weights, scorer
from gardo.planner.shadow import Shadow
from gardo.policies.quantised import BASES
from gardo.recipe import Recipe, reward_settings
from gardo.rewards.assembly import elsewhere, worker_name
from gardo.rewards.base import RewardSettings

CONTEXT = 1_000_000_000  # assumed: CUDA's context, NCCL's buffers, libraries' workspaces
FRAGMENTED = 0.05  # assumed, of what comes and goes

FEW, MORE = 1, 4  # rows or images that are counted; others lie on a line
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Part:
    name: str
    bytes: int
    assumed: bool = False


SHARED = "ranks share them"
CUDA = Part("CUDA, NCCL", CONTEXT, assumed=True)


@dataclass(frozen=True)
class Phase:
    """What a phase adds to what stays; `before`: it is over when the rest is loaded."""

    name: str
    parts: tuple[Part, ...]
    before: bool = False

    @property
    def bytes(self) -> int:
        return total(self.parts)


@dataclass(frozen=True)
class Memory:
    """Of one rank, in bytes."""

    stays: tuple[Part, ...]
    phases: tuple[Phase, ...]
    host: tuple[Part, ...] = ()  # waits in host memory
    workers: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)  # of each, on its device
    unknown: tuple[str, ...] = ()  # what could not be counted

    @property
    def resident(self) -> int:
        return total(self.stays)

    def peak_of(self, phase: Phase) -> int:
        return phase.bytes + (0 if phase.before else self.resident)

    @property
    def peak_phase(self) -> Phase:
        return max(self.phases, key=self.peak_of)

    @property
    def peak(self) -> int:
        return self.peak_of(self.peak_phase)


def total(parts: Iterable[Part]) -> int:
    return sum(part.bytes for part in parts)


def most(scorers: Mapping[str, Scorer | None]) -> int:
    """Activations of the reward that takes most."""
    return max((of.activations for of in scorers.values() if of), default=0)


def _of_worker(scorers: Mapping[str, Scorer | None]) -> tuple[Part, ...]:
    weights = [Part(f"reward {name}", size) for name, size in own_weights(scorers).items()]
    return (*weights, Part("activations", most(scorers)))


class Counted:
    """The memory of a recipe, and of its variants: what a model costs is asked for once."""

    def __init__(self, shadow: Shadow) -> None:
        self.shadow = shadow
        self._known: dict[tuple[object, ...], tuple[int, int]] = {}
        self._scorers: dict[tuple[str, int], Scorer | None] = {}

    def cost(self, kind: str, count: int, *how: object) -> int:
        """`Shadow.KIND_bytes(count, *how)`, on the line through two counts of it."""
        key = (kind, *how)
        if key not in self._known:
            of = getattr(self.shadow, f"{kind}_bytes")
            self._known[key] = of(FEW, *how), of(MORE, *how)
        few, more = self._known[key]
        return few + (count - FEW) * (more - few) // (MORE - FEW)

    def memory(self, recipe: Recipe, plan: Geometry, world: int) -> Memory:
        scorers = self._scorers_of(recipe, plan)
        asked = self._asked_of(recipe)
        rewards = [Part(f"reward {n}", size) for n, size in own_weights(scorers).items() if size]
        device, host = self._split(recipe, self._trained(recipe, world))
        stays = (*device, *self._around(recipe), *rewards, CUDA)
        encode, sample, decode, teachers, evaluate = self._reading(recipe, plan, world)
        phases = (
            encode,
            sample,
            decode,
            Phase(
                "reward",
                (
                    self._recorded(recipe, plan),
                    Part("activations", self._scoring(recipe, plan)),
                ),
            ),
            teachers,
            self._training(recipe, plan, scorers, world),
            self._updating(recipe, world),
            evaluate,
        )
        if recipe.model.encoders == "offload":
            shared = replace(self._text_encoders(recipe), name=f"text encoders ({SHARED})")
            host = (*host, shared)
        return Memory(
            stays,
            tuple(map(_with_fragments, phases)),
            host,
            {worker: _of_worker(its) for worker, its in asked.items()},
            tuple(
                f"rewards.{name}"
                for its in (scorers, *asked.values())
                for name, of in its.items()
                if of is None
            ),
        )

    def forecast(self, recipe: Recipe, plan: Geometry, world: int) -> Phase:
        """The phase that adds most to what is there when the engine has started and slots have not
        been made: of those that read weights which are gathered once."""
        device, _ = self._split(recipe, self._trained(recipe, world))
        slots = [part for part in device if part.name == "slots"]
        _, *gathering = self._reading(recipe, plan, world)
        largest = _with_fragments(max(gathering, key=lambda phase: phase.bytes))
        return replace(largest, parts=(*slots, *largest.parts))

    def settled(self, recipe: Recipe, plan: Geometry, world: int, room: int) -> Recipe:
        """The recipe with `rollout.gather: auto` as a run settles it where `room` bytes of each
        GPU are not enough to gather once."""
        settings = recipe.distributed
        if recipe.rollout.gather != "auto" or settings.engine == "local" or settings.stage < 3:
            return recipe
        rollout = recipe.rollout.model_copy(update={"gather": "step"})
        each = recipe.model_copy(update={"rollout": rollout})
        once, at_every = (self.memory(r, plan, world).peak for r in (recipe, each))
        return each if at_every <= room < once else recipe

    def _scoring(self, recipe: Recipe, plan: Geometry) -> int:
        """Activations of the reward that takes most."""
        return most(self._scorers_of(recipe, plan))

    def _scorers_of(self, recipe: Recipe, plan: Geometry) -> dict[str, Scorer | None]:
        found = {}
        for name, settings in reward_settings(recipe).items():
            if settings.where != "here":
                continue
            found[name] = self._scorer(settings, plan.micro_batch if recipe.differentiable else 0)
        return found

    def _asked_of(self, recipe: Recipe) -> dict[str, dict[str, Scorer | None]]:
        """By `worker:NAME on DEVICE`, a process of each machine: its rewards."""
        found: dict[str, dict[str, Scorer | None]] = {}
        devices = {name: its.device for name, its in recipe.scoring.workers.items()}
        for name, settings in elsewhere(reward_settings(recipe)).items():
            if worker := worker_name(settings):
                place = f"{settings.where} on {devices.get(worker, 'cpu')}"
                found.setdefault(place, {})[name] = self._scorer(settings, 0)
        return found

    def _scorer(self, settings: RewardSettings, trained: int) -> Scorer | None:
        key = settings.model_dump_json(), trained
        if key not in self._scorers:
            self._scorers[key] = scorer(settings, trained)
        return self._scorers[key]

    # What stays -----------------------------------------------------------------------------------

    def _trained(self, recipe: Recipe, world: int) -> tuple[Part, ...]:
        """The transformer and what training keeps of it."""
        settings, shadow = recipe.distributed, self.shadow
        trained = shadow.trainable
        stage = settings.stage if settings.engine == "zero" else 0
        weights = shadow.weight_bytes(recipe.model.base, BYTES[settings.precision])
        if stage == 3:
            weights = ceil(weights / world)
        share = ceil(trained / world) if stage else trained
        moments = moment_bytes(recipe.train.optimizer.name, settings.masters)
        if settings.masters == "bfloat16":
            master, gradient = 2, 2
        else:
            master, gradient = (4 if stage else 0), 4
        return (
            Part("weights", weights),
            Part("buffers", shadow.buffer_bytes),
            Part("optimizer state", ceil(share * (master + moments))),
            Part("gradient sums", (share if stage >= 2 else trained) * gradient),
            Part("slots", len(recipe.slots) * share * 4),
            Part("gradient bucket", self._bucket(settings) if stage == 3 else 0),
        )

    def _bucket(self, settings: DistributedSettings) -> int:
        """Gradients that are reduced at a time, those of a block: stage 3 keeps their place."""
        block = max(trained for _, trained in self.shadow.block_parameters)
        return (settings.reduce_bucket or block) * BYTES[settings.precision]

    @staticmethod
    def _split(recipe: Recipe, parts: Iterable[Part]) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        """Those on the device, and those that the recipe keeps in host memory."""
        settings = recipe.distributed
        away = {
            "weights": settings.offload == "parameters",
            "optimizer state": settings.offload != "none",
            "slots": settings.slots == "host",
        }
        device = tuple(part for part in parts if not away.get(part.name))
        return device, tuple(part for part in parts if away.get(part.name))

    def _text_encoders(self, recipe: Recipe) -> Part:
        count = sum(parameters for parameters, _ in self.shadow.encoders.values())
        return Part("text encoders", count * BYTES[recipe.distributed.precision])

    def _vae(self, recipe: Recipe) -> Part:
        return Part("VAE", self.shadow.vae_parameters * BYTES[recipe.distributed.precision])

    def _around(self, recipe: Recipe) -> tuple[Part, ...]:
        if recipe.model.encoders == "resident":
            return self._text_encoders(recipe), self._vae(recipe)
        return (self._vae(recipe),)

    # What comes and goes --------------------------------------------------------------------------

    def _gathered(self, recipe: Recipe, world: int, *, once: bool) -> Part:
        """Weights of stage 3 that are whole at a time; and those of a block twice, while it is put
        together from what the ranks sent. A rank alone has them whole."""
        settings, shadow = recipe.distributed, self.shadow
        alone = world == 1 and settings.offload != "parameters"
        if settings.engine == "local" or settings.stage < 3 or alone:
            return Part("gathered weights", 0)
        whole = shadow.parameters
        blocks = [count for count, _ in shadow.block_parameters]
        live = whole - sum(blocks) + 3 * max(blocks)
        live = settings.live_parameters or live
        gathered_once = once and recipe.rollout.gather != "step"
        count = whole if gathered_once else min(whole, live) + max(blocks)
        return Part("gathered weights", count * BYTES[settings.precision])

    def _dequantised(self, recipe: Recipe) -> Part:
        """The weights of a layer, whole for its matmul."""
        if recipe.model.base not in BASES:
            return Part("dequantised weights", 0)
        width = BYTES[recipe.distributed.precision]
        return Part("dequantised weights", self.shadow.largest_linear * width)

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

    def _reading(self, recipe: Recipe, plan: Geometry, world: int) -> tuple[Phase, ...]:
        """The phases without gradients: encode, sample, decode, teachers, evaluate."""
        at_once = min(recipe.rollout.decode_batch or self.shadow.policy.decode_batch, plan.sampled)
        common = (self._gathered(recipe, world, once=True), self._dequantised(recipe))
        recorded = (*common, self._recorded(recipe, plan))
        drawn: tuple[Part, ...] = recorded
        if recipe.rollout.overlap:
            beside = max(self.cost("decoding", at_once), self._scoring(recipe, plan))
            drawn = (*recorded, Part("decoded and scored beside", beside))

        def phase(
            name: str, parts: tuple[Part, ...], kind: str, count: int, least: int = 0
        ) -> Phase:
            need = max(least, self.cost(kind, count))
            return Phase(name, (*parts, Part("activations", need)))

        return (
            self._encoding(recipe),
            phase("sample", drawn, "sampling", plan.sampled),
            phase("decode", recorded, "decoding", at_once),
            phase("teachers", recorded, "sampling", plan.micro_batch),
            # images are scored where they are drawn
            phase(
                "evaluate", common, "sampling", recipe.evaluate.batch, self._scoring(recipe, plan)
            ),
        )

    def _encoding(self, recipe: Recipe) -> Phase:
        """The text encoders; `free`: before anything else is there."""
        one = Part("activations", max(need for _, need in self.shadow.encoders.values()))
        residence, encoders = recipe.model.encoders, self._text_encoders(recipe)
        if residence == "free":
            return Phase("encode", (encoders, self._vae(recipe), one, CUDA), before=True)
        return Phase("encode", (encoders, one) if residence == "offload" else (one,))

    def _training(
        self, recipe: Recipe, plan: Geometry, scorers: Mapping[str, Scorer | None], world: int
    ) -> Phase:
        checkpointing = recipe.train.activation_checkpointing
        settings = recipe.distributed
        at_once = 1 if settings.stage == 3 else 2  # there one of the two stays
        buckets = at_once * self._bucket(settings) if settings.engine == "zero" else 0
        parts = [
            self._gathered(recipe, world, once=False), self._dequantised(recipe),
            self._recorded(recipe, plan),
            Part("activations", self.cost("training", plan.micro_batch, checkpointing)),
            Part("gradient buckets", buckets),
        ]  # fmt: skip
        if recipe.differentiable:
            graph = sum(s.graph for s in scorers.values() if s)
            decoding = self.cost("decoding", plan.micro_batch, True)
            parts.append(Part("decoder's and rewards' graph", decoding + graph))
        return Phase("train", tuple(parts))

    def _updating(self, recipe: Recipe, world: int) -> Phase:
        """DeepSpeed flattens the fp32 gradients of what it updates, at stage 3 `sub_group` at a
        time; the optimizers work in place."""
        settings = recipe.distributed
        share = ceil(self.shadow.trainable / world)
        at_once = min(share, settings.sub_group) if settings.stage == 3 else share
        return Phase("update", (Part("flattened gradients", 4 * at_once),))


def _with_fragments(phase: Phase) -> Phase:
    lost = Part("fragments", round(FRAGMENTED * phase.bytes), assumed=True)
    return replace(phase, parts=(*phase.parts, lost))
