"""FLUX.1-dev without its weights: the engine's policy around random numbers, and what it costs.

The transformer has FLUX.1-dev's shapes and random bf16 values made on the device (24 GB, never on
the host). Everything around it is the built-in tiny pipeline, whose text encoders and VAE are not
called: conditioning is random too. At 128 px its VAE makes what 512 px make with Flux's: 1024
image tokens. `SMALL` is the same code in seconds on a CPU.

Shapes: R rows (sample x step, a sample's steps side by side), X one latent.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from core_ops.machine import Machine, this_machine
from gardo.flow import transitions
from gardo.policies import compiling
from gardo.policies.attention import BACKENDS, missing, use_attention
from gardo.policies.checkpointing import THIN
from gardo.policies.flux import FluxPolicy, FluxSettings
from gardo.policies.quantised import BASES, quantise

from .table import Unavailable

STEPS, TRAINED, NOISE_LEVEL = 6, 4, 0.9  # GARDO's sampler for Flux
RANDOM_B = 0.002  # std of a trained LoRA's B: the adapter adds about 3 % to a layer's output
ATTENTION = tuple(name for name, backend in BACKENDS.items() if backend.backward)


# ---- the model -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    transformer: Mapping[str, Any]  # arguments of FluxTransformer2DModel
    size: tuple[int, int]  # pixels of the tiny VAE
    text_tokens: tuple[int, int]  # the recipes' two
    rank: int  # of LoRA, alpha is twice that; no other size in a block's matmuls
    sampling: tuple[int, ...]  # micro-batches, the first two first
    training: tuple[int, ...]
    compiler: str  # torch.compile's backend


FULL = Shape(
    {
        "num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24,
        "attention_head_dim": 128, "in_channels": 64, "joint_attention_dim": 4096,
        "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
    },
    size=(128, 128), text_tokens=(128, 512), rank=64,
    sampling=(1, 12, 4, 24, 48), training=(3, 6, 12, 1, 2), compiler="inductor",
)  # fmt: skip
SMALL = Shape(
    {
        "num_layers": 2, "num_single_layers": 2, "num_attention_heads": 2,
        "attention_head_dim": 32, "in_channels": 16, "joint_attention_dim": 48,
        "pooled_projection_dim": 24, "guidance_embeds": True, "axes_dims_rope": (8, 12, 12),
    },
    size=(16, 16), text_tokens=(4, 8), rank=5,
    sampling=(1, 3), training=(2, 1), compiler="aot_eager",
)  # fmt: skip


class RandomWeights:
    """In the place of a model's files: values that keep activations finite and of order 1.

    Matrices have variance 1 / fan_in, biases a standard deviation of 0.02, norms are ones.
    """

    def __init__(self, transformer: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self.shapes = {name: p.shape for name, p in transformer.named_parameters()}
        self.draw = torch.Generator(device).manual_seed(0)
        self.like = {"device": device, "dtype": dtype}

    def read(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, **self.like)
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.02
        return torch.randn(shape, generator=self.draw, **self.like).mul_(scale)


def build(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16, base: str = "bf16"
) -> FluxPolicy:
    """The engine's policy with random weights on the device, kept as `model.base` would keep them;
    nothing trains yet."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    settings = FluxSettings(path="builtin:flux", size=shape.size, text_tokens=shape.text_tokens[0])
    policy = FluxPolicy(settings, dtype=dtype, device=device, defer=True)
    with init_empty_weights(include_buffers=False):
        transformer = FluxTransformer2DModel(**shape.transformer)
    transformer.to(dtype).requires_grad_(False).eval()
    policy._base = BASES.get(base)  # not from the settings: the tiny model's rows are too short
    if policy._base:
        quantise(transformer, policy.block_lists, policy._base, dtype)
    policy.pipeline.register_modules(transformer=transformer)
    policy.weight_files = RandomWeights(transformer, device, dtype)
    policy.load_transformer()
    return policy


def add_lora(policy: FluxPolicy, shape: Shape) -> None:
    policy.train_lora(rank=shape.rank, alpha=2 * shape.rank, targets=None, seed=0)


def set_lora_b(policy: FluxPolicy, kind: str) -> None:
    """B of every adapter: `zero`, as training starts, or `random`, the same numbers every time."""
    draw = torch.Generator(policy.device).manual_seed(1)
    for name, parameter in policy.trainable().items():
        if ".lora_B." in name:
            with torch.no_grad():
                parameter.normal_(std=RANDOM_B if kind == "random" else 0.0, generator=draw)


@dataclass(frozen=True)
class Rows:
    """Rows of a rollout: x and u fp32 [R, X], the rest [R]; conditioning has a row a sample."""

    x_RX: Tensor
    u_RX: Tensor
    sigma_R: Tensor
    h_R: Tensor
    B_R: Tensor
    step_R: Tensor
    sample_R: Tensor
    conditioning: Mapping[str, Tensor]

    def velocity(self, policy: FluxPolicy, rows_R: Tensor) -> Tensor:
        told = {n: t[self.sample_R[rows_R]] for n, t in self.conditioning.items()}
        return policy.velocity(self.x_RX[rows_R], self.sigma_R[rows_R], told)


def rows_of(policy: FluxPolicy, samples: int, text_tokens: int) -> Rows:
    """The trained steps of so many samples: latents noised to each step's time, and its noise u.

    The policy takes texts of `text_tokens` from here on.
    """
    device, config = policy.device, policy.transformer.config
    draw = torch.Generator(device).manual_seed(2)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=draw, device=device).to(dtype)

    policy._text_ids = policy._text_ids.new_zeros(text_tokens, 3)
    table = transitions(policy.sigmas(STEPS), "flow", NOISE_LEVEL).to(device)
    step_R = torch.arange(TRAINED, device=device).repeat(samples)
    sample_R = torch.arange(samples, device=device).repeat_interleave(TRAINED)
    image_BX, noise_BX = (normal(samples, *policy.latent_shape) for _ in range(2))
    share = table.rows(step_R, "sigma")[:, None, None]
    z_RX = normal(len(step_R), *policy.latent_shape)
    return Rows(
        x_RX=(1 - share) * image_BX[sample_R] + share * noise_BX[sample_R],
        u_RX=table.rows(step_R, "u_scale")[:, None, None] * z_RX,
        sigma_R=table.rows(step_R, "model_sigma"),
        h_R=table.rows(step_R, "h"),
        B_R=table.rows(step_R, "B"),
        step_R=step_R,
        sample_R=sample_R,
        conditioning={
            "text": normal(samples, text_tokens, config.joint_attention_dim, dtype=policy.dtype),
            "pooled": normal(samples, config.pooled_projection_dim, dtype=policy.dtype),
        },
    )


# ---- how it runs ---------------------------------------------------------------------------------

# Blocks as diffusers and PEFT run them; with the LoRA folded; by our kernels; compiled one by one.
PATHS = (
    "eager", "folded", "kernels", "kernels+folded", "compiled", "compiled+folded",
    "compiled+kernels+folded",
)  # fmt: skip


def set_up(
    policy: FluxPolicy, *, path: str, attention: str, checkpointing: str, compiler: str
) -> None:
    """Which of PATHS the blocks take, an attention backend, what a forward pass keeps."""
    for module in policy.transformer.modules():
        module.__dict__.pop("forward", None)  # a compiled one, or ours; the class has its own
        if hasattr(module, "is_folded"):
            module.__class__ = type(module).__base__
        if hasattr(module, "processor"):
            module.processor.norm_and_turn = None
    policy.transformer.disable_gradient_checkpointing()
    policy.checkpoint_activations(checkpointing)
    choose_attention(policy, attention)
    if "folded" in path:
        policy.fold_lora(checkpointing)
    if "kernels" in path:
        policy.use_block_kernels("auto")
    if "compiled" in path:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiling.BACKEND = compiler
        policy.compile_blocks(checkpointing)


def graphs() -> int:
    """Graphs compiled since the last `set_up` that compiles."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def choose_attention(policy: FluxPolicy, name: str) -> None:
    """Switches the backend, once it has run forward and backward on this device."""
    if lacks := missing(name, policy.device):
        raise Unavailable(f"{name}: {lacks}")
    use_attention(policy.transformer, name)


# ---- what it computes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one sample, two a multiply-add; elementwise work not counted."""

    forward: float
    attention: float  # of the forward pass
    blocks: float  # of the forward pass, attention included
    again: float  # of the blocks: what `matmuls` runs again
    backward: float  # for the weights that train, attention as two forward passes

    def training(self, checkpointing: str) -> tuple[float, float]:
        """(what the model asks for, what runs): with recomputation, in flash attention too.

        A flash backward pass has five matmuls where the forward pass has two.
        """
        again = {
            "none": 0.0, "matmuls": self.again,
            "selective": self.blocks - self.attention, "full": self.blocks,
        }[checkpointing]  # fmt: skip
        model = self.forward + self.backward
        return model, model + again + 0.5 * self.attention


ONCE = re.compile(r"time_text_embed|\.?norm\w*\.linear")  # on a vector a sample
TEXT = re.compile(r"context_embedder|\.add_[qkv]_proj|\.to_add_out|\.ff_context\.")
FIRST = re.compile(r"transformer_blocks\.0\.attn\.(to|add)_[qkv]")  # their input needs no gradient
INPUTS = re.compile(r"(x|context)_embedder$|embedder\.linear_1$")  # their input is the model's


def flops(transformer: nn.Module, image_tokens: int, text_tokens: int, lora: bool = True) -> Flops:
    """Counts from the shapes of the linear layers, and 4 tokens^2 width for attention.

    What trains is what requires a gradient: everything, or a LoRA in the blocks.
    """
    both = image_tokens + text_tokens
    everything = transformer.x_embedder.weight.requires_grad
    forward = blocks = again = backward = 0.0
    for name, layer in transformer.named_modules():
        adapter = ".lora_" in name
        if not isinstance(layer, nn.Linear) or (adapter and not lora):
            continue
        once, within = ONCE.search(name) is not None, "transformer_blocks." in name
        single = name.startswith("single_")
        tokens = both if single else text_tokens if TEXT.search(name) else image_tokens
        work = 2.0 * (1 if once else tokens) * layer.in_features * layer.out_features
        forward += work
        blocks += work * within
        thin = THIN * layer.in_features <= layer.out_features
        again += work * (within and thin)
        needed = not FIRST.match(name) or ".lora_B." in name
        to_input = (within or name == "proj_out") and not once and needed
        if everything:
            to_input = not INPUTS.search(name)
        backward += work * (to_input + layer.weight.requires_grad)
    count = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    attention = 4.0 * both**2 * transformer.inner_dim * count
    backward += 2 * attention
    return Flops(forward + attention, attention, blocks + attention, again, backward)


# ---- between two cases ---------------------------------------------------------------------------


def free(policy: FluxPolicy) -> None:
    """Nothing of a case stays on the device. Raises where the device no longer answers."""
    policy.transformer.zero_grad(set_to_none=True)
    if policy.device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def this_place() -> Machine:
    """The machine, timing single calls from an idle device; a call moves more than an L2 holds."""
    machine = this_machine("auto")
    machine.reps_at_once = 1
    if machine.is_gpu:
        machine.other = None  # a flush is not wanted, and it is memory
    return machine
