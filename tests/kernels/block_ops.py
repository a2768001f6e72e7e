"""What the tests of the transformer block's ops share: inputs, the calls, what diffusers does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from torch import Tensor
from torch.nn import functional as F

from gardo_kernels import Backend
from gardo_kernels.adaln_modulate import adaln_modulate
from gardo_kernels.gated_residual import gated_residual
from gardo_kernels.gelu import gelu
from gardo_kernels.qk_norm_rope import qk_norm_rope
from gardo_kernels.residual_adaln import residual_adaln
from tests.kernels.row_losses import DEVICE

EPS = 1e-6
Given = dict[str, Tensor]
Call = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Op:
    """An op, its inputs of a shape, what diffusers' blocks do in its place, and what is trained."""

    call: Call
    inputs: Callable[..., Given]
    eager: Call
    trained: tuple[str, ...]
    frozen: tuple[str, ...]  # of `trained`, what still gets a gradient under LoRA
    shapes: tuple[tuple[int, ...], ...]
    results: tuple[str, ...] = ("out",)
    reread: Callable[[Given], Call] | None = None  # the formula, of a result as it was stored


def draws(seed: int = 0) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def of_tokens(B: int, L: int, D: int) -> Given:
    """An offset of the mean, so that a variance of squares alone would lose digits; the modulation
    is a part of a wider tensor, as `chunk` gives it."""
    randn = draws()
    shift, scale = randn(B, 6 * D).chunk(6, 1)[1:3]
    return {"x": 3 + 2 * randn(B, L, D), "scale": scale, "shift": shift}


def of_residual(B: int, L: int, D: int) -> Given:
    randn = draws()
    x, y = randn(2, B, L, D).unbind()
    return {"x": x, "y": y, "gate": randn(B, 6 * D).chunk(6, 1)[2]}


def of_both(B: int, L: int, D: int) -> Given:
    """A stream with an offset, as `of_tokens` has it."""
    norm = of_tokens(B, L, D)
    return of_residual(B, L, D) | {"x": norm.pop("x")} | norm


def of_projection(B: int, L: int, N: int, D: int = 0) -> Given:
    randn = draws()
    x = 3 * randn(B, L, N)
    return {"x": x, "before": randn(B, L, D)} if D else {"x": x}


def of_heads(B: int, L: int, H: int, E: int, rope: bool = True) -> Given:
    """Tables that are not equal within a pair, which Flux's are: both columns are read."""
    randn = draws()
    given = {"x": 2 * randn(B, L, H, E), "weight": 1 + randn(E) / 4}
    angle = randn(L, E)
    return given | ({"cos": angle.cos(), "sin": angle.sin()} if rope else {})


def eager_adaln(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """AdaLayerNormZero, and `norm2` of the blocks."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def eager_both(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor]:
    """The residual behind an attention, and `norm2` behind it."""
    z = x + gate[:, None] * y
    return z, eager_adaln(z, scale, shift)


def both_of_stored(found: Given) -> Call:
    """The norm is of z as it is stored, which is rounded; gradients pass that by."""

    def call(
        x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, backend: Backend
    ) -> tuple[Tensor, Tensor]:
        z = gated_residual(x, y, gate, backend=backend)
        stored = z + (found["z"].to(z.dtype) - z).detach()
        return z, adaln_modulate(stored, scale, shift, backend=backend)

    return call


def eager_gelu(x: Tensor, before: Tensor | None = None) -> Tensor:
    """`act_mlp` and the concatenation of FluxSingleTransformerBlock."""
    y = F.gelu(x, approximate="tanh")
    return y if before is None else torch.cat([before, y], dim=2)


def eager_heads(
    x: Tensor, weight: Tensor, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """FluxAttnProcessor with torch's RMSNorm; SD3's with that of diffusers, on heads first."""
    if cos is not None:
        y = F.rms_norm(x, x.shape[-1:], weight, EPS)
        return apply_rotary_emb(y, (cos, sin), sequence_dim=1)
    norm = RMSNorm(x.shape[-1], eps=EPS).to(x.device)
    return torch.func.functional_call(norm, {"weight": weight}, x.transpose(1, 2)).transpose(1, 2)


TOKENS = ((2, 5, 24), (1, 17, 1536), (2, 3, 3072), (3, 35, 7), (1, 1, 1))
OPS = {
    "adaln_modulate": Op(
        adaln_modulate, of_tokens, eager_adaln, ("x", "scale", "shift"), ("x",), TOKENS
    ),
    "gated_residual": Op(
        gated_residual, of_residual, lambda x, y, gate: x + gate[:, None] * y, ("x", "y", "gate"),
        ("x", "y"), TOKENS,
    ),
    "residual_adaln": Op(
        residual_adaln, of_both, eager_both, ("x", "y", "gate", "scale", "shift"), ("x", "y"),
        (*TOKENS[:-1], (1, 1, 2)), ("z", "m"), both_of_stored,  # of one element eager's n is not 0
    ),
    "gelu": Op(
        gelu, of_projection, eager_gelu, ("x", "before"), ("x",),
        ((2, 5, 24), (1, 3, 1030), (2, 5, 1030, 24), (1, 2, 4096, 1024), (3, 4, 5, 1021)),
    ),
    "qk_norm_rope": Op(
        qk_norm_rope, of_heads, eager_heads, ("x", "weight"), ("x",),
        ((1, 18, 24, 128), (2, 9, 38, 64), (2, 9, 3, 64, False), (2, 5, 3, 6), (1, 1, 1, 2)),
    ),
}  # fmt: skip


def given(name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Given:
    """The inputs in the dtype; the tables in fp32, as diffusers makes them."""
    return {
        key: x.to(DEVICE, torch.float32 if key in ("cos", "sin") else dtype)
        for key, x in OPS[name].inputs(*shape).items()
    }


def in_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else out


def answer(
    name: str, inputs: Given, call: Call | None = None, trained: Sequence[str] | None = None,
    used: Sequence[str] | None = None, **options: Any,
) -> Given:  # fmt: skip
    """The results, and the gradients to what is trained of a sum of those that are used, weighed by
    numbers of any dtype."""
    op = OPS[name]
    wanted = [key for key in (op.trained if trained is None else trained) if key in inputs]
    taken = {key: x.detach() for key, x in inputs.items()}
    leaves = [taken[key].requires_grad_() for key in wanted]
    results = dict(zip(op.results, in_tuple((call or op.call)(**taken, **options)), strict=True))
    summed = [out for key, out in results.items() if used is None or key in used]
    draw = draws(1)
    weights = [draw(*out.shape).bfloat16().to(out.device, out.dtype) for out in summed]
    grads = torch.autograd.grad(summed, leaves, weights) if leaves else ()
    found = {key: out.detach() for key, out in results.items()}
    return found | dict(zip(wanted, grads, strict=True))


def exact(name: str, inputs: Given, found: Given | None = None, **asked: Any) -> Given:
    """The reference in fp64, on the same numbers; where an answer is given, on what it stored."""
    reread = OPS[name].reread
    call = None if reread is None or found is None else reread(found)
    wide = {key: x.double() for key, x in inputs.items()}
    return answer(name, wide, call, backend="torch", **asked)
