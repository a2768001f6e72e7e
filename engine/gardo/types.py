"""The values that travel between the parts of the engine: frozen dataclasses of tensors.

Shapes: B samples of this rank (or of all ranks, after a gather), P prompts, G images of a prompt,
T recorded steps, R training rows (sample x step), X the shape of one latent: (L, D) packed tokens
for Flux, (C, H, W) for SD3; D feature width.

What a row is of (int64: `sample_B`, `group_B`, `prompt_B`, `step_T`, `sample_R`, `prompt_R`,
`step_R`) is on the host, and so is all that credit sees and says: the host decides by it and never
waits for the device. What a row holds (latents, velocities, images, a batch) is on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from torch import Tensor

Record = TypeVar("Record")


class Phase(Protocol):
    """Says that what follows belongs to a phase of an iteration; with rows it is a model's call."""

    def __call__(self, name: str, *, rows: int = 0) -> AbstractContextManager[None]: ...


def no_phase(name: str, *, rows: int = 0) -> AbstractContextManager[None]:
    """Where nobody measures."""
    return nullcontext()


def mapped(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """A dataclass with every tensor in it changed, those in mappings too."""

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        if isinstance(value, Mapping):
            return {name: of(inner) for name, inner in value.items()}
        return value

    changed = {f.name: of(getattr(record, f.name)) for f in fields(record)}  # type: ignore[arg-type]
    return replace(record, **changed)  # type: ignore[type-var]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. A copy from the host does not wait for what the device is doing."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def taker(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Indexes tensors by `rows` along their first axis, each where it is.

    Rows from the host are sent to a device once, without waiting for it.
    """
    sent = {rows.device: rows}

    def take(tensor: Tensor) -> Tensor:
        device = tensor.device
        if device not in sent:
            sent[device] = to_device(rows, device)
        return tensor[sent[device]]

    return take


def select(record: Record, rows: Tensor) -> Record:
    """The dataclass with every tensor in it indexed by `rows` along its first axis."""
    return mapped(record, taker(rows))


def together(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """A dataclass of [B, ...] tensors changed as one: `change` sees them side by side, fp64 [B, N].

    It is one collective, or one copy to the host, and not one for each. All floats up to fp64,
    booleans and integers below 2^53 come back as they were.
    """
    found: list[Tensor] = []
    mapped(record, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    columns = [tensor.double().reshape(len(tensor), -1) for tensor in found]
    widths = [column.shape[1] for column in columns]
    changed = iter(change(torch.cat(columns, 1)).split(widths, 1))
    return mapped(record, lambda old: next(changed).to(old.dtype).reshape(-1, *old.shape[1:]))


class Prompt(str):
    """A prompt's text; `metadata` is what its line of the prompt file says beside the text.

    Prompts of one text are equal whatever their metadata, which is for rewards alone: a text is
    encoded once. `weight`: how often it comes in training, relative to the others.
    """

    metadata: Mapping[str, Any]  # read-only
    weight: float

    def __new__(
        cls, text: str, metadata: Mapping[str, Any] | None = None, weight: float = 1.0
    ) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.metadata = MappingProxyType(dict(metadata or {}))
        prompt.weight = weight
        return prompt

    def __reduce__(self) -> tuple[Any, ...]:
        # a MappingProxyType cannot be pickled
        return Prompt, (str(self), dict(self.metadata), self.weight)


@dataclass(frozen=True)
class SamplePlan:
    """How one iteration samples. `transitions` is a `gardo.flow.Transitions` of T rows."""

    transitions: Any
    record: tuple[int, ...]  # denoise steps whose state, noise and velocity are kept
    weights: str = "train"  # whose weights sample: "train" or a slot
    teachers: tuple[str, ...] = ()  # whose velocities at the recorded steps credit needs
    same_initial_noise: bool = False  # one draw for all images of a prompt


@dataclass(frozen=True)
class Rollout:
    """What sampling produced on this rank."""

    sample_B: Tensor  # int64, index within the step over all ranks: prompt * G + image
    group_B: Tensor  # int64, prompt index within the step
    prompt_B: Tensor  # int64, row of `conditioning`
    prompts: tuple[Prompt, ...]  # B
    conditioning: Mapping[str, Tensor]  # one row a prompt of this rank
    final_BX: Tensor  # fp32 latents at sigma 0
    images_B3HW: Tensor  # fp32 in [0, 1]
    step_T: Tensor  # int64, the recorded denoise steps
    state_BTX: Tensor  # fp32, x before the step
    u_BTX: Tensor  # fp32, the step's noise in velocity units (std / B) z; zeros where it has none
    velocity_BTX: Tensor  # model dtype, what the sampler used
    transitions: Any  # a `gardo.flow.Transitions` on the device
    seed: int
    seed_1: Tensor  # int64 [1], the seed on the device, as kernels read it
    step: int
    velocities: Mapping[str, Tensor] = field(default_factory=dict)  # of teachers: [B, T, X]
    # of rewards: what they have said already, or what waits for it
    values: Mapping[str, Tensor | Callable[[], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Scores:
    """Rewards of the gathered batch (all ranks), in sample order.

    A panel makes them on the device, of this rank; credit sees those of all ranks on the host.
    """

    sample_B: Tensor
    group_B: Tensor
    proxy_B: Tensor  # fp32, the weighted sum of the rewards with role proxy
    valid_B: Tensor  # bool, False where a reward failed
    rewards: Mapping[str, Tensor] = field(default_factory=dict)  # name -> fp32 [B], every role
    masks: Mapping[str, Tensor] = field(default_factory=dict)  # name -> bool [B]
    proxies: Mapping[str, float] = field(default_factory=dict)  # name -> weight in proxy_B
    auxiliaries: tuple[str, ...] = ()
    features_BD: Tensor | None = None
    measures: Mapping[str, Tensor] = field(default_factory=dict)  # name -> fp32 [B], of features
    kl_B: Tensor | None = None  # fp32, KL of the sampled trajectory, where credit needs it


@dataclass(frozen=True)
class Credit:
    """What each sample is worth to the loss, in sample order."""

    advantage_B: Tensor  # fp32
    gate_B: Tensor  # bool, True where the KL to the reference applies
    kl_weight_B: Tensor | None = None  # fp32, of the KL in the mean over an update
    info: Mapping[str, float] = field(default_factory=dict)  # for the log

    @property
    def kl_weight_or_gate(self) -> Tensor:
        """What the KL of each sample weighs, fp32; the gate, where nothing has weighed it."""
        return self.gate_B.float() if self.kl_weight_B is None else self.kl_weight_B

    def with_info(self, **more: float) -> Credit:
        return replace(self, info={**self.info, **more})


@dataclass(frozen=True)
class Points:
    """Rows to train on, [R, ...].

    `velocities` holds what teachers said, by the name of their weights.
    """

    sample_R: Tensor  # int64, index into this rank's B samples
    prompt_R: Tensor  # int64, row of the conditioning
    step_R: Tensor  # int64, denoise step; -1 where the row has none
    sigma_R: Tensor  # fp32, the time that the model is told
    x_RX: Tensor  # fp32, the model's input
    # what the algorithm needs, [R, ...], on the device or on the host
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    velocities: Mapping[str, Tensor] = field(default_factory=dict)

    def with_extra(self, **more: Tensor) -> Points:
        return replace(self, extra={**self.extra, **more})

    def with_velocity(self, name: str, velocity_RX: Tensor) -> Points:
        return replace(self, velocities={**self.velocities, name: velocity_RX})


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows of `Points` with their credit, on the device (`extra` as well)."""

    points: Points
    advantage_R: Tensor
    gate_R: Tensor  # bool
    kl_weight_R: Tensor  # fp32, what the KL of a row weighs in the mean over the update
    rollout: Rollout  # what the points were made of
    last: bool = True  # of its update
    share: float = 1.0  # of the update's rows, that its micro-batches hold; the others weigh 0
    velocity_RX: Tensor | None = None  # the trained model's, where its forward pass has run already


class Metrics:
    """Sums and counts by name, so that ranks and micro-batches add up; and maxima.

    They stay on the device, fp64, until `reduce` of the ranks takes all of them to the host at
    once: gathering them never waits for a GPU.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # name -> [2], the sum and the count
        self.maxima: dict[str, Tensor] = {}  # name -> []

    def mean(
        self, name: str, values: Tensor, weights: Tensor | None = None, *, share: float = 1.0
    ) -> Metrics:
        """Adds the values, a mean over their number (or over the weights' sum).

        `share`: the values are this share of all; those that were left out are zeros.
        """
        values = values.detach().double()
        weights = torch.ones_like(values) if weights is None else weights.detach().double()
        self._add(name, torch.stack([(values * weights).sum(), weights.sum() / share]))
        return self

    def maximum(self, name: str, values: Tensor) -> Metrics:
        """Keeps the largest value; NaN counts as infinity."""
        values = values.detach().double().flatten()
        lowest = values.new_full((1,), -torch.inf)  # of no values
        # NaN compares as not larger, in collectives: it would be lost
        known = torch.where(values.isnan(), torch.inf, values)
        self._raise(name, torch.cat([known, lowest]).max())
        return self

    def add(self, other: Metrics) -> None:
        for name, pair in other.sums.items():
            self._add(name, pair)
        for name, value in other.maxima.items():
            self._raise(name, value)

    def __getitem__(self, name: str) -> float:
        """The mean or maximum; NaN where nothing was counted."""
        if name in self.maxima:
            return float(self.maxima[name])
        total, count = self.sums[name].tolist()
        return total / count if count else float("nan")

    def __contains__(self, name: str) -> bool:
        return name in self.sums or name in self.maxima

    def as_dict(self) -> dict[str, float]:
        return {name: self[name] for name in (*self.sums, *self.maxima)}

    def _add(self, name: str, pair: Tensor) -> None:
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def _raise(self, name: str, value: Tensor) -> None:
        seen = self.maxima.get(name)
        self.maxima[name] = value if seen is None else torch.maximum(seen, value)
