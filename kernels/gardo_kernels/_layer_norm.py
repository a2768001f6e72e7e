"""LayerNorm without weights, of a token that one program holds: what the ops with an adaLN share.

Mean and variance are taken of what is in registers, the variance of what is centred. The backward
pass takes them again instead of keeping them.

Shapes: B samples, L tokens, D width.
"""

import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels._block_op import TOKENS, width_of
from gardo_kernels._launch_shape import LaunchShape, launch_shape


@triton.jit
def normalised(x, inside, width, eps):
    """n = (x - mean) / sqrt(variance + eps), 0 outside, and 1 / sqrt(variance + eps)."""
    centred = tl.where(inside, x - tl.sum(x) / width, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred) / width + eps)
    return centred * inverse, inverse


@triton.jit
def normalised_gradient(h, n, inverse, width):
    """dx, with the gradient h of n; both are 0 outside."""
    return inverse * (h - tl.sum(h) / width - n * (tl.sum(h * n) / width))


def default_shape(D: int) -> LaunchShape:
    """A whole token in registers, 8 elements a thread up to D = 4096."""
    block = width_of(D)
    return TOKENS._replace(block=block, warps=min(max(block // 256, 1), 16))


def token_shape(op: str, x_BLD: Tensor) -> LaunchShape:
    """Of the op's launches; the block is what holds a token, whatever the table says."""
    B, L, D = x_BLD.shape
    default = default_shape(D)
    return launch_shape(op, B * L, D, x_BLD.device, default)._replace(block=default.block)
