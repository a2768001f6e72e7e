"""Philox against Random123's published vectors; normals and uniforms against their definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gardo_kernels import philox4x32, random_bits, random_normal, random_uniform

VECTORS = [  # counter, key, words: kat_vectors of Random123, philox4x32 with 10 rounds
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_known_answers(counter, key, words):
    out = philox4x32(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in out) == words


def test_coordinates_are_the_counter_and_the_key():
    seed, stream, sample_id = 0x299F31D0_A4093822, 0x85A308D3, 0x03707344_13198A2E
    quad = 0x12345
    words = philox4x32(
        (ids(quad), ids(stream), ids(sample_id & 0xFFFFFFFF), ids(sample_id >> 32)),
        (0xA4093822, 0x299F31D0),
    )
    bits = random_bits(seed, ids(sample_id), stream, 4 * (quad + 1))
    assert bits[0, 4 * quad :].tolist() == [int(w) for w in words]


def test_normals_follow_box_muller():
    words = random_bits(7, ids(3), 2, 8)[0].tolist()
    expected = []
    for a, b in zip(words[::2], words[1::2], strict=True):
        radius = math.sqrt(-2 * math.log(((a >> 8) + 1) / 2**24))
        angle = 2 * math.pi * (b >> 8) / 2**24
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    drawn = random_normal(7, ids(3), 2, (2, 4))
    assert drawn.shape == (1, 2, 4) and drawn.dtype == torch.float32
    torch.testing.assert_close(drawn.flatten(), torch.tensor(expected), rtol=1e-7, atol=0)


def test_uniforms_are_the_top_24_bits():
    uniform = random_uniform(1, ids(5, 6), 0, 1001)
    bits = random_bits(1, ids(5, 6), 0, 1001)
    assert uniform.dtype == torch.float32
    assert torch.equal((uniform.double() * 2**24).long(), bits >> 8)


def test_moments():
    z = random_normal(123, torch.arange(8), 1, (20_000,)).double()
    n = z.numel()  # limits: five standard errors of each estimate
    assert abs(z.mean()) < 5 / n**0.5
    assert abs(z.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / n) ** 0.5
    assert abs((z[:, :-1] * z[:, 1:]).mean()) < 5 / n**0.5
    correlation = torch.corrcoef(z) - torch.eye(8)
    assert correlation.abs().max() < 5 / 20_000**0.5
    uniform = random_uniform(123, torch.arange(8), 1, 20_000).double()
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / n) ** 0.5


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**64 - 1),
    sample_ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5),
    stream=st.integers(0, 2**32 - 1),
    count=st.integers(1, 19),
    order=st.randoms(use_true_random=False),
)
def test_a_sample_does_not_depend_on_its_batch(seed, sample_ids, stream, count, order):
    together = random_normal(seed, ids(*sample_ids), stream, (count,))
    alone = [random_normal(seed, ids(i), stream, (count,)) for i in sample_ids]
    assert torch.equal(together, torch.cat(alone))
    index = list(range(len(sample_ids)))
    order.shuffle(index)
    shuffled = random_normal(seed, ids(*sample_ids)[index], stream, (count,))
    assert torch.equal(shuffled, together[index])
    longer = random_normal(seed, ids(*sample_ids), stream, (count + 7,))
    assert torch.equal(longer[:, :count], together)


def test_every_coordinate_matters():
    base = random_bits(1, ids(2), 3, 64)
    others = {
        "seed": random_bits(2, ids(2), 3, 64),
        "seed, high bits": random_bits(1 + 2**32, ids(2), 3, 64),
        "id": random_bits(1, ids(3), 3, 64),
        "id, high bits": random_bits(1, ids(2 + 2**32), 3, 64),
        "stream": random_bits(1, ids(2), 4, 64),
    }
    for name, bits in others.items():
        assert (bits == base).sum() == 0, name
    assert base.unique().numel() == 64


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((-1, ids(0), 0, 4), "seed"),
        ((2**64, ids(0), 0, 4), "seed"),
        ((0, ids(0), 2**32, 4), "stream"),
        ((0, ids(0), -1, 4), "stream"),
        ((0, ids(), 0, 4), "sample_id"),
        ((0, torch.zeros(2), 0, 4), "int64"),
        ((0, torch.zeros(2, 2, dtype=torch.int64), 0, 4), r"\(2, 2\)"),
        ((0, ids(0), 0, 0), "0 elements"),
    ],
)
def test_bad_inputs(arguments, word):
    with pytest.raises(ValueError, match=word):
        random_bits(*arguments)
    with pytest.raises(ValueError, match=word):
        random_uniform(*arguments)
    with pytest.raises(ValueError, match=word):
        random_normal(*arguments[:3], (arguments[3],))


def test_bad_words():
    with pytest.raises(ValueError, match="int64"):
        philox4x32((torch.zeros(1),) * 4, (0, 0))
    with pytest.raises(ValueError, match="key"):
        philox4x32((ids(0),) * 4, (0, 2**32))


# ---- the kernel ----------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there under Triton's interpreter


@pytest.mark.parametrize("seed", [0, 77 + (12345 << 32), 2**64 - 1])
@pytest.mark.parametrize(("stream", "count"), [(0, 1), (1, 3), (2**31, 1024), (2**32 - 1, 1501)])
def test_the_kernel_draws_the_same_words(seed, stream, count):
    sample_id = ids(3, -7, (5 << 32) + 9).to(DEVICE)
    for draw in (random_bits, random_uniform):
        kernel = draw(seed, sample_id, stream, count, backend="triton")
        reference = draw(seed, sample_id, stream, count, backend="torch")
        assert kernel.dtype == reference.dtype and torch.equal(kernel, reference)


@pytest.mark.parametrize("shape", [(1,), (7, 3), (64, 16), (4, 33, 9)])
def test_the_kernels_normals_are_near(shape):
    """fp32 against fp64: 24 bits of a number below 5.77; on a GPU its approximate functions too."""
    sample_id = ids(*range(-2, 3)).to(DEVICE)
    kernel = random_normal(11, sample_id, 5, shape, backend="triton")
    reference = random_normal(11, sample_id, 5, shape, backend="torch")
    assert kernel.shape == reference.shape and kernel.dtype == torch.float32
    bound = 5e-6 if DEVICE == "cuda" else 1e-6
    torch.testing.assert_close(kernel, reference, rtol=0, atol=bound)


def test_the_kernels_normals_hold_at_the_edge():
    """Where u1 is near 1 the radius is near 0: it must not lose its digits."""
    every_id = torch.arange(1024)
    pairs = random_normal(0, every_id, 0, (1024,), backend="torch").unflatten(1, (-1, 2))
    small = pairs.square().sum(-1).sqrt() < 0.02
    sample_id = every_id[small.any(1)][:12]  # so that few programs are drawn
    kernel, reference = (
        random_normal(0, sample_id.to(DEVICE), 0, (1024,), backend=backend).double().cpu()
        for backend in ("triton", "torch")
    )
    radius = reference.unflatten(1, (-1, 2)).square().sum(-1).sqrt()
    small = radius < 0.02
    assert small.sum() >= 12
    error = (kernel - reference).unflatten(1, (-1, 2))[small].abs().amax(-1)
    assert float((error / radius[small]).max()) < 1e-5


def test_a_kernel_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr("gardo_kernels._launch.INTERPRETED", False)
    with pytest.raises(RuntimeError, match="needs tensors on an NVIDIA GPU, these are on cpu"):
        random_bits(0, ids(1), 0, 4, backend="triton")
    with pytest.raises(ValueError, match="backend 'cuda' is unknown"):
        random_bits(0, ids(1), 0, 4, backend="cuda")
