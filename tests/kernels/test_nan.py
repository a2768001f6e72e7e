"""What is not a number is never trained on: every op passes NaN on, by a chip's rules for it."""

import pytest
import torch
import triton
import triton.language as tl

from gardo_kernels import (
    STEP_COLUMNS,
    awm_loss,
    nearest_cosine,
    nft_loss,
    policy_loss,
    random_normal,
    sde_step,
)
from gardo_kernels._launch import launch
from gardo_kernels._launch_shape import LaunchShape
from tests.kernels.row_losses import DEVICE, both

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN
R, N, ROW, ELEMENT = 3, 1100, 1, 1060  # past a block; the row and its element that are NaN


# ---- the rules -----------------------------------------------------------------------------------


@triton.jit
def _rules_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Minimum, maximum, clamp, comparison: BLOCK of each; then the least and the largest of all."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.minimum(x, 1.0))
    tl.store(out_ptr + BLOCK + at, tl.maximum(x, 1.0))
    tl.store(out_ptr + 2 * BLOCK + at, tl.clamp(x, 0.0, 1.0))
    tl.store(out_ptr + 3 * BLOCK + at, tl.where(x > 1.0, 1.0, x))
    tl.store(out_ptr + 4 * BLOCK, tl.min(x, 0))
    tl.store(out_ptr + 4 * BLOCK + 1, tl.max(x, 0))


def test_minima_maxima_and_clamps_drop_nan_and_a_comparison_keeps_it():
    """As on a chip: without this no test below could fail."""
    x = torch.tensor([torch.nan, 0.5, 3.0, -2.0], device=DEVICE)
    out = torch.empty(18, device=DEVICE)
    launch(_rules_kernel, (1,), LaunchShape(), x_ptr=x, out_ptr=out, BLOCK=4)
    minimum, maximum, clamp, where = out[:16].cpu().unflatten(0, (4, 4))
    assert minimum.tolist() == [1, 0.5, 1, -2] and maximum.tolist() == [1, 1, 3, 1]
    assert not clamp.isnan().any() and clamp[1:].tolist() == [0.5, 1, 0]
    assert where[0].isnan() and where[1:].tolist() == [0.5, 1, -2]
    assert out[16:].tolist() == [-2, 3]


# ---- the losses ----------------------------------------------------------------------------------


def problem(op):
    """(samples and rows, options, settings) with no row clipped and every row gated."""
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(6, R, N, generator=generator)
    samples[1] = samples[0] + 0.01 * samples[1]
    a, b, c = 0.2 + 0.6 * torch.rand(3, R, generator=generator)
    gate = torch.tensor([0.5, 2.0, 1.0])
    if op is nft_loss:
        v, v_old, x_t, x0, v_ref, _ = samples
        rows = {"advantage": 10 * b - 5, "gate": gate, "v_ref": v_ref}
        return (v, v_old, x_t, x0, a), rows, {"b": 0.5}
    v, v_old, u, v_ref, v_ema, _ = samples
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    if op is awm_loss:
        rows = {"advantage": b, "t": a, "gate": gate, "v_ref": v_ref, "v_ema": v_ema}
        return (v, v_old, u), rows, {"transform": "ghuber", "ema_beta": 0.5, **clip}
    rows = {"advantage": b, "h": a, "B": c, "weight": 3 * a, "gate": gate, "v_ref": v_ref,
            "kl_scale": 2 * b}  # fmt: skip
    return (v, v_old, u), rows, clip


LOSSES = {
    policy_loss: ("v", "v_old", "u", "v_ref", "advantage", "h", "B", "weight", "gate", "kl_scale"),
    nft_loss: ("v", "v_old", "x_t", "x0", "t", "v_ref", "advantage", "gate"),
    awm_loss: ("v", "v_old", "target", "v_ref", "v_ema", "advantage", "t", "gate"),
}
NAMES = pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, names in LOSSES.items() for name in names]
)


def spoiled(op, name, value):
    """`problem` with the value in one row of the input, in one element of it where it has more."""
    inputs, options, settings = problem(op)
    inputs = [x.clone() for x in inputs]
    named = dict(zip(LOSSES[op], inputs, strict=False)) | options
    named[name][(ROW, ELEMENT) if named[name].ndim == 2 else ROW] = value
    return inputs, options, settings


@NAMES
def test_nan_in_any_input_reaches_the_loss_the_row_and_its_gradient(op, name):
    inputs, options, settings = spoiled(op, name, torch.nan)
    (ours, grad), (exact, exact_grad) = both(op, inputs, options, **settings, beta=0.3)
    assert ours.loss.isnan() and grad[ROW].isnan().any()
    assert torch.equal(grad.isnan(), exact_grad.isnan())
    rows = {k: x.isnan() for k, x in vars(ours).items() if k != "loss"}
    for statistic, nan_R in rows.items():
        assert torch.equal(nan_R, getattr(exact, statistic).isnan()), statistic
    found = torch.stack(list(rows.values())).any(0) | grad.isnan().any(1)
    assert found.nonzero().tolist() == [[ROW]]
    assert name == "gate" or torch.stack(list(rows.values())).any()


ZEROS = [(op, zero) for op in LOSSES for zero in ("beta", "upstream")] + [(policy_loss, "kl_scale")]


@pytest.mark.parametrize(("op", "zero"), ZEROS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_reference_that_is_not_finite_says_so_at_any_weight(op, zero, bad, backend):
    """Where the gate is on, in loss and gradient; where it is off, v_ref does not matter."""
    inputs, options, settings = spoiled(op, "v_ref", bad)
    if zero == "kl_scale":
        options["kl_scale"] = torch.zeros(R)
    beta, upstream = (float(zero != name) for name in ("beta", "upstream"))
    for gate in (1.0, 0.0):
        options["gate"][ROW] = gate
        v, *others = (x.to(DEVICE) for x in inputs)
        on_device = {k: x.to(DEVICE) for k, x in options.items()}
        v = v.detach().requires_grad_()
        out = op(v, *others, **on_device, **settings, beta=beta, backend=backend)
        (upstream * out.loss).backward()
        assert out.loss.isfinite() == (gate == 0)
        assert v.grad.isnan().nonzero().tolist() == ([[ROW, ELEMENT]] if gate else [])


# ---- the other ops -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", ["x", "v", "uncond", "m_prev", *STEP_COLUMNS])
def test_a_step_passes_nan_on(name, backend):
    generator = torch.Generator().manual_seed(0)
    named = dict(zip(("x", "v", "uncond", "m_prev"), torch.randn(4, R, N, generator=generator),
                     strict=True))  # fmt: skip
    table = torch.rand(R, len(STEP_COLUMNS), generator=generator) + 0.1
    if name in named:
        named[name][ROW, ELEMENT] = torch.nan
    else:
        table[ROW, STEP_COLUMNS.index(name)] = torch.nan
    x, v, uncond, m_prev = (t.to(DEVICE) for t in named.values())
    rows = torch.arange(R, device=DEVICE)
    out = sde_step(
        x, v, table.to(DEVICE), rows, seed=1, sample_id=rows, uncond=uncond, guidance=2.0,
        m_prev=m_prev, model_dtype=torch.bfloat16, keep_u=True, keep_m=True, keep_square=True,
        backend=backend,
    )  # fmt: skip
    spoils = {"sigma": ("m",), "u_scale": ("u",), "x": ("x", "model_input", "m"),
              "m_prev": ("x", "model_input"), "std": ("x", "model_input", "square_R")}  # fmt: skip
    spoils |= dict.fromkeys("ABC", ("x", "model_input"))
    velocity = ("x", "model_input", "velocity", "m")
    for output, values in vars(out).items():
        nan = values.isnan().nonzero().tolist()
        if output not in spoils.get(name, velocity):
            assert not nan, output
        elif name in named:
            assert nan == [[ROW, ELEMENT]], output
        else:
            assert values[ROW].isnan().all() and {row for row, *_ in nan} == {ROW}, output


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("rows", [24, 130])  # chords, and tiles
@pytest.mark.parametrize("whole", [True, False])
def test_a_feature_that_is_not_finite_spoils_its_group_alone(rows, backend, bad, whole):
    e_BD = torch.randn(rows, 40, generator=torch.Generator().manual_seed(0))
    e_BD[5, slice(None) if whole else 3] = bad
    group_B = None if rows > 100 else torch.arange(rows, device=DEVICE) // 8
    for distance in nearest_cosine(e_BD.to(DEVICE), group_B, backend=backend):
        assert distance.isnan().nonzero()[:, 0].tolist() == list(range(rows if rows > 100 else 8))


def test_no_normal_is_nan():
    normals = random_normal(3, torch.arange(4, device=DEVICE), 0, (4096,), backend="triton")
    assert normals.isfinite().all() and float(normals.abs().max()) < 5.77
