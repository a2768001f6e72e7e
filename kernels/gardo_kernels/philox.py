"""Counter-based random numbers: Philox4x32-10, and uniforms and normals made of it.

A number is a function of (seed, sample id, stream, element) and of nothing else: not of the batch
it is drawn in, nor of the rank, nor of what was drawn before. One Philox call gives four 32-bit
words, for four successive elements:

    key     = (low, high 32 bits of seed)
    counter = (element // 4, stream, low, high 32 bits of sample_id)
    words   = Philox4x32-10(counter, key)         word element % 4 belongs to the element

    uniform = (word >> 8) 2^-24                   in [0, 1), exact in fp32
    normal  = Box-Muller of the words (0, 1) and of (2, 3):
              u1 = ((word_a >> 8) + 1) 2^-24      in (0, 1], so |normal| < 5.77
              u2 =  (word_b >> 8)      2^-24      in [0, 1)
              radius = sqrt(-2 log u1), normals = radius cos(2 pi u2), radius sin(2 pi u2)

Words and uniforms are the same bits on every device. The reference computes normals in fp64 and
rounds once. The kernel works in fp32 with the GPU's approximate logarithm, sine and cosine, whose
absolute errors (PTX: 2^-20.5 for sine and cosine within [-pi, pi]) stay below 5e-6 for a normal;
near u1 = 1, where an approximate logarithm loses all digits, it uses the series of -log(1 - t),
t = 1 - u1 being exact.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants as in
Random123. 32-bit words are held in int64 tensors: their products wrap modulo 2^64, which leaves
both halves right.

Least traffic: the output once. Called by `gardo.rollout` for initial and step noise, by the
algorithms for times.

Shapes: B samples, N elements of a sample, Q = ceil(N / 4) Philox calls for it.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels._examples import Examples, On
from gardo_kernels._launch import (
    INTERPRETED,
    Backend,
    block_and_row,
    choose_backend,
    grid_of_rows,
    launch,
)
from gardo_kernels._launch_shape import launch_shape

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]
Seed = int | Tensor  # an integer from 0 to 2^64 - 1, or what `seed_tensor` made of it


def seed_tensor(seed: Seed, device: torch.device | str) -> Tensor:
    """The seed as kernels read it: [1] int64 on the device, its 64 bits.

    A captured CUDA graph draws anew when this tensor is written. ValueError for an integer outside
    0 to 2^64 - 1, or a tensor that is not [1] int64 on the device.
    """
    if isinstance(seed, Tensor):
        if tuple(seed.shape) != (1,) or seed.dtype != torch.int64:
            raise ValueError(
                f"seed has shape {tuple(seed.shape)} and dtype {seed.dtype}; pass [1] int64"
            )
        if seed.device.type != torch.device(device).type:
            raise ValueError(f"seed is on {seed.device} but the samples are on {device}; move it")
        return seed
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; pass an integer from 0 to 2^64 - 1")
    return torch.tensor([seed - (1 << 64) if seed >= 1 << 63 else seed], device=device)


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10: four words and a key of two words -> four words.

    counter: int64 tensors that hold uint32 and broadcast; key: integers. Returns like counter.

    ValueError where there are not four words, a word is not int64, or a key does not fit 32 bits.
    """
    if len(counter) != 4 or any(word.dtype != torch.int64 for word in counter):
        raise ValueError("philox4x32: counter must be four int64 tensors that hold 32-bit words")
    if any(not 0 <= k <= _MASK for k in key):
        raise ValueError(f"philox4x32: key is {key}; pass two integers from 0 to 2^32 - 1")
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIER[0], c2 * _MULTIPLIER[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_bits_ref(seed: Seed, sample_id_B: Tensor, stream: int | Tensor, count: int) -> Tensor:
    """[B, count] words from the formula at the top of this file; a stream for all, or [B] int64."""
    quads = -(-count // 4)
    device = sample_id_B.device
    quad_Q = torch.arange(quads, device=device)
    id_B1 = sample_id_B[:, None]
    stream_B1 = torch.as_tensor(stream, dtype=torch.int64, device=device).view(-1, 1)
    key = int(seed_tensor(seed, device)) & (1 << 64) - 1
    words = philox4x32(
        (quad_Q, stream_B1, id_B1 & _MASK, (id_B1 >> 32) & _MASK), (key & _MASK, key >> 32)
    )
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def random_normal_ref(seed: Seed, sample_id_B: Tensor, stream: int | Tensor, count: int) -> Tensor:
    """[B, count] fp32 normals from the formula at the top of this file; stream as there."""
    pairs = -(-count // 2)
    word_B2 = (random_bits_ref(seed, sample_id_B, stream, 2 * pairs) >> 8).unflatten(1, (pairs, 2))
    u1, u2 = (word_B2.double() * 2.0**-24).unbind(-1)
    radius = torch.sqrt(-2.0 * torch.log(u1 + 2.0**-24))
    angle = 2.0 * math.pi * u2
    normal_B2 = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return normal_B2.flatten(1)[:, :count].float()


# ---- kernels -------------------------------------------------------------------------------------

BITS, UNIFORM, NORMAL = (tl.constexpr(kind) for kind in range(3))
_UNIT = tl.constexpr(2.0**-24)
_TAU = tl.constexpr(2.0 * math.pi)
_MINUS_2_LN_2 = tl.constexpr(-2.0 * math.log(2.0))


@triton.jit
def philox_words(quad, stream, id_low, id_high, seed_low, seed_high):
    """The four words of each quad of elements, uint32; scalars are spread over the quads."""
    zero = tl.zeros_like(quad)
    return tl.philox_impl(
        quad, zero + stream, zero + id_low, zero + id_high, seed_low, seed_high, 10
    )


@triton.jit
def _fraction(word):
    """The word's top 24 bits as a fraction in [0, 1), exact."""
    return (word >> 8).to(tl.int32).to(tl.float32) * _UNIT


@triton.jit
def _approximate(FUNCTION: tl.constexpr, x):
    """PTX's approximate lg2, sin or cos of fp32."""
    return tl.inline_asm_elementwise(
        FUNCTION + ".approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def normal_pair(word_a, word_b, FAST: tl.constexpr):
    """Box-Muller of two words: two fp32 normals."""
    t = 1.0 - _UNIT - _fraction(word_a)  # 1 - u1, exact
    series = t * (1.0 + t * (0.5 + t * (1.0 / 3 + t * (0.25 + t * 0.2))))
    angle = (_fraction(word_b) - 0.5) * _TAU  # 2 pi u2 - pi, within [-pi, pi)
    if FAST:
        log2 = _approximate("lg2", 1.0 - t)
        sine, cosine = _approximate("sin", angle), _approximate("cos", angle)
    else:
        log2, sine, cosine = tl.log2(1.0 - t), tl.sin(angle), tl.cos(angle)
    radius = tl.sqrt(tl.where(t < 0.0625, 2.0 * series, log2 * _MINUS_2_LN_2))
    return -radius * cosine, -radius * sine


@triton.jit
def halves(value):
    """The 32-bit halves of a 64-bit integer, as uint32."""
    bits = value.to(tl.uint64)
    return (bits & 0xFFFFFFFF).to(tl.uint32), (bits >> 32).to(tl.uint32)


@triton.jit
def interleave(a, b, c, d, COUNT: tl.constexpr):
    """a0 b0 c0 d0 a1 b1 ...: [COUNT] of four times [COUNT / 4]."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(COUNT)


@triton.jit(do_not_specialize=["stream"])
def _random_kernel(
    out_ptr, seed_ptr, id_ptr, stream, count, KIND: tl.constexpr, FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row, :count], BLOCK elements of a row in each program."""
    block, row = block_and_row(count, BLOCK)
    seed_low, seed_high = halves(tl.load(seed_ptr))
    id_low, id_high = halves(tl.load(id_ptr + row))
    quads = tl.arange(0, BLOCK // 4)
    quad = (block.to(tl.int64) * (BLOCK // 4) + quads).to(tl.uint32)
    a, b, c, d = philox_words(quad, stream.to(tl.uint32), id_low, id_high, seed_low, seed_high)
    if KIND == BITS:
        values = interleave(a, b, c, d, BLOCK).to(tl.int64)
    elif KIND == UNIFORM:
        values = _fraction(interleave(a, b, c, d, BLOCK))
    else:
        n0, n1 = normal_pair(a, b, FAST)
        n2, n3 = normal_pair(c, d, FAST)
        values = interleave(n0, n1, n2, n3, BLOCK)
    element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + row * count + element, values, mask=element < count)


def _random(kind: tl.constexpr, seed: Seed, sample_id_B: Tensor, stream: int, count: int) -> Tensor:
    """[B, count] from the kernel: int64 for BITS, else fp32."""
    B, device = len(sample_id_B), sample_id_B.device
    shape = launch_shape("philox", B, count, device)
    dtype = torch.int64 if kind is BITS else torch.float32
    out = torch.empty(B, count, dtype=dtype, device=device)
    launch(
        _random_kernel, grid_of_rows(B, count, shape.block), shape, out_ptr=out,
        seed_ptr=seed_tensor(seed, device), id_ptr=sample_id_B.contiguous(), stream=stream,
        count=count, KIND=kind, FAST=not INTERPRETED, BLOCK=shape.block,
    )  # fmt: skip
    return out


# ---- ops -----------------------------------------------------------------------------------------


def random_bits(
    seed: Seed, sample_id_B: Tensor, stream: int, count: int, *, backend: Backend = "auto"
) -> Tensor:
    """Random 32-bit words, [B, count] int64 from 0 to 2^32 - 1.

    seed 0 to 2^64 - 1, or its `seed_tensor`; sample_id_B [B] int64, the global identity of each
    sample (any value); stream 0 to 2^32 - 1 tells the uses of one sample apart (the denoise step,
    say). The first words do not depend on `count`.

    ValueError for values out of these ranges, an empty batch or count below 1.
    """
    _check("random_bits", sample_id_B, stream, count)
    if choose_backend("random_bits", backend, sample_id_B) == "triton":
        return _random(BITS, seed, sample_id_B, stream, count)
    return random_bits_ref(seed, sample_id_B, stream, count)


def random_uniform(
    seed: Seed, sample_id_B: Tensor, stream: int, count: int, *, backend: Backend = "auto"
) -> Tensor:
    """Uniforms in [0, 1), [B, count] fp32, multiples of 2^-24; arguments as `random_bits`."""
    _check("random_uniform", sample_id_B, stream, count)
    if choose_backend("random_uniform", backend, sample_id_B) == "triton":
        return _random(UNIFORM, seed, sample_id_B, stream, count)
    return (random_bits_ref(seed, sample_id_B, stream, count) >> 8).float() * 2.0**-24


def random_normal(
    seed: Seed,
    sample_id_B: Tensor,
    stream: int,
    shape: tuple[int, ...],
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Standard normals, [B, *shape] fp32, elements in row-major order.

    Other arguments and errors as `random_bits`; a shape without elements is a count below 1.
    """
    count = math.prod(shape)
    _check("random_normal", sample_id_B, stream, count)
    if choose_backend("random_normal", backend, sample_id_B) == "triton":
        return _random(NORMAL, seed, sample_id_B, stream, count).view(-1, *shape)
    return random_normal_ref(seed, sample_id_B, stream, count).reshape(-1, *shape)


def _check(op: str, sample_id_B: Tensor, stream: int, count: int) -> None:
    if not 0 <= stream < 2**32:
        raise ValueError(f"{op}: stream is {stream}; pass an integer from 0 to 2^32 - 1")
    check_ids(op, sample_id_B)
    if not 1 <= count <= 2**34:
        raise ValueError(f"{op}: {count} elements a sample; pass 1 to 2^34")


def check_ids(op: str, sample_id: Tensor) -> None:
    """sample_id must be [B] int64, B at least 1."""
    if sample_id.ndim != 1 or sample_id.numel() == 0 or sample_id.dtype != torch.int64:
        raise ValueError(
            f"{op}: sample_id has shape {tuple(sample_id.shape)} and dtype {sample_id.dtype}; pass "
            "[B] int64, B at least 1"
        )


def examples(on: On) -> Examples:
    """The three kinds; see `_examples.py`."""
    ids, count = on.row_index(), on.elements
    yield "bits", [random_bits(1, ids, 3, count, backend=on.backend)]
    yield "uniform", [random_uniform(1, ids, 3, count, backend=on.backend)]
    yield "normal", [random_normal(1, ids, 3, (count,), backend=on.backend)]
