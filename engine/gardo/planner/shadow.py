"""A recipe's model on fake tensors, which have shapes and no memory: what its phases cost.

Nothing is derived: the run's own policy is called, with its LoRA and its checkpointing, and every
tensor that comes and goes is counted. Blocks of a kind cost alike, so few of each are run and the
rest is multiplied: a model of 12 B parameters takes seconds.

A model by hub id needs no download where its configuration ships with the package
(published/); of another the configuration alone is read.

Shapes: R rows, B images, X one latent.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from gardo import settings
from gardo.hub import download_error
from gardo.planner.live import CPU_ATTENTION, LiveBytes, make_fake
from gardo.policies.base import Policy
from gardo.policies.quantised import BASES, linears, stored_bytes
from gardo.recipe import Recipe, policy_plugin

KEPT = 2  # blocks of a kind that are run where memory is asked for: the last of them differs
COUNTED = 1  # where FLOPs are
CPU = torch.device("cpu")


def model_folder(path: str, revision: str | None = None) -> Path:
    """A diffusers folder with the configuration of a model, and perhaps nothing else.

    FieldError where a hub id's is neither shipped nor to be had.
    """
    if folder := settings.config_folder(path):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=["*.json"]))
    except Exception as error:  # whatever a hub, a network or a disk can say
        raise download_error(error, "model.path", path, revision, ["*.json"]) from error


class Shadow:
    """The policy of a recipe on fake tensors."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.mode = recipe, FakeTensorMode(allow_non_fake_inputs=True)
        self.folder = model_folder(recipe.model.path, recipe.model.revision)
        dtype = getattr(torch, recipe.distributed.precision)
        plugin: type[Policy] = policy_plugin(recipe.model)
        self.policy = self._policy(plugin, dtype)
        self._lists = {name: getattr(self.policy.transformer, name) for name in plugin.block_lists}
        self.kinds = Counter(map(_kind, self.blocks()))

    def _policy(self, plugin: Any, dtype: torch.dtype) -> Policy:
        import diffusers
        from accelerate import init_empty_weights

        diffusers.utils.logging.set_verbosity_error()  # the page is ours
        transformer_class = getattr(diffusers, plugin.transformer_name)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(
            self.folder / "scheduler"
        )
        with init_empty_weights(include_buffers=True):
            parts = {
                "transformer": _of_config(transformer_class, self.folder / "transformer"),
                "vae": _of_config(diffusers.AutoencoderKL, self.folder / "vae"),
            }
        for part in parts.values():
            part.to(dtype).requires_grad_(False).eval()
        with self.mode:
            policy: Policy = plugin(
                self.recipe.model, dtype=dtype, device=CPU, defer=True,
                parts={**parts, "scheduler": scheduler},
            )  # fmt: skip
        if hasattr(policy.pipeline, "tokenizer_max_length"):
            of_clip = json.loads((self.folder / "text_encoder" / "config.json").read_text())
            policy.pipeline.tokenizer_max_length = of_clip["max_position_embeddings"]
        weights = self.recipe.train.weights
        with init_empty_weights(include_buffers=True):
            if weights.kind == "lora":
                policy.train_lora(
                    rank=weights.rank, alpha=weights.alpha, seed=0, initialise=False,
                    targets=tuple(weights.targets) if weights.targets else None,
                )  # fmt: skip
            else:
                policy.train_full()
        for part in parts.values():
            make_fake(part, self.mode, dtype)
        return policy

    # Sizes ----------------------------------------------------------------------------------------

    def blocks(self) -> list[nn.Module]:
        return self.policy.blocks()

    @cached_property
    def parameters(self) -> int:
        return _elements(self.policy.transformer.parameters())

    @cached_property
    def _linears(self) -> list[nn.Linear]:
        """The layers that a quantised base keeps in few bits."""
        lists = type(self.policy).block_lists
        return [linear for _, linear in linears(self.policy.transformer, lists)]

    def weight_bytes(self, base: str | None, width: int) -> int:
        """Of all weights, the base's as `model.base` keeps them, `width` bytes a number else."""
        whole = self.parameters * width
        if base not in BASES:
            return whole
        return whole + sum(stored_bytes(base, x) - width * x.weight.numel() for x in self._linears)

    @property
    def buffer_bytes(self) -> int:
        """Of what is no parameter: SD3's positions."""
        return sum(buffer.nbytes for buffer in self.policy.transformer.buffers())

    @property
    def largest_linear(self) -> int:
        return max(linear.weight.numel() for linear in self._linears)

    @cached_property
    def trainable(self) -> int:
        return _elements(self.policy.trainable().values())

    @cached_property
    def block_parameters(self) -> list[tuple[int, int]]:
        """Of each block: all of them, and those that train."""
        return [
            (_elements(b.parameters()), _elements(p for p in b.parameters() if p.requires_grad))
            for b in self.blocks()
        ]

    @cached_property
    def vae_parameters(self) -> int:
        return _elements(self.policy.pipeline.vae.parameters())

    @cached_property
    def encoders(self) -> dict[str, tuple[int, int]]:
        """Of each text encoder, by its name in the pipeline: its parameters, and the bytes that
        one prompt needs at its peak."""
        import transformers

        found = {}
        for folder in sorted(self.folder.glob("text_encoder*")):
            of_encoder = transformers.AutoConfig.from_pretrained(folder)
            with torch.device("meta"):
                encoder = getattr(transformers, of_encoder.architectures[0])(of_encoder).eval()
            count = _elements(encoder.parameters())  # before what is tied comes apart
            make_fake(encoder, self.mode, self.policy.dtype)
            tokens = getattr(of_encoder, "max_position_embeddings", None)
            with self.mode, torch.no_grad(), LiveBytes([*encoder.parameters()]) as live:
                ids = torch.zeros(1, tokens or self.recipe.model.text_tokens, dtype=torch.int64)
                encoder(ids)
            found[folder.name] = count, live.peak
        return found

    # Costs ----------------------------------------------------------------------------------------

    def sampling_bytes(self, images: int) -> int:
        """What a forward pass without gradients needs at its peak."""

        def forward() -> None:
            with torch.no_grad():
                self.policy.branches(*self._inputs(images))

        return self._scaled(lambda: self._peak(forward), KEPT)

    def training_bytes(self, rows: int, checkpointing: str) -> int:
        """What forward and backward of a micro-batch need at their peak, gradients left out.

        A parameter's gradient is taken as gone when it is there: sums of it are counted elsewhere.
        """
        transformer = self.policy.transformer
        transformer.disable_gradient_checkpointing()
        self.policy.checkpoint_activations(checkpointing)  # type: ignore[arg-type]
        handles = [
            p.register_post_accumulate_grad_hook(_drop_gradient)
            for p in self.policy.trainable().values()
        ]

        def step() -> None:
            velocity = self.policy.velocity(*self._inputs(rows))
            velocity.float().square().mean().backward()

        try:
            return self._scaled(lambda: self._peak(step), KEPT)
        finally:
            for handle in handles:
                handle.remove()
            transformer.disable_gradient_checkpointing()

    def decoding_bytes(self, images: int, graph: bool = False) -> int:
        """What decoding so many images at once needs at its peak; `graph`: and back to latents."""

        def decode() -> None:
            with torch.set_grad_enabled(graph):
                pictures = self.policy._decode(self._latents(images).requires_grad_(graph))
            if graph:
                pictures.square().mean().backward()

        return self._peak(decode)

    def flops(self, *, backward: bool) -> int:
        """Of a row: a forward pass, or forward and backward without anything run again."""

        def count() -> int:
            counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
            with self.mode, counter:
                with torch.set_grad_enabled(backward):
                    velocity = self.policy.velocity(*self._inputs(1))
                if backward:
                    velocity.float().sum().backward()
            for p in self.policy.trainable().values():
                p.grad = None
            return int(counter.get_total_flops())

        return self._scaled(count, COUNTED)

    def _inputs(self, rows: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        shapes = self.policy.conditioning_shapes()
        text = {n: torch.empty(rows, *s, dtype=self.policy.dtype) for n, s in shapes.items()}
        return self._latents(rows), torch.full((rows,), 0.5), text

    def _latents(self, rows: int) -> Tensor:
        return torch.empty(rows, *self.policy.latent_shape)

    def _peak(self, call: Callable[[], None]) -> int:
        modules = (self.policy.transformer, self.policy.pipeline.vae)
        known = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        with self.mode, LiveBytes(known) as live:
            call()
        return live.peak

    def _scaled(self, cost: Callable[[], int], blocks: int) -> int:
        """The cost at full depth: that of so many blocks of a kind, and more as one is.

        Whatever is counted grows by as much with every block of a kind.
        """
        kept = {kind: min(number, blocks) for kind, number in self.kinds.items()}
        with self._depth(kept):
            least = cost()
        total = least
        for kind, number in self.kinds.items():
            if number > blocks:
                with self._depth({**kept, kind: blocks + 1}):
                    total += (number - blocks) * (cost() - least)
        return total

    @contextmanager
    def _depth(self, kept: dict[Any, int]) -> Iterator[None]:
        """So many blocks of each kind, in their order."""
        left = Counter(kept)
        for name, blocks in self._lists.items():
            chosen = []
            for block in blocks:
                if left[_kind(block)]:
                    left[_kind(block)] -= 1
                    chosen.append(block)
            setattr(self.policy.transformer, name, nn.ModuleList(chosen))
        try:
            yield
        finally:
            for name, blocks in self._lists.items():
                setattr(self.policy.transformer, name, blocks)


def _of_config(model_class: Any, folder: Path) -> nn.Module:
    module: nn.Module = model_class.from_config(model_class.load_config(folder))
    return module


def _kind(block: nn.Module) -> tuple[Any, ...]:
    return type(block).__name__, *((n, tuple(p.shape)) for n, p in block.named_parameters())


def _elements(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
