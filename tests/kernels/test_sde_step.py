"""The affine sampler step: formula, precision, rows at different steps, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gardo_kernels import sde_step


def inputs(rows=3, shape=(4, 5), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, v, z, m = torch.randn(4, rows, *shape, generator=generator, dtype=torch.float64).to(dtype)
    A, B, C, std = torch.randn(4, rows, generator=generator)
    return x, v, z, m, A, B, C, std


def test_golden_step():
    # Flow-SDE, a = .7, s .9 -> .8, sigmas[1] = .96
    out = sde_step(
        torch.tensor([[0.5, -1.0, 0.25, 2.0]]),
        torch.tensor([[0.1, -0.2, 0.3, -0.4]]),
        torch.tensor([[1.0, -1.0, 0.5, 0.0]]),
        A=torch.tensor([0.755]),
        B=torch.tensor([-0.1245]),
        std=torch.tensor([0.66407831]),
    )
    expected = torch.tensor([[1.02912831, -1.39417831, 0.48343916, 1.5598]])
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_fp32_whatever_the_inputs(dtype):
    x, v, z, m, A, B, C, std = inputs(dtype=dtype)
    out = sde_step(x, v, z, A=A, B=B, std=std, C=C, m_prev=m)
    assert out.dtype == torch.float32
    a, b, c, s = (k.double().view(-1, 1, 1) for k in (A, B, C, std))
    expected = a * x.double() + b * v.double() + c * m.double() + s * z.double()
    # four products and three sums of numbers below 20: a few times 2^-24 x 20
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 5), order=st.randoms(use_true_random=False))
def test_rows_do_not_mix(seed, rows, order):
    x, v, z, m, A, B, C, std = inputs(rows=rows, shape=(3,), seed=seed)
    out = sde_step(x, v, z, A=A, B=B, std=std, C=C, m_prev=m)
    index = list(range(rows))
    order.shuffle(index)
    shuffled = sde_step(
        x[index], v[index], z[index], A=A[index], B=B[index], std=std[index],
        C=C[index], m_prev=m[index],
    )  # fmt: skip
    assert torch.equal(shuffled, out[index])


def test_terms_may_be_left_out_where_they_weigh_nothing():
    x, v, z, m, A, B, _, _ = inputs()
    zero = torch.zeros(3)
    without = sde_step(x, v, None, A=A, B=B, std=zero, C=zero)
    assert torch.equal(without, sde_step(x, v, z, A=A, B=B, std=zero, C=zero, m_prev=m))
    assert torch.equal(without, sde_step(x, v, None, A=A, B=B, std=zero))


def test_strided_input():
    x, v, z, _, A, B, _, std = inputs()
    x_strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert not x_strided.is_contiguous()
    expected = sde_step(x, v, z, A=A, B=B, std=std)
    assert torch.equal(sde_step(x_strided, v, z, A=A, B=B, std=std), expected)


def test_gradcheck():
    x, v, z, m, A, B, C, std = inputs(rows=2, shape=(3,), dtype=torch.float64)
    for tensor in (x, v, z, m):
        tensor.requires_grad_()

    def step(x, v, z, m):
        return sde_step(x, v, z, A=A, B=B, std=std, C=C, m_prev=m)

    assert torch.autograd.gradcheck(step, (x, v, z, m))


def test_bad_inputs():
    x, v, z, m, A, B, C, std = inputs()
    good = {"A": A, "B": B, "std": std}
    with pytest.raises(ValueError, match=r"v has shape \(2, 4, 5\)"):
        sde_step(x, v[:2], z, **good)
    with pytest.raises(ValueError, match="z has shape"):
        sde_step(x, v, z[..., :1], **good)
    with pytest.raises(ValueError, match="std has shape"):
        sde_step(x, v, z, A=A, B=B, std=std[:1])
    with pytest.raises(ValueError, match="x has shape"):
        sde_step(x[:0], v[:0], z[:0], A=A[:0], B=B[:0], std=std[:0])
    with pytest.raises(ValueError, match="x has shape"):
        sde_step(x[:, 0, 0], v[:, 0, 0], z[:, 0, 0], **good)
    with pytest.raises(ValueError, match=r"v has dtype torch.int64"):
        sde_step(x, v.long(), z, **good)
    with pytest.raises(ValueError, match="v is on meta but x is on cpu"):
        sde_step(x, v.to("meta"), z, **good)
    with pytest.raises(ValueError, match="z is None but std is"):
        sde_step(x, v, None, **good)
    with pytest.raises(ValueError, match="m_prev is None but C is"):
        sde_step(x, v, z, **good, C=C)
    with pytest.raises(ValueError, match="without C"):
        sde_step(x, v, z, **good, m_prev=m)
    with pytest.raises(RuntimeError, match="not built in this version"):
        sde_step(x, v, z, **good, backend="triton")
