"""DiffusionNFT's loss: golden numbers, gradients, weights, gate, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gardo_kernels import nft_loss, nft_preference
from tests.kernels.row_losses import (
    CASES,
    DEVICE,
    GATES,
    answer,
    both,
    check_gradient,
    check_one_graph,
    check_poisoned,
    check_repeats,
    check_statistics,
    numbers,
)


def golden():
    x0 = torch.tensor([[0.3, -0.7, 1.1, 0.2]])
    noise = torch.tensor([[-0.5, 0.4, 0.9, -1.2]])
    t = torch.tensor([0.6])
    v_old = noise - x0 + torch.tensor([[0.1, -0.1, 0.2, 0.0]])
    v = v_old + torch.tensor([[-0.05, 0.02, -0.1, 0.03]])
    return v, v_old, (1 - t) * x0 + t * noise, x0, t


def preferred(r):
    """The advantage of which r is the preference."""
    return 10 * r - 5


def problem(rows=5, shape=(3, 4), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    v, v_old, x_t, x0, v_ref = torch.randn(
        5, rows, *shape, generator=generator, dtype=torch.float64
    ).to(dtype)
    t, r = torch.rand(2, rows, generator=generator, dtype=torch.float64).to(dtype)
    gate = torch.arange(rows) % 2 == 0
    v_ref[~gate] = torch.nan
    return (v, v_old, x_t, x0, t), {"advantage": preferred(r), "gate": gate, "v_ref": v_ref}


@pytest.mark.parametrize(
    ("advantage", "b", "r", "plus", "minus", "policy"),
    [
        (2.0, 1.0, 0.7, 0.04569231, 0.1278, 0.35162308),
        (-1.0, 0.1, 0.4, 0.08508497, 0.09362571, 4.51047091),
    ],
)
def test_golden(advantage, b, r, plus, minus, policy):
    v, v_old, x_t, x0, t = golden()
    r_R = nft_preference(torch.tensor([advantage]))
    assert r_R.item() == pytest.approx(r, rel=1e-6)
    advantage_R = torch.tensor([advantage])
    out = nft_loss(v, v_old, x_t, x0, t, advantage=advantage_R, b=b, v_ref=0.9 * v_old, beta=0.04)
    assert out.loss_plus_R.item() == pytest.approx(plus, rel=1e-6)
    assert out.loss_minus_R.item() == pytest.approx(minus, rel=1e-6)
    assert out.policy_R.item() == pytest.approx(policy, rel=1e-6)
    assert out.kl_R.item() == pytest.approx(0.012725, rel=1e-6)
    assert out.loss.item() == pytest.approx(policy + 0.04 * 0.012725, rel=1e-6)


def test_preference():
    advantage = torch.tensor([-9.0, -5.0, -1.0, 0.0, 2.5, 5.0, 7.0])
    expected = torch.tensor([0.0, 0.0, 0.4, 0.5, 0.75, 1.0, 1.0])
    torch.testing.assert_close(nft_preference(advantage), expected)
    torch.testing.assert_close(nft_preference(advantage / 5, adv_clip=1.0), expected)
    with pytest.raises(ValueError, match="adv_clip is 0"):
        nft_preference(advantage, adv_clip=0.0)


@pytest.mark.parametrize("b", [1.0, 0.1])
def test_gradient_treats_the_weights_as_constants(b):
    # fp64, by hand: dL+-/dv = 2 (x0+- - x0)(-+ t b) / (N weight+-)
    (v, v_old, x_t, x0, t), options = problem()
    out = nft_loss(v.requires_grad_(), v_old, x_t, x0, t, **options, b=b, beta=0.3)
    (grad,) = torch.autograd.grad(out.loss, v)
    v, t_ = v.detach(), t.view(-1, 1, 1)
    r_R = nft_preference(options["advantage"])
    r_, gate, n = r_R.view(-1, 1, 1), options["gate"], 12
    plus = x_t - t_ * (b * v + (1 - b) * v_old) - x0
    minus = x_t - t_ * ((1 + b) * v_old - b * v) - x0
    weights = [e.abs().mean((1, 2), keepdim=True) for e in (plus, minus)]
    by_hand = 2 * t_ * b / n * (-r_ * plus / weights[0] + (1 - r_) * minus / weights[1])
    by_hand = 5 * by_hand / b / 5
    kl = torch.zeros_like(v)
    kl[gate] = 0.3 / 5 * 2 / n * (v - options["v_ref"])[gate]
    torch.testing.assert_close(grad, by_hand + kl, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(out.weight_plus_R, weights[0].flatten())
    torch.testing.assert_close(out.weight_minus_R, weights[1].flatten())


def test_gradcheck_where_the_floor_holds_the_weights():
    # above the floor the weights are constants for autograd and not for finite differences
    (v, v_old, x_t, x0, t), options = problem(rows=3, shape=(3,))
    v.requires_grad_()

    def loss(v):
        return nft_loss(v, v_old, x_t, x0, t, **options, b=0.5, beta=0.3, floor=100.0).loss

    assert torch.autograd.gradcheck(loss, (v,))


def test_perfect_predictions_meet_the_floor():
    x0, noise = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.5, 0.25])
    x_t = x0 + t[:, None] * (noise - x0)
    v = ((x_t - x0) / t[:, None]).requires_grad_()
    out = nft_loss(v, v.detach().clone(), x_t, x0, t, advantage=torch.zeros(2), b=1.0)
    torch.testing.assert_close(out.weight_plus_R, torch.full((2,), 1e-5))
    assert out.loss.isfinite() and out.loss.item() < 1e-6
    assert torch.autograd.grad(out.loss, v)[0].isfinite().all()


def test_the_kl_is_a_mean_over_all_rows():
    arguments, options = problem()
    plain = nft_loss(*arguments, **options, b=1.0)
    torch.testing.assert_close(plain.loss, plain.policy_R.mean())
    gate = options["gate"]
    expected = (arguments[0] - options["v_ref"])[gate].square().flatten(1).mean(1)
    torch.testing.assert_close(plain.kl_R[gate], expected)
    assert (plain.kl_R[~gate] == 0).all()
    for weight in (True, 5 / 3):  # 5 / 3: a mean over the gated rows
        out = nft_loss(*arguments, **(options | {"gate": gate * weight}), b=1.0, beta=0.5)
        torch.testing.assert_close(out.loss - plain.loss, 0.5 * weight * plain.kl_R.mean())
    nothing = options | {"gate": torch.zeros(5, dtype=torch.bool)}
    everything = {"advantage": options["advantage"], "v_ref": arguments[1]}
    out = nft_loss(*arguments, **nothing, b=1.0, beta=0.5)
    torch.testing.assert_close(out.loss, plain.loss)
    out = nft_loss(*arguments, **everything, b=1.0, beta=0.5)
    torch.testing.assert_close(out.loss - plain.loss, 0.5 * out.kl_R.mean())


def test_policy_scale_and_fp32():
    arguments, options = problem(dtype=torch.bfloat16)
    out = nft_loss(*arguments, **options, b=1.0)
    assert out.loss.dtype == out.policy_R.dtype == torch.float32
    wide = [x.float() for x in arguments]
    again = nft_loss(*wide, **options, b=1.0, policy_scale=1.0)
    torch.testing.assert_close(out.policy_R, 5 * again.policy_R)


def test_only_v_receives_a_gradient():
    arguments, options = problem()
    leaves = [*arguments, options["advantage"], options["v_ref"]]
    for leaf in leaves:
        leaf.requires_grad_()
    out = nft_loss(*arguments, **options, b=1.0, beta=0.5)
    statistics = [x for name, x in vars(out).items() if name != "loss"]
    assert len(statistics) == 6 and not any(x.requires_grad for x in statistics)
    grads = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    assert grads[0].abs().sum() > 0 and all(g is None for g in grads[1:])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 6), order=st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(seed, rows, order):
    arguments, options = problem(rows=rows, seed=seed)
    index = list(range(rows))
    order.shuffle(index)
    out = nft_loss(*arguments, **options, b=0.5, beta=0.3)
    moved = {k: x[index] for k, x in options.items()}
    shuffled = nft_loss(*(x[index] for x in arguments), **moved, b=0.5, beta=0.3)
    torch.testing.assert_close(shuffled.loss, out.loss)
    assert torch.equal(shuffled.policy_R, out.policy_R[index])
    assert torch.equal(shuffled.kl_R, out.kl_R[index])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), b=st.floats(0.05, 1.0))
def test_the_branches_mirror_each_other(seed, b):
    # reflecting v in v_old exchanges the positive and the negative branch
    (v, v_old, x_t, x0, t), options = problem(seed=seed)
    advantage = options["advantage"]
    out = nft_loss(v, v_old, x_t, x0, t, advantage=advantage, b=b)
    mirrored = nft_loss(2 * v_old - v, v_old, x_t, x0, t, advantage=-advantage, b=b)
    torch.testing.assert_close(mirrored.loss, out.loss)
    torch.testing.assert_close(mirrored.loss_plus_R, out.loss_minus_R)


def test_bad_inputs():
    (v, v_old, x_t, x0, t), options = problem()
    good = options | {"b": 1.0}
    with pytest.raises(ValueError, match="x_t has shape"):
        nft_loss(v, v_old, x_t[:, :1], x0, t, **good)
    with pytest.raises(ValueError, match=r"t has shape \(3,\)"):
        nft_loss(v, v_old, x_t, x0, t[:3], **good)
    with pytest.raises(ValueError, match="advantage has shape"):
        nft_loss(v, v_old, x_t, x0, t, **(good | {"advantage": t[:3]}))
    with pytest.raises(ValueError, match="x0 is on meta"):
        nft_loss(v, v_old, x_t, x0.to("meta"), t, **good)
    with pytest.raises(ValueError, match="v has shape"):
        nft_loss(v[:0], v_old[:0], x_t[:0], x0[:0], t[:0], advantage=t[:0], b=1.0)
    for name in ("b", "floor", "adv_clip"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            nft_loss(v, v_old, x_t, x0, t, **(good | {name: 0.0}))
    with pytest.raises(ValueError, match="v_ref is None"):
        nft_loss(v, v_old, x_t, x0, t, advantage=t, b=1.0, beta=0.1)


# ---- the kernels ---------------------------------------------------------------------------------


def of_kernels(**shape):
    """(samples and times, options) with row values in fp32, whatever the dtype of the samples."""
    (*samples, t), options = problem(**shape)
    return (*samples, t.float()), options | {"advantage": options["advantage"].float()}


@CASES
@pytest.mark.parametrize("b", [1.0, 0.1])
def test_kernels_are_the_reference(shape, dtype, b):
    """Sums of fp32 squares in trees: a few 2^-24 of their size."""
    inputs, options = of_kernels(rows=3, shape=shape, dtype=dtype)
    for left_out in ((), ("gate", "v_ref")) if shape == (5, 300) else ((),):
        chosen = {k: x for k, x in options.items() if k not in left_out}
        (ours, grad), (exact, exact_grad) = both(
            nft_loss, inputs, chosen, b=b, beta=0.0 if left_out else 1.5
        )
        check_statistics(ours, exact, 5e-6)
        check_gradient(grad, exact_grad, dtype)


@settings(deadline=None, max_examples=15)
@given(data=st.data(), n=st.sampled_from([1, 7, 130]), rows=st.integers(1, 4),
       seed=st.integers(0, 1000), b=numbers(0.0625, 1), beta=numbers(0, 2), scale=numbers(0.5, 8),
       floor=numbers(2.0**-10, 1))  # fmt: skip
def test_kernels_with_any_coefficients(data, n, rows, seed, b, beta, scale, floor):
    (v, v_old, x_t, x0, _), _ = of_kernels(rows=rows, shape=(n,), dtype=torch.float32, seed=seed)
    lists = {"t": numbers(0, 1), "advantage": numbers(-8, 8), "gate": GATES}
    t, advantage, gate = (
        torch.tensor(data.draw(st.lists(values, min_size=rows, max_size=rows)))
        for values in lists.values()
    )
    v_ref = torch.where(gate[:, None] != 0, -v_old, torch.nan)
    rows_R = {"advantage": advantage, "gate": gate, "v_ref": v_ref}
    (ours, grad), (exact, exact_grad) = both(
        nft_loss, (v, v_old, x_t, x0, t), rows_R, b=b, beta=beta, policy_scale=scale, floor=floor
    )
    check_statistics(ours, exact, 5e-6 * max(1.0, float(exact.policy_R.max())))
    # the gradient's two branches pull against each other: their sizes, not their difference, are
    # what the rounding is relative to
    alone = sum(
        answer(nft_loss, (v, v_old, x_t, x0, t), {"advantage": torch.full((rows,), branch)},
               "torch", widen=True, b=b, policy_scale=scale, floor=floor)[1].norm()
        for branch in (-5.0, 5.0)
    )  # fmt: skip
    assert (grad.double() - exact_grad).norm() <= 1e-5 * (exact_grad.norm() + alone)


def test_kernels_take_each_tensor_in_its_own_dtype():
    (v, v_old, x_t, x0, t), options = of_kernels(shape=(5, 300), dtype=torch.float32)
    inputs = (v, v_old.bfloat16(), x_t, x0.half(), t)
    options["v_ref"] = options["v_ref"].bfloat16()
    (ours, grad), (exact, exact_grad) = both(nft_loss, inputs, options, b=0.5, beta=1.5)
    check_statistics(ours, exact, 5e-6)
    check_gradient(grad, exact_grad, torch.float32)


def test_errors_keep_their_digits_at_small_times():
    """x_t - x0 is t (noise - x0) up to the rounding of x_t, which is the same for both."""
    v_old, noise, x0, step = torch.randn(4, 3, 2048, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0.001, 0.01, 0.1])
    x_t = (1 - t[:, None]) * x0 + t[:, None] * noise
    inputs = (v_old + 0.1 * step, v_old, x_t, x0, t)
    rows = {"advantage": torch.full((3,), 2.0)}
    (ours, grad), (exact, exact_grad) = both(nft_loss, inputs, rows, b=0.1)
    for name, theirs in vars(exact).items():
        torch.testing.assert_close(getattr(ours, name).double(), theirs, rtol=2e-6, atol=0)
    check_gradient(grad, exact_grad, torch.float32)


def test_kernels_copy_what_is_strided_and_repeat_their_bits():
    inputs, options = of_kernels(rows=3, dtype=torch.float32, shape=(33, 70))
    *latents, t = inputs
    strided = (*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in latents), t)
    assert not strided[0].is_contiguous()
    check_repeats(nft_loss, inputs, options, 3, again=strided, b=0.5, beta=1.0)


@pytest.mark.gpu
def test_a_gpu_repeats_its_bits():
    inputs, options = of_kernels(rows=64, dtype=torch.bfloat16, shape=(64, 1024))
    check_repeats(nft_loss, inputs, options, 10, b=0.5, beta=1.0)


def test_kernels_do_not_read_what_they_did_not_write(monkeypatch):
    inputs, options = of_kernels(rows=3, dtype=torch.float32, shape=(5, 1000))
    check_poisoned(monkeypatch, nft_loss, inputs, options, 5e-6, b=0.5, beta=1.0)


def test_opcheck():
    (v, v_old, x_t, x0, t), options = of_kernels(rows=3, dtype=torch.float32, shape=(40,))
    tensors = (v_old, x_t, x0, options["v_ref"].nan_to_num(), t, options["advantage"],
               options["gate"])  # fmt: skip
    rows = [x.float().to(DEVICE) for x in tensors]
    arguments = (v.to(DEVICE).requires_grad_(), *rows, 1.5, 5.0, 5.0, 1e-5, 0.5)
    torch.library.opcheck(torch.ops.gardo.nft_loss.default, arguments)


def test_a_compiler_sees_one_graph():
    inputs, options = of_kernels(dtype=torch.float32, shape=(64, 16))
    check_one_graph(nft_loss, inputs, options, b=0.5, beta=1.0)


def test_kernels_refuse_fp64():
    inputs, options = problem()
    with pytest.raises(ValueError, match="the kernels work in fp32"):
        nft_loss(*inputs, **options, b=1.0, backend="triton")
    assert nft_loss(*inputs, **options, b=1.0, backend="auto").loss.dtype == torch.float64
