"""What a reward's models take, by their configurations alone: weights, and activations of images.

The models are those that its settings mark with `Holds`; each sees `batch` images on fake tensors,
as in shadow.py. Texts are left out where they have a tower of their own: they are shorter than
pictures, and a prompt is encoded once.
Weights are counted tower by tower, for rewards that run the same ones have one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gardo.planner.live import LiveBytes, forget_fakes, make_fake
from gardo.recipe import reward_plugin
from gardo.rewards.base import Held, Tower, tower_of, weights_dtype
from gardo.settings import config_folder

See = Callable[[Any, Tensor], Tensor]  # a model and images -> what it gives of them
BATCH = 16  # assumed of a reward that has no `batch`


@dataclass(frozen=True)
class Scorer:
    """Bytes of a reward: what stays, and what comes and goes."""

    towers: Mapping[Tower, int]  # of weights; other rewards may have the same ones
    activations: int  # while it scores
    graph: int  # while gradients go through it

    @property
    def weights(self) -> int:
        return sum(self.towers.values())


def own_weights(scorers: Mapping[str, Scorer | None]) -> dict[str, int]:
    """Bytes of weights by reward; a tower of several is counted for the first of them."""
    found: dict[str, int] = {}
    counted: set[Tower] = set()
    for name, of in scorers.items():
        towers = of.towers if of else {}
        found[name] = sum(size for tower, size in towers.items() if tower not in counted)
        counted |= towers.keys()
    return found


def scorer(settings: Any, trained: int = 0) -> Scorer | None:
    """While it scores `batch` images, and while gradients reach `trained` images.

    None where its models are not known: no configuration here, or a library is missing."""
    models = reward_plugin(settings).holds(settings)
    if models is None:
        return None
    judge = getattr(settings, "judge", settings)
    found = [_model(held, judge, trained) for held in models]
    if None in found:
        return None
    known = [model for model in found if model]
    # models of one reward run one after the other
    return Scorer(
        {tower: size for m in known for tower, size in m.towers.items()},
        max((m.activations for m in known), default=0),
        max((m.graph for m in known), default=0),
    )


def _model(held: Held, settings: Any, trained: int) -> Scorer | None:
    folder = config_folder(held.path)
    if folder is None:
        return None
    model_class = getattr(transformers, held.mark.class_name)
    precision = getattr(settings, "dtype", "float32")
    dtype = weights_dtype(precision)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with torch.device("meta"):
            model = model_class(model_class.config_class.from_pretrained(folder)).eval()
    except ImportError:
        return None
    make_fake(model.requires_grad_(False), mode, dtype)
    towers = _towers(model, held, precision)
    vision = getattr(model.config, "vision_config", None)
    side = held.mark.side or (vision.image_size if vision else getattr(settings, "size", None))
    images, see = getattr(settings, "batch", BATCH), held.mark.see or _features
    shape = (3, *2 * [side or model.config.image_size])
    with mode:
        activations = _peak(model, see, (images, *shape), dtype, graph=False)
        graph = _peak(model, see, (trained, *shape), dtype, graph=True) if trained else 0
    forget_fakes(model)
    return Scorer(towers, activations, graph)


def _towers(model: nn.Module, held: Held, precision: str) -> dict[Tower, int]:
    """Bytes of the modules that `frozen` of the rewards shares, and of what is beside them."""
    width = weights_dtype(precision).itemsize
    found = {
        tower_of(held.weights, precision, name, module): width
        * sum(p.numel() for p in module.parameters())
        for name, module in model.named_children()
    }
    beside = sum(p.numel() for p in model.parameters(recurse=False))
    return found | {tower_of(held.weights, precision, "", model): width * beside}


def _features(model: Any, pixels: Tensor) -> Tensor:
    said = getattr(model, "get_image_features", model)(pixel_values=pixels)
    first: Tensor = next(value for value in said.values() if value is not None)
    return first


def _peak(
    model: nn.Module, see: See, shape: tuple[int, ...], dtype: torch.dtype, graph: bool
) -> int:
    with LiveBytes([*model.parameters(), *model.buffers()]) as live, torch.set_grad_enabled(graph):
        pixels = torch.zeros(shape, dtype=dtype, requires_grad=graph)
        said = see(model, pixels)
        if graph:
            said.float().sum().backward()
    return live.peak
