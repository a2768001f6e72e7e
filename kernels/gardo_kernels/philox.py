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

Words and uniforms are the same bits on every device. Normals are computed here in fp64 and rounded
once to fp32, so a kernel that works in fp32 differs from them by its own rounding only (absolute, a
few 2^-24 times the radius).

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants as in
Random123. 32-bit words are held in int64 tensors: their products wrap modulo 2^64, which leaves
both halves right.

Least traffic: the output once. Called by `gardo.rollout` for initial and step noise, by the
algorithms for times.

Shapes: B samples, N elements of a sample, Q = ceil(N / 4) Philox calls for it.
"""

import math

import torch
from torch import Tensor

from gardo_kernels._launch import Backend, choose_backend

_MASK = 0xFFFFFFFF
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


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


def random_bits_ref(seed: int, sample_id_B: Tensor, stream: int, count: int) -> Tensor:
    """[B, count] words from the formula at the top of this file."""
    quads = -(-count // 4)
    quad_Q = torch.arange(quads, device=sample_id_B.device)
    id_B1 = sample_id_B[:, None]
    stream_1 = torch.full((1,), stream, dtype=torch.int64, device=sample_id_B.device)
    words = philox4x32(
        (quad_Q, stream_1, id_B1 & _MASK, (id_B1 >> 32) & _MASK), (seed & _MASK, seed >> 32)
    )
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def random_normal_ref(seed: int, sample_id_B: Tensor, stream: int, count: int) -> Tensor:
    """[B, count] fp32 normals from the formula at the top of this file."""
    pairs = -(-count // 2)
    word_B2 = (random_bits_ref(seed, sample_id_B, stream, 2 * pairs) >> 8).unflatten(1, (pairs, 2))
    u1, u2 = (word_B2.double() * 2.0**-24).unbind(-1)
    radius = torch.sqrt(-2.0 * torch.log(u1 + 2.0**-24))
    angle = 2.0 * math.pi * u2
    normal_B2 = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return normal_B2.flatten(1)[:, :count].float()


def random_bits(
    seed: int, sample_id_B: Tensor, stream: int, count: int, *, backend: Backend = "auto"
) -> Tensor:
    """Random 32-bit words, [B, count] int64 from 0 to 2^32 - 1.

    seed 0 to 2^64 - 1; sample_id_B [B] int64, the global identity of each sample (any value);
    stream 0 to 2^32 - 1 tells the uses of one sample apart (the denoise step, say). The first words
    do not depend on `count`.

    ValueError for values out of these ranges, an empty batch or count below 1.
    """
    _check("random_bits", seed, sample_id_B, stream, count)
    choose_backend("random_bits", backend)
    return random_bits_ref(seed, sample_id_B, stream, count)


def random_uniform(
    seed: int, sample_id_B: Tensor, stream: int, count: int, *, backend: Backend = "auto"
) -> Tensor:
    """Uniforms in [0, 1), [B, count] fp32, multiples of 2^-24; arguments as `random_bits`."""
    _check("random_uniform", seed, sample_id_B, stream, count)
    choose_backend("random_uniform", backend)
    return (random_bits_ref(seed, sample_id_B, stream, count) >> 8).float() * 2.0**-24


def random_normal(
    seed: int,
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
    _check("random_normal", seed, sample_id_B, stream, count)
    choose_backend("random_normal", backend)
    return random_normal_ref(seed, sample_id_B, stream, count).reshape(-1, *shape)


def _check(op: str, seed: int, sample_id_B: Tensor, stream: int, count: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"{op}: seed is {seed}; pass an integer from 0 to 2^64 - 1")
    if not 0 <= stream < 2**32:
        raise ValueError(f"{op}: stream is {stream}; pass an integer from 0 to 2^32 - 1")
    if sample_id_B.ndim != 1 or sample_id_B.numel() == 0 or sample_id_B.dtype != torch.int64:
        raise ValueError(
            f"{op}: sample_id_B has shape {tuple(sample_id_B.shape)} and dtype "
            f"{sample_id_B.dtype}; pass [B] int64, B at least 1"
        )
    if not 1 <= count <= 2**34:
        raise ValueError(f"{op}: {count} elements a sample; pass 1 to 2^34")
