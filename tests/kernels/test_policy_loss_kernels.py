"""The policy loss by its kernels: against the reference in fp64, to the bit, traced, poisoned."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gardo_kernels import policy_loss
from gardo_kernels._launch_shape import LaunchShape, capability, size_class, trying
from tests.kernels.policy_problem import CLIP, GUARD, PLAIN, of_kernels, of_rows, problem
from tests.kernels.row_losses import (
    CASES,
    DEVICE,
    GATES,
    both,
    check_gradient,
    check_one_graph,
    check_poisoned,
    check_repeats,
    check_statistics,
    numbers,
    on_device,
)


@CASES
@pytest.mark.parametrize("variant", [PLAIN, GUARD], ids=["plain", "guard"])
def test_kernels_are_the_reference(shape, dtype, variant):
    """Sums of fp32 products in trees: a few 2^-24 of their size, here below 30."""
    inputs, options = of_kernels(rows=3, shape=shape, dtype=dtype)
    for left_out in ((), ("v_ref",)) if shape == (5, 300) else ((),):
        chosen = {k: x for k, x in (options | of_rows(variant, 3)).items() if k not in left_out}
        (ours, grad), (exact, exact_grad) = both(policy_loss, inputs, chosen, **CLIP, beta=1.5)
        check_statistics(ours, exact, 3e-6)
        check_gradient(grad, exact_grad, dtype)


@settings(deadline=None, max_examples=15)
@given(data=st.data(), n=st.sampled_from([1, 7, 130]), rows=st.integers(1, 4),
       seed=st.integers(0, 1000), low=numbers(0, 0.5), high=numbers(0, 0.5), beta=numbers(0, 2),
       adv_clip=numbers(0, 6), quadratic=st.booleans())  # fmt: skip
def test_kernels_with_any_coefficients(data, n, rows, seed, low, high, beta, adv_clip, quadratic):
    """|log-ratio| stays below 4, so what fp32 sums lose of it is a few 1e-6 of the ratio."""
    (v, v_old, u), _ = of_kernels(rows=rows, shape=(n,), dtype=torch.float32, size=0.2, seed=seed)
    ranges = {"advantage": (-8, 8), "h": (0, 1), "B": (-1, 1), "weight": (0, 20),
              "kl_scale": (0, 4)}  # fmt: skip
    options = {
        name: torch.tensor(data.draw(st.lists(numbers(*r), min_size=rows, max_size=rows)))
        for name, r in ranges.items()
    }
    gate = torch.tensor(data.draw(st.lists(GATES, min_size=rows, max_size=rows)))
    v_ref = torch.where(gate[:, None] != 0, -u, torch.nan)
    (ours, grad), (exact, exact_grad) = both(
        policy_loss, (v, v_old, u), options | {"gate": gate, "v_ref": v_ref}, clip_low=low,
        clip_high=high, beta=beta, adv_clip=adv_clip, quadratic=quadratic,
    )  # fmt: skip
    for bound in (1 - low, 1 + high):  # at a bound the gradient jumps
        assume(((exact.ratio_R - bound).abs() > 1e-5).all())
    # the loss adds terms of both signs and of weight 20 at most
    check_statistics(ours, exact, 1e-5 * max(1.0, float(exact.loss_R.abs().max())))
    assert (grad.double() - exact_grad).norm() <= 1e-5 * exact_grad.norm() + 1e-12


def test_kernels_take_each_tensor_in_its_own_dtype():
    (v, v_old, u), options = of_kernels(shape=(5, 300), dtype=torch.float32)
    v_old, options["v_ref"] = v_old.bfloat16(), options["v_ref"].half()
    (ours, grad), (exact, exact_grad) = both(policy_loss, (v, v_old, u), options, **CLIP, beta=1.5)
    check_statistics(ours, exact, 3e-6)
    check_gradient(grad, exact_grad, torch.float32)


@pytest.mark.parametrize("quadratic", [True, False])
@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-6, 1e-7])
def test_small_log_ratios_keep_their_digits(size, quadratic):
    generator = torch.Generator().manual_seed(5)
    v_old, u, step = torch.randn(3, 3, 4096, generator=generator)
    v = v_old + size * step * u.sign()  # u delta > 0 everywhere: log-ratio of about `size`
    rows = {n: torch.full((3,), x) for n, x in (("advantage", 1.0), ("h", 1.2), ("B", -0.5))}
    (ours, _), (exact, _) = both(policy_loss, (v, v_old, u), rows, quadratic=quadratic)
    error = (ours.log_ratio_R.double() - exact.log_ratio_R).abs() / exact.log_ratio_R.abs()
    # what delta itself lost when v was rounded to fp32 is not the kernel's: same inputs to both
    assert float(error.max()) < 1e-4
    assert float(exact.log_ratio_R.abs().max()) < 2 * size


@pytest.mark.parametrize("quadratic", [True, False])
def test_kernels_on_identical_velocities_give_exactly_one(quadratic):
    (v, _, u), options = of_kernels(dtype=torch.float32, shape=(64, 16))
    v, u = on_device(v, u)
    options = {k: t.to(DEVICE) for k, t in options.items()} | {"quadratic": quadratic}
    out = policy_loss(v, v.clone(), u, **options, backend="triton")
    assert torch.equal(out.log_ratio_R, torch.zeros_like(out.log_ratio_R))
    assert torch.equal(out.ratio_R, torch.ones_like(out.ratio_R))


def test_kernels_copy_what_is_strided_and_repeat_their_bits():
    inputs, options = of_kernels(rows=3, dtype=torch.float32, shape=(33, 70))
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    assert not strided[0].is_contiguous()
    check_repeats(policy_loss, inputs, options, 10, again=strided, **CLIP, beta=1.0)


@pytest.mark.parametrize("elements", [70, 530])
def test_more_chunks_than_a_pass_and_than_all_that_are_unrolled(elements):
    """Chunks of four elements: 18, and 133 of which the last five are added in a loop."""
    inputs, options = of_kernels(rows=1, dtype=torch.float32, shape=(elements,))
    key = ("policy_loss", capability(torch.device(DEVICE)), size_class(1, elements))
    with trying(key, LaunchShape(block=4, chunk=4)):
        (ours, grad), (exact, exact_grad) = both(policy_loss, inputs, options, **CLIP, beta=1.5)
    check_statistics(ours, exact, 3e-6)
    check_gradient(grad, exact_grad, torch.float32)


@pytest.mark.gpu
def test_a_gpu_repeats_its_bits():
    inputs, options = of_kernels(rows=64, dtype=torch.bfloat16, shape=(64, 1024))
    check_repeats(policy_loss, inputs, options, 10, **CLIP, beta=1.0)


def test_kernels_do_not_read_what_they_did_not_write(monkeypatch):
    inputs, options = of_kernels(rows=3, dtype=torch.float32, shape=(5, 1000))
    check_poisoned(monkeypatch, policy_loss, inputs, options, 3e-6, **CLIP, beta=1.0)


@pytest.mark.parametrize("quadratic", [True, False])
def test_opcheck(quadratic):
    (v, v_old, u), options = of_kernels(rows=3, dtype=torch.float32, shape=(40,))
    names = ("advantage", "h", "B", "h", "gate", "kl_scale")  # h serves as the weight too
    rows = on_device(*(options[name].float() for name in names))
    trained = v.to(DEVICE).requires_grad_()
    samples = on_device(v_old, u, options["v_ref"].nan_to_num())
    arguments = (trained, *samples, *rows, 0.2, 0.1, 1.5, 5.0, quadratic)
    torch.library.opcheck(torch.ops.gardo.policy_loss.default, arguments)


def test_a_compiler_sees_one_graph():
    inputs, options = of_kernels(dtype=torch.float32, shape=(64, 16))
    check_one_graph(policy_loss, inputs, options | of_rows({"weight": GUARD["weight"]}, 5),
                    quadratic=False, **CLIP)  # fmt: skip


def test_kernels_refuse_fp64():
    v, v_old, u, options = problem()
    with pytest.raises(ValueError, match="the kernels work in fp32"):
        policy_loss(v, v_old, u, **options, backend="triton")
    assert policy_loss(v, v_old, u, **options, backend="auto").loss.dtype == torch.float64
