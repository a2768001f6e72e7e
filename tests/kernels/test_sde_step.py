"""The sampler step: golden numbers, precision, noise, rows at different steps, what it refuses."""

import itertools
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gardo_kernels import STEP_COLUMNS, random_normal, sde_step, seed_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there under Triton's interpreter
module = import_module("gardo_kernels.sde_step")
SHAPES = [(1,), (3, 5), (64, 16), (1025,)]  # within, at and past a block
STEPS = 4
SEED = 2**63 + 12345
OUTPUTS = ("x", "model_input", "velocity", "u", "m", "square_R")


def table(seed=0, C=True):
    """Four steps of any size; the last one draws no noise, and without `C` none looks back."""
    generator = torch.Generator().manual_seed(seed)
    sigma, A, B, look_back, std = torch.randn(5, STEPS, generator=generator)
    std = std.abs() + 0.1
    std[-1] = 0
    columns = {"sigma": sigma, "A": A, "B": B, "C": look_back * C, "std": std, "u_scale": std / B}
    return torch.stack([columns[n] for n in STEP_COLUMNS] + [torch.full((STEPS,), torch.nan)], 1)


def inputs(rows=3, shape=(4, 5), dtype=torch.float32, seed=0):
    """(x, v, uncond, m_prev), the rows' steps and identities."""
    generator = torch.Generator().manual_seed(seed)
    x, v, uncond, m = torch.randn(4, rows, *shape, generator=generator, dtype=torch.float64)
    step_R = torch.randint(STEPS, (rows,), generator=generator)
    sample_id = torch.randint(-(2**40), 2**40, (rows,), generator=generator)
    return (x, *(t.to(dtype) for t in (v, uncond)), m), step_R, sample_id


def options(step_R, sample_id, tensors, **more):
    _, _, uncond, m = tensors
    return {"seed": SEED, "sample_id": sample_id, "uncond": uncond, "m_prev": m, "guidance": 2.5,
            "keep_u": True, "keep_m": True, "keep_square": True, **more}  # fmt: skip


def exact(tensors, step_R, sample_id, guidance=2.5):
    """The formulas in fp64, row by row, from the table's fp32 numbers; guided velocity rounded."""
    x, v, uncond, m_prev = tensors
    rows = []
    for r in range(len(x)):
        sigma, A, B, C, std, u_scale = table()[step_R[r], :6].double()
        z = random_normal(SEED, sample_id[r : r + 1], int(step_R[r]), x.shape[1:], backend="torch")
        z = z[0].double() * (std != 0)
        start = uncond[r].float()
        velocity = (start + guidance * (v[r].float() - start)).to(v.dtype)
        x_next = A * x[r] + B * velocity.double() + C * m_prev[r] + std * z
        rows.append((x_next, x_next, velocity, u_scale * z, x[r] - sigma * velocity.double(),
                     (std * z).square().mean()))  # fmt: skip
    return dict(zip(OUTPUTS, (torch.stack(c) for c in zip(*rows, strict=True)), strict=True))


def test_golden_step():
    # Flow-SDE, a = .7, s .9 -> .8, sigmas[1] = .96; the golden noise is not Philox's: the mean
    row = torch.tensor([[0.9, 0.755, -0.1245, 0.0, 0.0, 0.0]])
    x, v = torch.tensor([[0.5, -1.0, 0.25, 2.0]]), torch.tensor([[0.1, -0.2, 0.3, -0.4]])
    out = sde_step(x, v, row, torch.zeros(1, dtype=torch.int64))
    mean = torch.tensor([[0.36505, -0.7301, 0.1514, 1.5598]])
    torch.testing.assert_close(out.x, mean, rtol=1e-6, atol=0)
    noise = torch.tensor([[1.0, -1.0, 0.5, 0.0]])
    row[0, 4] = 0.66407831
    out = module.sde_step_ref(x, v, noise, row)
    torch.testing.assert_close(out.x, mean + 0.66407831 * noise, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_backends_are_the_formula(backend, shape, dtype):
    """Four products and sums of numbers below 20: 5e-6; a kernel's normal is 1e-6 off, times 30."""
    tensors, step_R, sample_id = inputs(rows=5, shape=shape, dtype=dtype)
    step_R[0], step_R[1] = STEPS - 1, 0
    expected = exact(tensors, step_R, sample_id)
    tensors = [t.float().to(DEVICE) if t.dtype == torch.float64 else t.to(DEVICE) for t in tensors]
    ids = (step_R.to(DEVICE), sample_id.to(DEVICE))
    out = sde_step(*tensors[:2], table().to(DEVICE), ids[0],
                   **options(*ids, tensors, model_dtype=dtype, backend=backend))  # fmt: skip
    assert out.x.dtype == torch.float32 and out.model_input.dtype == out.velocity.dtype == dtype
    # one unit in the last place of bf16 and fp16: the interpreter cuts where a GPU rounds
    eps = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    velocity = expected["velocity"].double()
    torch.testing.assert_close(out.velocity.cpu().double(), velocity, rtol=eps, atol=1e-6)
    off = (out.velocity.cpu().double() - velocity).abs()
    for name in ("x", "u", "m", "square_R"):
        mine = getattr(out, name).cpu().double()
        allowed = 5e-5 + (3 * off if name in ("x", "m") else 0.0) + 1e-5 * expected[name].abs()
        assert ((mine - expected[name]).abs() <= allowed).all(), name
    torch.testing.assert_close(out.model_input.float(), out.x, rtol=max(eps, 1e-7), atol=1e-7)
    assert torch.equal(out.u[0], torch.zeros_like(out.u[0]))  # a step without noise


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_noise_is_a_function_of_coordinates(backend):
    """Any split of the batch, any order of rows, the seed a number or a tensor: equal bits."""
    tensors, step_R, sample_id = inputs(rows=6, shape=(300,))
    tensors = [t.float() for t in tensors]

    def run(rows, seed=SEED):
        part = [t[rows].to(DEVICE) for t in (*tensors, step_R, sample_id)]
        more = options(part[4], part[5], part[:4], backend=backend, seed=seed)
        return sde_step(*part[:2], table().to(DEVICE), part[4], **more)

    whole = run(list(range(6)))
    for rows in ([0, 1, 2], [5], [4, 3], [1, 5, 0, 2]):
        part = run(rows, seed_tensor(SEED, DEVICE))
        for name in OUTPUTS:
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name


def test_the_noise_is_random_normals():
    """x' - A x - B v, over std, is `random_normal` of the step's stream."""
    x = torch.zeros(2, 100, device=DEVICE)
    ids = torch.tensor([3, 1 << 33], device=DEVICE)
    row = torch.tensor([[0.5, 0.0, 0.0, 0.0, 1.0, -2.0]], device=DEVICE).repeat(8, 1)
    out = sde_step(x, x, row, torch.full_like(ids, 7), seed=5, sample_id=ids, keep_u=True)
    z = random_normal(5, ids, 7, (100,))
    assert torch.equal(out.x, z) and torch.equal(out.u, -2 * z)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_terms_may_be_left_out_where_they_weigh_nothing(backend):
    tensors, step_R, sample_id = inputs()
    x, v, _, m = (t.float().to(DEVICE) for t in tensors)
    step_R = torch.full_like(step_R, STEPS - 1).to(DEVICE)
    rows = table(C=False).to(DEVICE)
    without = sde_step(x, v, rows, step_R, backend=backend)
    full = sde_step(x, v, rows, step_R, m_prev=m, seed=1, sample_id=sample_id.to(DEVICE),
                    backend=backend)  # fmt: skip
    assert torch.equal(without.x, full.x)
    assert without.u is without.m is without.square_R is None
    assert without.velocity is v and torch.equal(without.model_input, without.x)


def test_kernel_copies_what_is_strided():
    tensors, step_R, sample_id = inputs(shape=(33, 70), dtype=torch.bfloat16)
    plain = [t.to(DEVICE) for t in (*tensors, step_R, sample_id)]
    plain[0], plain[3] = plain[0].float(), plain[3].float()
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in plain[:4]]
    assert not strided[0].is_contiguous()
    rows = table().repeat(1, 2).to(DEVICE)[:, :7]
    assert not rows.is_contiguous()
    first, second = (
        sde_step(*t[:2], k, plain[4], **options(*plain[4:], t[:4], backend="triton"))
        for t, k in ((plain, table().to(DEVICE)), (strided, rows))
    )
    for name in OUTPUTS:
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_kernel_writes_all_that_it_returns(monkeypatch):
    """Poisoned outputs: every `empty` comes full of NaN."""

    plain = torch.Tensor.new_empty

    def poisoned(self, *size, **more):
        out = plain(self, *size, **more)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    tensors, step_R, sample_id = inputs(shape=(1500,), dtype=torch.bfloat16)
    tensors = [t.to(DEVICE) for t in tensors]
    tensors[0], tensors[3] = tensors[0].float(), tensors[3].float()
    ids = (step_R.to(DEVICE), sample_id.to(DEVICE))
    more = options(*ids, tensors, backend="triton", model_dtype=torch.bfloat16)
    out = sde_step(*tensors[:2], table().to(DEVICE), ids[0], **more)
    for name in OUTPUTS:
        assert not getattr(out, name).isnan().any(), name


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 2**64 - 1),
    rows=st.integers(1, 4),
    count=st.integers(1, 40),
    guided=st.booleans(),
    model_dtype=st.sampled_from([None, torch.float16, torch.bfloat16]),
    guidance=st.floats(-2, 8),
)
def test_backends_agree_on_any_coefficients(seed, rows, count, guided, model_dtype, guidance):
    tensors, step_R, sample_id = inputs(rows=rows, shape=(count,), seed=seed % 1000)
    x, v, uncond, m = (t.float().to(DEVICE) for t in tensors)
    results = [
        sde_step(x, v, table(seed % 997).to(DEVICE), step_R.to(DEVICE), seed=seed,
                 sample_id=sample_id.to(DEVICE), uncond=uncond if guided else None, m_prev=m,
                 guidance=guidance, model_dtype=model_dtype, keep_u=True, backend=backend)
        for backend in ("triton", "torch")
    ]  # fmt: skip
    size = 1 + float(results[1].x.abs().max()) + float(results[1].u.abs().max())
    for name in ("x", "u"):
        mine, reference = (getattr(r, name) for r in results)
        assert float((mine - reference).abs().max()) < 5e-6 * size, name


def test_a_row_that_cannot_be_stepped_is_nan_where_looking_would_synchronise():
    """The kernel cannot raise: a step outside the table, noise without seed, C without m_prev."""
    x = torch.ones(1, 8, device=DEVICE)
    rows = table().to(DEVICE)

    def kernel(step, m_prev, seed):
        outputs = module._sde_step_op(
            x, x, None, m_prev, rows, torch.tensor([step], device=DEVICE), seed,
            torch.zeros(1, dtype=torch.int64, device=DEVICE), 1.0, torch.float32,
            False, False, False,
        )  # fmt: skip
        return outputs[0]

    seed = seed_tensor(1, DEVICE)
    assert not kernel(0, x, seed).isnan().any()
    for step, m_prev, given_seed in (
        (-1, x, seed),
        (STEPS, x, seed),
        (0, None, seed),
        (0, x, None),
    ):
        assert kernel(step, m_prev, given_seed).isnan().all()


def leaves(dtype, rows=2, shape=(3,)):
    tensors, step_R, sample_id = inputs(rows=rows, shape=shape)
    tensors = [t.to(dtype).to(DEVICE).requires_grad_() for t in tensors]
    return tensors, step_R.to(DEVICE), sample_id.to(DEVICE)


def test_gradcheck():
    tensors, step_R, sample_id = leaves(torch.float64)

    def step(x, v, uncond, m):
        out = sde_step(x, v, table().to(DEVICE), step_R,
                       **options(step_R, sample_id, (x, v, uncond, m)))  # fmt: skip
        return out.x, out.m

    assert torch.autograd.gradcheck(step, tensors)


@pytest.mark.parametrize("guided", [True, False])
def test_gradients_of_the_kernel_are_the_references(guided):
    grads = []
    for backend in ("triton", "torch"):
        tensors, step_R, sample_id = leaves(torch.float32, rows=4, shape=(40,))
        more = options(step_R, sample_id, tensors, backend=backend, model_dtype=torch.float16)
        if not guided:
            more["uncond"] = None
        out = sde_step(*tensors[:2], table().to(DEVICE), step_R, **more)
        assert not out.u.requires_grad and not out.square_R.requires_grad
        loss = out.x.square().sum() + out.m.sum() + (3 * out.model_input.float()).sum()
        (loss + out.velocity.sum()).backward()
        grads.append([t.grad for t in tensors])
    for mine, reference in zip(*grads, strict=True):
        if reference is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("guided", [True, False])
def test_opcheck(guided):
    tensors, step_R, sample_id = leaves(torch.float32, rows=3, shape=(40,))
    tensors[2] = tensors[2] if guided else None
    torch.library.opcheck(
        torch.ops.gardo.sde_step.default,
        (*tensors, table().to(DEVICE), step_R, seed_tensor(1, DEVICE), sample_id, 2.0,
         torch.bfloat16, True, guided, True),
    )  # fmt: skip


def test_a_compiler_sees_one_graph():
    tensors, step_R, sample_id = inputs()
    x, v, _, m = (t.float().to(DEVICE) for t in tensors)
    step_R, sample_id, rows = step_R.to(DEVICE), sample_id.to(DEVICE), table().to(DEVICE)
    seed = seed_tensor(9, DEVICE)

    def step(x, v):
        out = sde_step(x, v, rows, step_R, seed=seed, sample_id=sample_id, m_prev=m, keep_u=True,
                       keep_square=True, model_dtype=torch.bfloat16, backend="triton")  # fmt: skip
        return out.x, out.model_input, out.u, out.square_R

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for mine, eager in itertools.zip_longest(compiled(x, v), step(x, v)):
        assert torch.equal(mine, eager)


@pytest.mark.gpu
def test_a_captured_graph_draws_new_noise():
    x = torch.zeros(2, 4096, device=DEVICE)
    ids, seed = torch.arange(2, device=DEVICE), seed_tensor(1, DEVICE)
    rows, step_R = table(C=False).to(DEVICE), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    sde_step(x, x, rows, step_R, seed=seed, sample_id=ids)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sde_step(x, x, rows, step_R, seed=seed, sample_id=ids)
    drawn = []
    for value in (1, 2, 1):
        seed.fill_(value)
        graph.replay()
        drawn.append(out.x.clone())
        eager = sde_step(x, x, rows, step_R, seed=value, sample_id=ids)
        assert torch.equal(drawn[-1], eager.x)
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])


@pytest.mark.gpu
def test_ten_runs_give_equal_bits():
    tensors, step_R, sample_id = inputs(rows=8, shape=(4096, 16), dtype=torch.bfloat16)
    tensors = [t.to(DEVICE) for t in tensors]
    tensors[0], tensors[3] = tensors[0].float(), tensors[3].float()
    ids = (step_R.to(DEVICE), sample_id.to(DEVICE))
    runs = [
        sde_step(*tensors[:2], table().to(DEVICE), ids[0], **options(*ids, tensors))
        for _ in range(10)
    ]
    for run, name in itertools.product(runs[1:], OUTPUTS):
        assert torch.equal(getattr(run, name), getattr(runs[0], name)), name


def test_bad_inputs():
    tensors, step_R, ids = inputs()
    x, v, uncond, m = (t.float() for t in tensors)
    rows = table()
    good = {"seed": 1, "sample_id": ids, "m_prev": m}
    with pytest.raises(ValueError, match=r"v has shape \(2, 4, 5\)"):
        sde_step(x, v[:2], rows, step_R, **good)
    with pytest.raises(ValueError, match="uncond has shape"):
        sde_step(x, v, rows, step_R, **good, uncond=uncond[..., :1])
    with pytest.raises(ValueError, match="x has shape"):
        sde_step(x[:0], v[:0], rows, step_R[:0])
    with pytest.raises(ValueError, match="x has shape"):
        sde_step(x[:, 0, 0], v[:, 0, 0], rows, step_R)
    with pytest.raises(ValueError, match=r"v has dtype torch.int64"):
        sde_step(x, v.long(), rows, step_R, **good)
    with pytest.raises(ValueError, match="v is on meta but x is on cpu"):
        sde_step(x, v.to("meta"), rows, step_R, **good)
    with pytest.raises(ValueError, match="table_TK is on meta"):
        sde_step(x, v, rows.to("meta"), step_R, **good)
    for wrong in (rows[:, :5], rows[0], rows.double()):
        with pytest.raises(ValueError, match="begins with the columns sigma, A, B, C, std"):
            sde_step(x, v, wrong, step_R, **good)
    with pytest.raises(ValueError, match="step_R has shape"):
        sde_step(x, v, rows, step_R[:1], **good)
    with pytest.raises(ValueError, match="step_R has dtype"):
        sde_step(x, v, rows, step_R.int(), **good)
    for wrong in (-1, STEPS):
        with pytest.raises(ValueError, match=rf"step_R is .*{wrong}.*the table has 4 steps"):
            sde_step(x, v, rows, torch.full_like(step_R, wrong), **good)
    with pytest.raises(ValueError, match="pass seed and sample_id together"):
        sde_step(x, v, rows, step_R, seed=1, m_prev=m)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match=f"seed is {seed}"):
            sde_step(x, v, rows, step_R, **(good | {"seed": seed}))
    with pytest.raises(ValueError, match=r"pass \[1\] int64"):
        sde_step(x, v, rows, step_R, **(good | {"seed": torch.zeros(2)}))
    with pytest.raises(ValueError, match="sample_id has shape"):
        sde_step(x, v, rows, step_R, **(good | {"sample_id": ids[:1]}))
    with pytest.raises(ValueError, match=r"pass \[B\] int64"):
        sde_step(x, v, rows, step_R, **(good | {"sample_id": ids.float()}))
    noisy = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="seed is None but std is"):
        sde_step(x, v, rows, noisy, m_prev=m)
    with pytest.raises(ValueError, match="m_prev is None but C is"):
        sde_step(x, v, rows, noisy, seed=1, sample_id=ids)
    with pytest.raises(ValueError, match="the kernels work in fp32"):
        sde_step(x.double(), v, rows, noisy, **good, backend="triton")
