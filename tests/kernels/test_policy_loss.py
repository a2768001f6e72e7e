"""The clipped policy loss: golden numbers, the direct formula in fp64, gradients, gate and clip."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gardo_kernels import policy_loss
from tests.kernels.policy_problem import CLIP, GUARD, PLAIN, of_rows, problem
from tests.kernels.row_losses import DEVICE, on_device

# Samplers of the golden example, s .9 -> .8 with sigmas[1] = .96: h, B, std, KL scale (flow_grpo).
FLOW = (1 / (2 * 0.441), -0.1245, math.sqrt(0.441), 0.1245**2 / (2 * 0.441 * 10))
DANCE_B = -(1 + 0.09 * 0.1 / 1.8) * 0.1
DANCE = (1 / (2 * 0.009), DANCE_B, math.sqrt(0.009), DANCE_B**2 / (2 * 0.09))
PHI = 0.4 * math.pi
CPS_B = -0.9 * 0.2 + 0.1 * 0.8 * math.cos(PHI)
CPS_STD = 0.8 * math.sin(PHI)
CPS = (1.0, CPS_B, CPS_STD, CPS_B**2 / (2 * CPS_STD**2))


def golden(sampler):
    h, B, std, kl_scale = (torch.tensor([value]) for value in sampler)
    v_old = torch.tensor([[0.1, -0.2, 0.3, -0.4]])
    v = v_old + torch.tensor([[0.01, -0.02, 0.005, 0.0]])
    u = std / B * torch.tensor([[1.0, -1.0, 0.5, 0.0]])
    return v, v_old, u, {"h": h, "B": B, "kl_scale": kl_scale}


@pytest.mark.parametrize(
    ("sampler", "ratio"), [(FLOW, 0.99847560), (DANCE, 0.99135660), (CPS, 0.99807886)]
)
def test_golden_ratio(sampler, ratio):
    v, v_old, u, row = golden(sampler)
    out = policy_loss(v, v_old, u, advantage=torch.tensor([1.5]), **row)
    assert out.ratio_R.item() == pytest.approx(ratio, rel=1e-6)
    assert out.loss.item() == pytest.approx(-1.5 * ratio, rel=1e-6)


def test_golden_guard_ratio():
    v, v_old, u, row = golden(FLOW)
    row["h"] = torch.tensor([1 / (2 * FLOW[2])])  # h B^2 is half of Guard's B^2 / std
    weight = torch.tensor([10.0])  # 1 / -dt
    out = policy_loss(
        v, v_old, u, advantage=torch.tensor([1.5]), quadratic=False, weight=weight, **row
    )
    assert out.ratio_R.item() == pytest.approx(0.99898895, rel=1e-7)
    assert out.loss.item() == pytest.approx(-1.5 * 10 * 0.99898895, rel=1e-6)


def test_guard_is_the_normalised_ratio_of_the_means():
    # ratio = exp(mean(z (mu - mu_old))), mu = A x + B v; the term weighed, the KL not
    generator = torch.Generator().manual_seed(3)
    x, v_old, z, step, v_ref = torch.randn(5, 3, 64, generator=generator, dtype=torch.float64)
    A, B, std, dt = (
        torch.tensor(row, dtype=torch.float64)
        for row in ([1.1, 1.2, 1.0], [-0.1, -0.2, -0.05], [0.7, 0.4, 0.2], [-0.1, -0.15, -0.05])
    )
    v = v_old + 0.1 * step
    mean, old = (A[:, None] * x + B[:, None] * velocity for velocity in (v, v_old))
    advantage = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    rows = {"advantage": advantage, "h": 1 / (2 * std), "B": B, "v_ref": v_ref, "beta": 0.5}
    u = (std / B)[:, None] * z
    out = policy_loss(v, v_old, u, quadratic=False, weight=-1 / dt, **rows)
    torch.testing.assert_close(out.ratio_R, (z * (mean - old)).mean(1).exp())
    unweighted = policy_loss(v, v_old, u, quadratic=False, **rows)
    torch.testing.assert_close(out.loss_R, unweighted.loss_R / -dt)
    assert torch.equal(out.kl_R, unweighted.kl_R)
    torch.testing.assert_close(out.loss, out.loss_R.mean() + 0.5 * out.kl_R.mean())


@pytest.mark.parametrize(("kind", "kl"), [("flow_grpo", 2.30658e-7), ("gaussian", 2.30658e-6)])
def test_golden_kl(kind, kl):
    v, v_ref, u, row = golden(FLOW)
    if kind == "gaussian":
        row["kl_scale"] = row["h"] * row["B"] ** 2
    out = policy_loss(v, v.clone(), u, advantage=torch.zeros(1), v_ref=v_ref, beta=2.0, **row)
    assert out.kl_R.item() == pytest.approx(kl, rel=1e-5)
    assert out.loss.item() == pytest.approx(2 * kl, rel=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4, 1e-5])
def test_delta_form_is_the_direct_formula(size):
    rows, n, h, B = 6, 4096, 1.6, -0.3
    generator = torch.Generator().manual_seed(1)
    v_old, u, noise = torch.randn(3, rows, n, generator=generator)
    v = v_old + size * (0.3 * u + noise)
    full = torch.full((rows,), 1.0)
    out = policy_loss(v, v_old, u, advantage=full, h=h * full, B=B * full)
    w = v_old.double() + u.double()
    h64, B64 = (h * full).double(), (B * full).double()
    new, old = ((w - x.double()).square().mean(1) for x in (v, v_old))
    direct = -h64 * B64**2 * (new - old)
    assert direct.abs().min() > 1e-7
    assert size > 1e-5 or direct.abs().max() < 1e-5  # the range the clip works in was reached
    torch.testing.assert_close(out.log_ratio_R.double(), direct, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_velocities_give_exactly_one(dtype):
    v, _, u, options = problem(dtype=torch.float32)
    v = v.to(dtype)
    out = policy_loss(v, v.clone(), u, **options)
    assert torch.equal(out.log_ratio_R, torch.zeros(5))
    assert torch.equal(out.ratio_R, torch.ones(5))
    assert not (out.clipped_high_R | out.clipped_low_R).any()
    assert torch.equal(out.loss_R, -options["advantage"].clamp(-5, 5))
    assert out.loss.dtype == torch.float32


def test_low_precision_velocities_are_widened_first():
    v, v_old, u, options = problem(dtype=torch.float32)
    low, low_old = v.bfloat16(), v_old.bfloat16()
    ours = policy_loss(low, low_old, u, **options, beta=0.3)
    wide = policy_loss(low.float(), low_old.float(), u, **options, beta=0.3)
    assert torch.equal(ours.loss, wide.loss) and torch.equal(ours.log_ratio_R, wide.log_ratio_R)


def test_clip_by_hand():
    # one element, u = 0, h B^2 = 1: log ratio = -delta^2; and u = 1: 2 delta - delta^2
    delta = torch.tensor([[0.0], [0.3], [0.3], [0.3], [0.3]])
    u = torch.tensor([[0.0], [1.0], [1.0], [-1.0], [-1.0]])
    advantage = torch.tensor([1.0, 2.0, -2.0, 2.0, -20.0])
    ones = torch.ones(5)
    v = delta.clone().requires_grad_()
    out = policy_loss(
        v, torch.zeros(5, 1), u, advantage=advantage, h=ones, B=ones, clip_low=0.2, clip_high=0.1
    )
    up, down = math.exp(0.51), math.exp(-0.69)
    expected = torch.tensor([-1.0, -2 * 1.1, 2 * up, -2 * down, 5 * 0.8])  # A clamped to -5
    torch.testing.assert_close(out.loss_R, expected)
    torch.testing.assert_close(out.loss.detach(), expected.mean())
    assert out.clipped_high_R.tolist() == [False, True, False, False, False]
    assert out.clipped_low_R.tolist() == [False, False, False, False, True]
    out.loss.backward()
    assert (v.grad[:, 0] == 0).tolist() == [True, True, False, False, True]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_narrow_clips_are_decided_to_a_thousandth_of_them(backend):
    """Log-ratios near log(1 +- 1e-5), where the ratios that fp32 has lie 1e-7 apart."""
    bounds = torch.tensor([math.log1p(1e-5)] * 2 + [math.log1p(-1e-5)] * 2)
    log_ratio = bounds * torch.tensor([0.9995, 1.0005, 0.9995, 1.0005])
    log_ratio, advantage = on_device(log_ratio.repeat(2), torch.tensor([1.0] * 4 + [-1.0] * 4))
    half, ones = torch.full((8, 1), 0.5, device=DEVICE), torch.ones(8, device=DEVICE)
    v = (2 * half).requires_grad_()  # with u = 1/2 and q = 0 the log-ratio is h
    out = policy_loss(
        v, 0 * half, half, advantage=advantage, h=log_ratio, B=ones, clip_low=1e-5, clip_high=1e-5,
        quadratic=False, backend=backend,
    )  # fmt: skip
    assert torch.equal(out.log_ratio_R, log_ratio)
    assert out.clipped_high_R.tolist() == [False, True] + [False] * 6
    assert out.clipped_low_R.tolist() == [False] * 7 + [True]
    (grad,) = torch.autograd.grad(out.loss, v)
    assert (grad[:, 0] == 0).tolist() == (out.clipped_high_R | out.clipped_low_R).tolist()


def closed_form_gradient(
    v, v_old, u, out, *, advantage, h, B, weight, gate, v_ref, kl_scale, beta, quadratic, **clip
):
    """dL/dv of the op's docstring, for velocities [R, N, ...]."""

    def spread(row_R):
        return row_R.view(-1, *[1] * (v.ndim - 1)) / v.numel()

    act = ~(out.clipped_high_R | out.clipped_low_R)
    moves = advantage.clamp(-5, 5) * out.ratio_R * act * (1 if weight is None else weight)
    grad = -spread(moves * 2 * h * B.square()) * (u - quadratic * (v - v_old))
    gate = torch.ones_like(h) if gate is None else gate.to(h.dtype)
    error = torch.where(gate.view(-1, *[1] * (v.ndim - 1)) != 0, v - v_ref, 0.0)
    return grad + spread(beta * gate * 2 * kl_scale) * error


@pytest.mark.parametrize("gate", ["some", "none", "all", "weights", "absent"])
@pytest.mark.parametrize(("seed", "variant"), [(0, PLAIN), (1, PLAIN), (0, GUARD)])
def test_closed_form_gradient_is_autograds(gate, seed, variant):
    v, v_old, u, options = problem(rows=8, seed=seed)
    if gate != "some":
        options["v_ref"] = torch.randn_like(v_old)
        options["gate"] = {
            "none": torch.zeros(8, dtype=torch.bool),
            "all": torch.ones(8, dtype=torch.bool),
            "weights": torch.linspace(0, 2, 8, dtype=torch.float64),
            "absent": None,
        }[gate]
    options |= CLIP | {"beta": 0.7} | variant
    v.requires_grad_()
    out = policy_loss(v, v_old, u, **options)
    clipped = out.clipped_high_R | out.clipped_low_R
    assert clipped.any() and not clipped.all()
    (grad,) = torch.autograd.grad(out.loss, v)
    closed = closed_form_gradient(v.detach(), v_old, u, out, **options)
    torch.testing.assert_close(closed, grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("variant", [PLAIN, GUARD], ids=["plain", "guard"])
def test_gradcheck(variant):
    v, v_old, u, options = problem(rows=4, shape=(3,))
    v.requires_grad_()
    options |= CLIP | {"beta": 0.7} | of_rows(variant, 4)

    def loss(v):
        return policy_loss(v, v_old, u, **options).loss

    assert torch.autograd.gradcheck(loss, (v,))


def test_the_kl_is_a_mean_over_all_rows():
    v, v_old, u, options = problem(rows=5)
    plain = policy_loss(v, v_old, u, **options)
    gate, kl = options["gate"], plain.kl_R
    assert gate.sum() == 3
    difference = (v - options["v_ref"])[gate].square().flatten(1).mean(1)
    torch.testing.assert_close(kl[gate], options["kl_scale"][gate] * difference)
    assert torch.equal(kl[~gate], torch.zeros(2, dtype=kl.dtype))
    torch.testing.assert_close(plain.loss, plain.loss_R.mean())  # beta 0: reported, not penalised
    batch = policy_loss(v, v_old, u, **options, beta=0.5)
    torch.testing.assert_close(batch.loss, plain.loss + 0.5 * kl.sum() / 5)
    options["gate"] = gate * 5 / 3  # a mean over the gated rows is asked for by weights
    gated = policy_loss(v, v_old, u, **options, beta=0.5)
    torch.testing.assert_close(gated.loss, plain.loss + 0.5 * kl.sum() / 3)


def test_gate_weights_scale_the_penalty_and_not_the_report():
    v, v_old, u, options = problem(rows=4)
    options["v_ref"] = torch.zeros_like(v)
    options["gate"] = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    plain = policy_loss(v, v_old, u, **options)
    weighted = (options["gate"] * plain.kl_R).sum()
    out = policy_loss(v, v_old, u, **options, beta=0.5)
    torch.testing.assert_close(out.loss - plain.loss, 0.5 * weighted / 4)
    all_on = options | {"gate": None}
    torch.testing.assert_close(policy_loss(v, v_old, u, **all_on).kl_R[1:], plain.kl_R[1:])


def test_nothing_gated_is_no_penalty():
    v, v_old, u, options = problem()
    options["gate"] = torch.zeros(5, dtype=torch.bool)
    options["v_ref"] = torch.full_like(v, torch.nan)
    v.requires_grad_()
    out = policy_loss(v, v_old, u, **options, beta=0.5)
    torch.testing.assert_close(out.loss.detach(), out.loss_R.mean())
    assert torch.equal(out.kl_R, torch.zeros(5, dtype=torch.float64))
    (grad,) = torch.autograd.grad(out.loss, v)
    assert grad.isfinite().all()
    without = policy_loss(v, v_old, u, **(options | {"v_ref": None}), beta=0.5)
    torch.testing.assert_close(without.loss, out.loss)


def test_only_the_loss_has_a_gradient_and_only_to_v():
    v, v_old, u, options = problem()
    leaves = [v, v_old, u, options["v_ref"], options["advantage"]]
    for leaf in leaves:
        leaf.requires_grad_()
    out = policy_loss(v, v_old, u, **options, beta=0.5)
    statistics = (out.loss_R, out.ratio_R, out.log_ratio_R, out.kl_R)
    assert not any(s.requires_grad for s in statistics)
    grads = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    assert grads[0].abs().sum() > 0 and all(g is None for g in grads[1:])


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 6),
    order=st.randoms(use_true_random=False),
)
def test_the_order_of_rows_does_not_matter(seed, rows, order):
    v, v_old, u, options = problem(rows=rows, seed=seed)
    index = list(range(rows))
    order.shuffle(index)
    settings = CLIP | {"beta": 0.4}
    out = policy_loss(v, v_old, u, **options, **settings)
    moved = {k: x[index] for k, x in options.items()}
    shuffled = policy_loss(v[index], v_old[index], u[index], **moved, **settings)
    torch.testing.assert_close(shuffled.loss, out.loss)
    for name in ("loss_R", "ratio_R", "log_ratio_R", "kl_R", "clipped_high_R", "clipped_low_R"):
        assert torch.equal(getattr(shuffled, name), getattr(out, name)[index]), name


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), low=st.floats(0, 0.5), high=st.floats(0, 0.5))
def test_the_clip_only_ever_raises_the_loss(seed, low, high):
    v, v_old, u, options = problem(seed=seed)
    out = policy_loss(v, v_old, u, **options, clip_low=low, clip_high=high)
    advantage = options["advantage"].clamp(-5, 5)
    assert (out.loss_R >= -advantage * out.ratio_R - 1e-12).all()
    inside = ~(out.clipped_high_R | out.clipped_low_R)
    torch.testing.assert_close(out.loss_R[inside], (-advantage * out.ratio_R)[inside])


def test_bad_inputs():
    v, v_old, u, options = problem()
    with pytest.raises(ValueError, match=r"v_old has shape \(4, 3, 4\) but v has \(5, 3, 4\)"):
        policy_loss(v, v_old[:4], u, **options)
    options["weight"] = options["h"]
    for name in ("advantage", "h", "B", "weight", "gate", "kl_scale"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(2,\)"):
            policy_loss(v, v_old, u, **(options | {name: options[name][:2]}))
    with pytest.raises(ValueError, match="v_ref has shape"):
        policy_loss(v, v_old, u, **(options | {"v_ref": options["v_ref"][:, :1]}))
    with pytest.raises(ValueError, match="v has shape"):
        policy_loss(v[:0], v_old[:0], u[:0], **{k: x[:0] for k, x in options.items()})
    with pytest.raises(ValueError, match="u is on meta but v is on cpu"):
        policy_loss(v, v_old, u.to("meta"), **options)
    with pytest.raises(ValueError, match="h is on meta"):
        policy_loss(v, v_old, u, **(options | {"h": options["h"].to("meta")}))
    with pytest.raises(ValueError, match="u has dtype"):
        policy_loss(v, v_old, u.long(), **options)
    for name in ("clip_low", "clip_high", "beta", "adv_clip"):
        with pytest.raises(ValueError, match=f"{name} is -1"):
            policy_loss(v, v_old, u, **options, **{name: -1.0})
    with pytest.raises(ValueError, match=r"beta is 0.1 but v_ref is None"):
        policy_loss(v, v_old, u, **(options | {"v_ref": None, "gate": None}), beta=0.1)
