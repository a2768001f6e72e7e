"""AWM's loss: its likelihoods in fp64, ratios without cancellation, gradients, gate and EMA."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gardo_kernels import awm_loss
from tests.kernels.row_losses import (
    DEVICE,
    GATES,
    SHAPES_AND_DTYPES,
    both,
    check_gradient,
    check_one_graph,
    check_poisoned,
    check_repeats,
    check_statistics,
    numbers,
    on_device,
)

LOG_P = {  # as AWM writes them, of the error l, the time t, the power p
    "uniform": lambda l, t, p: -l,
    "t": lambda l, t, p: -l * t,
    "t2": lambda l, t, p: -l * t**2,
    "huber": lambda l, t, p: -((l + 1e-10).sqrt() - 1e-5) * t,
    "ghuber": lambda l, t, p: -((l + 1e-10) ** p - 1e-10**p) * t / p,
}
CLIP = {"clip_low": 0.2, "clip_high": 0.1}


def problem(rows=5, shape=(3, 4), dtype=torch.float64, size=0.3, seed=0):
    """Every other row gated, NaN where no reference ran; the target stays in fp32 at least."""
    generator = torch.Generator().manual_seed(seed)
    v, v_old, target, v_ref, v_ema = torch.randn(
        5, rows, *shape, generator=generator, dtype=torch.float64
    )
    v = v_old + size * v
    advantage, t = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    gate = torch.arange(rows) % 2 == 0
    v_ref[~gate] = torch.nan
    wide = torch.promote_types(dtype, torch.float32)
    options = {"advantage": 2 * advantage.to(wide), "t": t.sigmoid().to(wide), "gate": gate,
               "v_ref": v_ref.to(dtype), "v_ema": v_ema.to(dtype)}  # fmt: skip
    return (v.to(dtype), v_old.to(dtype), target.to(wide)), options


def errors(v, v_old, target):
    return ((x - target).square().flatten(1).mean(1) for x in (v, v_old))


@pytest.mark.parametrize("size", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("power", [0.25, 0.7, 1.5])
@pytest.mark.parametrize("transform", LOG_P)
def test_ratio_is_that_of_the_likelihoods(transform, power, size):
    inputs, options = problem(size=size)
    out = awm_loss(*inputs, **options, transform=transform, power=power)
    new, old = (LOG_P[transform](l, options["t"], power) for l in errors(*inputs))
    # fp64 keeps 1e-16 of likelihoods of order 1 to 100
    torch.testing.assert_close(out.log_ratio_R, new - old, rtol=1e-9, atol=1e-13)
    advantage = options["advantage"].clamp(-5, 5)
    torch.testing.assert_close(out.ratio_R, (new - old).exp())
    clamped = out.ratio_R.clamp(0, 2)
    policy = torch.maximum(-advantage * out.ratio_R, -advantage * clamped)
    torch.testing.assert_close(out.loss_R, policy)
    torch.testing.assert_close(out.loss, policy.mean())


@pytest.mark.parametrize("transform", LOG_P)
def test_first_update_is_advantage_weighted_matching(transform):
    (v, _, target), options = problem()
    rows = {k: options[k] for k in ("advantage", "t")}
    v.requires_grad_()
    out = awm_loss(v, v.detach(), target, **rows, transform=transform)
    assert torch.equal(out.ratio_R, torch.ones_like(out.ratio_R))
    (grad,) = torch.autograd.grad(out.loss, v)
    l = (v - target).square().flatten(1).mean(1)
    matching = -(rows["advantage"].clamp(-5, 5) * LOG_P[transform](l, rows["t"], 0.25)).mean()
    torch.testing.assert_close(grad, *torch.autograd.grad(matching, v), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("transform", LOG_P)
@pytest.mark.parametrize("size", [0.05, 1.0])
def test_gradcheck(transform, size):
    (v, v_old, target), options = problem(rows=4, shape=(3,), size=size)
    v.requires_grad_()

    def loss(v):
        return awm_loss(v, v_old, target, **options, **CLIP, transform=transform, beta=0.7,
                        ema_beta=0.4).loss  # fmt: skip

    assert torch.autograd.gradcheck(loss, (v,))


def test_clip_by_hand():
    # one element, v_old = 0: log ratio = 2 target v - v^2 in the uniform transform
    v = torch.tensor([[0.3], [0.3], [0.3], [0.3]], requires_grad=True)
    target = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    advantage = torch.tensor([2.0, -2.0, 2.0, -20.0])
    ones = torch.ones(4)
    out = awm_loss(v, torch.zeros(4, 1), target, advantage=advantage, t=ones, **CLIP)
    up, down = torch.tensor([0.51, -0.69]).exp().tolist()
    expected = torch.tensor([-2 * 1.1, 2 * up, -2 * down, 5 * 0.8])  # A clamped to -5
    torch.testing.assert_close(out.loss_R, expected)
    assert out.clipped_high_R.tolist() == [True, False, False, False]
    assert out.clipped_low_R.tolist() == [False, False, False, True]
    out.loss.backward()
    assert (v.grad[:, 0] == 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_narrow_clips_are_decided_to_a_thousandth_of_them(backend):
    """As in the policy loss: with v = 1, v_old = 0 and a target of 1 or 0 the log-ratio is +-t."""
    t = torch.tensor([9.995e-6, 1.0005e-5, 9.995e-6, 1.0005e-5])
    v, target = torch.ones(4, 1), torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    v, target, t, advantage = on_device(v, target, t, advantage)
    out = awm_loss(
        v, 0 * v, target, advantage=advantage, t=t, transform="t", clip_low=1e-5, clip_high=1e-5,
        backend=backend,
    )  # fmt: skip
    assert out.clipped_high_R.tolist() == [False, True, False, False]
    assert out.clipped_low_R.tolist() == [False, False, False, True]


def test_penalties():
    inputs, options = problem()
    plain = awm_loss(*inputs, **options)
    torch.testing.assert_close(plain.loss, plain.loss_R.mean())  # reported, not penalised
    gate = options["gate"]
    kl = (inputs[0] - options["v_ref"])[gate].square().flatten(1).mean(1)
    ema = (inputs[0] - options["v_ema"]).square().flatten(1).mean(1)
    torch.testing.assert_close(plain.kl_R[gate], kl)
    assert (plain.kl_R[~gate] == 0).all()
    torch.testing.assert_close(plain.ema_R, ema)
    for weight in (True, 5 / 3):  # 5 / 3: a mean over the gated rows
        weighed = options | {"gate": gate * weight}
        out = awm_loss(*inputs, **weighed, beta=0.5, ema_beta=0.25)
        penalty = 0.5 * weight * kl.sum() / 5 + 0.25 * ema.mean()
        torch.testing.assert_close(out.loss - plain.loss, penalty)
    without = awm_loss(*inputs, **(options | {"v_ema": None, "v_ref": None}), beta=0.5)
    torch.testing.assert_close(without.loss, plain.loss)
    assert (without.ema_R == 0).all() and (without.kl_R == 0).all()


def test_only_v_receives_a_gradient():
    inputs, options = problem()
    leaves = [*inputs, options["advantage"], options["t"], options["v_ref"], options["v_ema"]]
    for leaf in leaves:
        leaf.requires_grad_()
    out = awm_loss(*inputs, **options, transform="ghuber", beta=0.5, ema_beta=0.5)
    assert not any(x.requires_grad for name, x in vars(out).items() if name != "loss")
    grads = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    assert grads[0].abs().sum() > 0 and all(g is None for g in grads[1:])


def test_bad_inputs():
    (v, v_old, target), options = problem()
    good = {"advantage": options["advantage"], "t": options["t"]}
    with pytest.raises(ValueError, match=r"target has shape \(4, 3, 4\) but v has \(5, 3, 4\)"):
        awm_loss(v, v_old, target[:4], **good)
    with pytest.raises(ValueError, match=r"t has shape \(3,\)"):
        awm_loss(v, v_old, target, **(good | {"t": options["t"][:3]}))
    with pytest.raises(ValueError, match="v_ema is on meta"):
        awm_loss(v, v_old, target, **good, v_ema=v.to("meta"))
    with pytest.raises(ValueError, match="transform 'log' is unknown; choose uniform, t, t2"):
        awm_loss(v, v_old, target, **good, transform="log")
    with pytest.raises(ValueError, match="power is 0"):
        awm_loss(v, v_old, target, **good, power=0.0)
    for name in ("clip_low", "clip_high", "adv_clip", "beta", "ema_beta"):
        with pytest.raises(ValueError, match=f"{name} is -1"):
            awm_loss(v, v_old, target, **good, v_ref=v, v_ema=v, **{name: -1.0})
    with pytest.raises(ValueError, match=r"beta is 0.1 but v_ref is None"):
        awm_loss(v, v_old, target, **good, beta=0.1)
    with pytest.raises(ValueError, match=r"ema_beta is 0.1 but v_ema is None"):
        awm_loss(v, v_old, target, **good, ema_beta=0.1)


# ---- the kernels ---------------------------------------------------------------------------------


# Every shape and dtype with one flat and one curved transform, every transform once.
CASES = [(*case, name) for case in SHAPES_AND_DTYPES for name in ("t2", "ghuber")]
CASES += [((5, 300), torch.float32, name) for name in ("uniform", "t", "huber")]


@pytest.mark.parametrize(("shape", "dtype", "transform"), CASES)
def test_kernels_are_the_reference(shape, dtype, transform):
    """Sums of fp32 products in trees: a few 2^-24 of their size."""
    inputs, options = problem(rows=3, shape=shape, dtype=dtype)
    for left_out in ((), ("v_ref", "v_ema")) if shape == (5, 300) else ((),):
        chosen = {k: x for k, x in options.items() if k not in left_out}
        (ours, grad), (exact, exact_grad) = both(
            awm_loss, inputs, chosen, **CLIP, transform=transform, beta=1.5,
            ema_beta=0.0 if left_out else 0.5,
        )  # fmt: skip
        check_statistics(ours, exact, 5e-6)
        check_gradient(grad, exact_grad, dtype)


@settings(deadline=None, max_examples=15)
@given(data=st.data(), n=st.sampled_from([1, 7, 130]), rows=st.integers(1, 4),
       seed=st.integers(0, 1000), size=st.sampled_from([1e-3, 0.1, 1.0]),
       transform=st.sampled_from(list(LOG_P)), power=numbers(0.125, 2), low=numbers(0, 1),
       high=numbers(0, 1), beta=numbers(0, 2), ema_beta=numbers(0, 2),
       adv_clip=numbers(0, 6))  # fmt: skip
def test_kernels_with_any_coefficients(
    data, n, rows, seed, size, transform, power, low, high, beta, ema_beta, adv_clip
):
    inputs, _ = problem(rows=rows, shape=(n,), dtype=torch.float32, size=size, seed=seed)
    lists = {"advantage": numbers(-8, 8), "t": numbers(0, 1), "gate": GATES}
    options = {
        name: torch.tensor(data.draw(st.lists(values, min_size=rows, max_size=rows)))
        for name, values in lists.items()
    }
    options["v_ref"] = torch.where(options["gate"][:, None] != 0, -inputs[1], torch.nan)
    options["v_ema"] = inputs[1]
    (ours, grad), (exact, exact_grad) = both(
        awm_loss, inputs, options, transform=transform, power=power, clip_low=low, clip_high=high,
        beta=beta, ema_beta=ema_beta, adv_clip=adv_clip,
    )  # fmt: skip
    for bound in (1 - low, 1 + high):  # at a bound the gradient jumps
        assume(((exact.ratio_R - bound).abs() > 1e-5).all())
    # a log-ratio beyond 1 keeps fewer digits in its exponential, and l itself, of order 10 and to
    # the power 2 at most, enters the difference
    assume(exact.log_ratio_R.abs().max() < 4)
    largest = max(1.0, float(exact.loss_R.abs().max()), float(exact.kl_R.max()))
    check_statistics(ours, exact, 1e-5 * largest)
    assert (grad.double() - exact_grad).norm() <= 1e-5 * exact_grad.norm() + 1e-12


@pytest.mark.parametrize("transform", LOG_P)
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-7])
def test_small_log_ratios_keep_their_digits(size, transform):
    generator = torch.Generator().manual_seed(5)
    v_old, u, step = torch.randn(3, 2, 4096, generator=generator)
    inputs = (v_old + size * step.abs() * u.sign(), v_old, v_old + u)  # u delta > 0 everywhere
    options = {"advantage": torch.ones(2), "t": torch.tensor([1.0, 0.7])}
    (ours, _), (exact, _) = both(awm_loss, inputs, options, transform=transform)
    error = (ours.log_ratio_R.double() - exact.log_ratio_R).abs() / exact.log_ratio_R.abs()
    # what delta itself lost when v was rounded to fp32 is not the kernel's: same inputs to both
    assert float(error.max()) < 1e-4
    assert float(exact.log_ratio_R.abs().max()) < 4 * size


@pytest.mark.parametrize("transform", LOG_P)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_velocities_give_exactly_one(transform, dtype):
    (v, _, target), options = problem(rows=2, dtype=dtype, shape=(64, 16))
    v, target = on_device(v, target)
    rows = {k: options[k].to(DEVICE) for k in ("advantage", "t")}
    for backend in ("triton", "torch"):
        trained = v.clone().requires_grad_()
        out = awm_loss(trained, trained, target, **rows, transform=transform, backend=backend)
        assert torch.equal(out.log_ratio_R, torch.zeros_like(out.log_ratio_R))
        assert torch.equal(out.ratio_R, torch.ones_like(out.ratio_R))
        assert not (out.clipped_high_R | out.clipped_low_R).any()
        assert torch.autograd.grad(out.loss, trained)[0].abs().sum() > 0


@pytest.mark.parametrize("transform", LOG_P)
@pytest.mark.parametrize("perfect", ["v", "v_old"])
def test_a_perfect_prediction_is_finite(transform, perfect):
    (v, v_old, target), options = problem(rows=2, dtype=torch.float32, shape=(300,))
    inputs = (target, v_old, target) if perfect == "v" else (v, target, target)
    rows = {k: options[k] for k in ("advantage", "t")}
    (ours, grad), (exact, exact_grad) = both(awm_loss, inputs, rows, transform=transform)
    check_statistics(ours, exact, 5e-6)
    check_gradient(grad, exact_grad, torch.float32)
    assert exact_grad.isfinite().all()


def test_kernels_take_each_tensor_in_its_own_dtype():
    (v, v_old, target), options = problem(shape=(5, 300), dtype=torch.float32)
    options |= {"v_ref": options["v_ref"].bfloat16(), "v_ema": options["v_ema"].half()}
    (ours, grad), (exact, exact_grad) = both(
        awm_loss, (v, v_old.bfloat16(), target), options, **CLIP, transform="ghuber", beta=1.5,
        ema_beta=0.5,
    )  # fmt: skip
    check_statistics(ours, exact, 5e-6)
    check_gradient(grad, exact_grad, torch.float32)


ALL = CLIP | {"transform": "ghuber", "beta": 1.0, "ema_beta": 0.5}


def test_kernels_copy_what_is_strided_and_repeat_their_bits():
    inputs, options = problem(rows=3, dtype=torch.float32, shape=(33, 70))
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not strided[0].is_contiguous()
    check_repeats(awm_loss, inputs, options, 3, again=strided, **ALL)


@pytest.mark.gpu
def test_a_gpu_repeats_its_bits():
    inputs, options = problem(rows=64, dtype=torch.bfloat16, shape=(64, 1024))
    check_repeats(awm_loss, inputs, options, 10, **ALL)


@pytest.mark.parametrize("transform", ["t", "ghuber"])
def test_kernels_do_not_read_what_they_did_not_write(monkeypatch, transform):
    inputs, options = problem(rows=3, dtype=torch.float32, shape=(5, 1000))
    check_poisoned(monkeypatch, awm_loss, inputs, options, 5e-6, **(ALL | {"transform": transform}))


@pytest.mark.parametrize("power", [1.0, 0.25])
def test_opcheck(power):
    (v, v_old, target), options = problem(rows=3, dtype=torch.float32, shape=(40,))
    tensors = (target, options["v_ref"].nan_to_num(), options["v_ema"], v_old,
               options["advantage"], options["t"], options["gate"].float())  # fmt: skip
    arguments = (v.to(DEVICE).requires_grad_(), *on_device(*tensors), power, 0.2, 0.1, 1.5, 0.5,
                 5.0)  # fmt: skip
    torch.library.opcheck(torch.ops.gardo.awm_loss.default, arguments)


def test_a_compiler_sees_one_graph():
    inputs, options = problem(dtype=torch.float32, shape=(64, 16))
    check_one_graph(awm_loss, inputs, options, **ALL)


def test_kernels_refuse_fp64():
    inputs, options = problem()
    with pytest.raises(ValueError, match="the kernels work in fp32"):
        awm_loss(*inputs, **options, backend="triton")
    assert awm_loss(*inputs, **options, backend="auto").loss.dtype == torch.float64
