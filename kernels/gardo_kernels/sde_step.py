"""One step of any affine sampler, its noise drawn inside: x' = A x + B v + C m_prev + std z.

For row r of R, at denoise step t_r of a table of T steps (`gardo.flow`), element e of sample i:

    v  = v_cond                                        or, guided,
         v_uncond + guidance (v_cond - v_uncond)       rounded to the dtype of the velocities
    z  = Philox normal of (seed, i, t_r, e)            drawn where std is not 0
    x' = A x + B v + C m_prev + std z                  fp32, and rounded to the model's dtype
    u  = u_scale z = (std / B) z                       the noise in velocity units
    m  = x - sigma v                                   the image predicted, for the next step's C
    square = mean_e (x' - A x - B v - C m_prev)^2 = std^2 mean_e z^2

so that log p(x' | x) = -h square + log_std_term. The rows of a batch may stand at different steps.
The noise does not depend on the batch, the number of ranks or the block size. Guided velocities are
rounded before they are used: training sees the very velocity that the sampler used.

Least traffic: x and v in, x' and its copy for the model out: 12 bytes an element in bf16. One
launch; the seed is read through a pointer, so that a captured graph draws anew when the seed's
tensor is written. Called once a denoise step by `gardo.rollout`.

Shapes: R rows, N elements (any dimensions after the first), T steps, K columns of the table.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels._launch import (
    INTERPRETED,
    Backend,
    block_and_row,
    check_device,
    check_like,
    check_rows,
    check_samples,
    choose_backend,
    compute_dtype,
    grid_of_rows,
    launch,
)
from gardo_kernels.philox import (
    Seed,
    check_ids,
    interleave,
    low_high,
    normal_pair,
    philox_words,
    random_normal_ref,
    seed_tensor,
)

# What a table of steps begins with; more columns may follow.
STEP_COLUMNS = ("sigma", "A", "B", "C", "std", "u_scale")
BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Step:
    """What one step gave; None for what was not asked for.

    x [R, ...] fp32 (fp64 where x or v is fp64); model_input: x in the model's dtype; velocity: what
    the step used, in the dtype of v; u, m [R, ...] like x; square_R [R], of the noise.
    """

    x: Tensor
    model_input: Tensor
    velocity: Tensor
    u: Tensor | None = None
    m: Tensor | None = None
    square_R: Tensor | None = None


def sde_step_ref(
    x: Tensor,
    v: Tensor,
    z: Tensor | None,
    coefficients_RK: Tensor,
    *,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    m_prev: Tensor | None = None,
) -> Step:
    """The formula in plain torch, differentiable in x, v, uncond, z, m_prev; model_input is x."""
    dtype = compute_dtype(x, v)
    sigma, A, B, C, std, u_scale = (
        c.view(-1, *[1] * (x.ndim - 1))
        for c in coefficients_RK[:, : len(STEP_COLUMNS)].to(dtype).unbind(1)
    )
    velocity = v
    if uncond is not None:
        low, wide = uncond.to(dtype), v.to(dtype)
        velocity = (low + guidance * (wide - low)).to(v.dtype)
    wide = velocity.to(dtype)
    x_next = A * x.to(dtype) + B * wide
    for coefficient, term in ((C, m_prev), (std, z)):
        if term is not None:
            x_next = x_next + coefficient * term.to(dtype)
        else:  # a row without the term must have the coefficient 0
            x_next = torch.where(coefficient == 0, x_next, torch.nan)
    z = torch.zeros_like(x_next) if z is None else z.to(dtype)
    return Step(
        x=x_next,
        model_input=x_next,
        velocity=velocity,
        u=(u_scale * z).detach(),
        m=x.to(dtype) - sigma * wide,
        square_R=(std * z).detach().square().flatten(1).mean(1),
    )


# ---- kernel --------------------------------------------------------------------------------------


@triton.jit
def _sde_step_fwd_kernel(
    x_ptr, v_ptr, uncond_ptr, m_prev_ptr, table_ptr, step_ptr, seed_ptr, id_ptr,
    x_next_ptr, low_ptr, velocity_ptr, u_ptr, m_ptr, sums_ptr,
    elements, steps, columns, guidance,
    HAS_NOISE: tl.constexpr, GUIDED: tl.constexpr, HAS_M: tl.constexpr, KEEP_LOW: tl.constexpr,
    KEEP_U: tl.constexpr, KEEP_M: tl.constexpr, KEEP_SQUARE: tl.constexpr, FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of a row; sums[row, block] = the block's sum of (std z)^2."""
    block, row = block_and_row(elements, BLOCK)
    step = tl.load(step_ptr + row)
    within = (step >= 0) & (step < steps)  # a step outside the table gives NaN
    at = table_ptr + step * columns
    sigma = tl.load(at, mask=within, other=float("nan"))
    A = tl.load(at + 1, mask=within, other=float("nan"))
    B = tl.load(at + 2, mask=within, other=float("nan"))
    C = tl.load(at + 3, mask=within, other=float("nan"))
    std = tl.load(at + 4, mask=within, other=float("nan"))
    u_scale = tl.load(at + 5, mask=within, other=float("nan"))
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    here = row * elements + element
    x = tl.load(x_ptr + here, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + here, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        uncond = tl.load(uncond_ptr + here, mask=inside, other=0.0).to(tl.float32)
        rounded = (uncond + guidance * (v - uncond)).to(velocity_ptr.dtype.element_ty)
        tl.store(velocity_ptr + here, rounded, mask=inside)
        v = rounded.to(tl.float32)
    x_next = A * x + B * v
    if HAS_M:
        x_next += C * tl.load(m_prev_ptr + here, mask=inside, other=0.0).to(tl.float32)
    else:
        x_next += tl.where(C == 0, 0.0, float("nan"))
    noise = tl.zeros((BLOCK,), tl.float32)
    if HAS_NOISE:
        if std != 0:
            seed_low, seed_high = low_high(tl.load(seed_ptr))
            id_low, id_high = low_high(tl.load(id_ptr + row))
            quad = (block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
            a, b, c, d = philox_words(
                quad, step.to(tl.uint32), id_low, id_high, seed_low, seed_high
            )
            n0, n1 = normal_pair(a, b, FAST)
            n2, n3 = normal_pair(c, d, FAST)
            noise = interleave(n0, n1, n2, n3, BLOCK)
        x_next += std * noise
    else:
        x_next += tl.where(std == 0, 0.0, float("nan"))
    tl.store(x_next_ptr + here, x_next, mask=inside)
    if KEEP_LOW:
        tl.store(low_ptr + here, x_next.to(low_ptr.dtype.element_ty), mask=inside)
    if KEEP_U:
        tl.store(u_ptr + here, u_scale * noise, mask=inside)
    if KEEP_M:
        tl.store(m_ptr + here, x - sigma * v, mask=inside)
    if KEEP_SQUARE:
        square = tl.sum(tl.where(inside, noise * noise, 0.0)) * std * std
        tl.store(sums_ptr + tl.program_id(0), square)


# ---- op ------------------------------------------------------------------------------------------


@torch.library.custom_op("gardo::sde_step", mutates_args=())
def _sde_step_op(
    x_RN: Tensor,
    v_RN: Tensor,
    uncond_RN: Tensor | None,
    m_prev_RN: Tensor | None,
    table_TK: Tensor,
    step_R: Tensor,
    seed: Tensor | None,
    sample_id_R: Tensor | None,
    guidance: float,
    model_dtype: torch.dtype,
    keep_u: bool,
    keep_m: bool,
    keep_square: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x', its copy, the guided velocity, u, m [R, N], sums [R, blocks]; empty where not kept."""
    R, N = x_RN.shape
    guided, keep_low = uncond_RN is not None, model_dtype != torch.float32
    outputs = _empty(x_RN, v_RN, guided, model_dtype, keep_u, keep_m, keep_square)
    launch(
        _sde_step_fwd_kernel, grid_of_rows(R, N, BLOCK),
        x_RN, v_RN, uncond_RN, m_prev_RN, table_TK, step_R, seed, sample_id_R, *outputs,
        N, *table_TK.shape, guidance,
        HAS_NOISE=seed is not None, GUIDED=guided, HAS_M=m_prev_RN is not None, KEEP_LOW=keep_low,
        KEEP_U=keep_u, KEEP_M=keep_m, KEEP_SQUARE=keep_square, FAST=not INTERPRETED, BLOCK=BLOCK,
    )  # fmt: skip
    return outputs


def _empty(
    x_RN: Tensor,
    v_RN: Tensor,
    guided: bool,
    model_dtype: torch.dtype,
    keep_u: bool,
    keep_m: bool,
    keep_square: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    R, N = x_RN.shape

    def empty(kept: bool, dtype: torch.dtype, width: int = N) -> Tensor:
        return x_RN.new_empty((R, width) if kept else (0,), dtype=dtype)

    return (
        empty(True, torch.float32),
        empty(model_dtype != torch.float32, model_dtype),
        empty(guided, v_RN.dtype),
        empty(keep_u, torch.float32),
        empty(keep_m, torch.float32),
        empty(keep_square, torch.float32, triton.cdiv(N, BLOCK)),
    )


@_sde_step_op.register_fake
def _(
    x_RN: Tensor, v_RN: Tensor, uncond_RN: Tensor | None, m: object, table: object, step: object,
    seed: object, sample_id: object, guidance: float, model_dtype: torch.dtype, *keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _empty(x_RN, v_RN, uncond_RN is not None, model_dtype, *keep)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, v, uncond, m_prev, table_TK, step_R, _, _, ctx.guidance, *_ = inputs
    ctx.save_for_backward(table_TK, step_R)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, v, uncond, m_prev)]
    ctx.mark_non_differentiable(output[3], output[5])
    ctx.set_materialize_grads(False)


def _backward(ctx, g_x, g_low, g_velocity, _u, g_m, _sums):  # type: ignore[no-untyped-def]
    """Every output is linear in x, v, v_uncond and m_prev; rounding passes gradients through."""
    # what was not kept is empty, and so is its gradient where a compiler hands one in
    g_x, g_low, g_velocity, g_m = (
        None if t is None or t.numel() == 0 else t.float() for t in (g_x, g_low, g_velocity, g_m)
    )
    table_TK, step_R = ctx.saved_tensors
    sigma, A, B, C = table_TK[step_R, :4].unsqueeze(-1).unbind(1)
    g = sum(t for t in (g_x, g_low) if t is not None)  # 0 where neither is used
    x, v, m_prev = A * g, B * g, C * g
    if g_velocity is not None:
        v = v + g_velocity
    if g_m is not None:
        x, v = x + g_m, v - sigma * g_m
    guided = ctx.dtypes[2] is not None
    grads = (x, ctx.guidance * v if guided else v, (1 - ctx.guidance) * v, m_prev)
    of_inputs = [None if d is None else t.to(d) for t, d in zip(grads, ctx.dtypes, strict=True)]
    return *of_inputs, *[None] * 9


_sde_step_op.register_autograd(_backward, setup_context=_keep)


def sde_step(
    x: Tensor,
    v: Tensor,
    table_TK: Tensor,
    step_R: Tensor,
    *,
    seed: Seed | None = None,
    sample_id: Tensor | None = None,
    uncond: Tensor | None = None,
    guidance: float = 1.0,
    m_prev: Tensor | None = None,
    model_dtype: torch.dtype | None = None,
    keep_u: bool = False,
    keep_m: bool = False,
    keep_square: bool = False,
    backend: Backend = "auto",
) -> Step:
    """One sampler step of every row, at the denoise step of the table that the row stands at.

    x, v, uncond, m_prev: [R, ...] of equal shape, any floating dtype. table_TK: [T, K] fp32, K at
    least 6, first the columns STEP_COLUMNS. step_R: [R] int64 from 0 to T - 1, also the stream of
    the row's noise. seed: an integer, or its tensor ([1] int64, as `seed_tensor` makes); sample_id:
    [R] int64, the global identity of each sample. Without a seed no noise is drawn, which is right
    where every row's std is 0; without m_prev every row's C must be 0. model_dtype: the dtype of
    `Step.model_input`, fp32 if left out. keep_u, keep_m, keep_square ask for more of `Step`.

    Arithmetic is fp32 (fp64 where x or v is fp64). Differentiable in x, v, uncond and m_prev.

    ValueError for shapes, dtypes or devices that do not fit. Values are looked at on a CPU only,
    elsewhere that would cost a synchronisation: a step outside the table, noise without a seed or C
    without m_prev raise ValueError there, and give NaN in the row elsewhere. Source: the table of
    `gardo.flow`; Flow-GRPO, arXiv 2505.05470.
    """
    op = "sde_step"
    _check(op, x, v, table_TK, step_R, seed, sample_id, uncond, m_prev)
    model_dtype = model_dtype or torch.float32
    if choose_backend(op, backend, x, v) == "triton":
        return _sde_step_triton(
            x, v, table_TK, step_R, seed, sample_id, uncond, m_prev, guidance, model_dtype,
            keep_u, keep_m, keep_square,
        )  # fmt: skip
    z = None
    if seed is not None and sample_id is not None:
        z = random_normal_ref(seed, sample_id, step_R, x[0].numel()).view(x.shape)
    coefficients_RK = table_TK[step_R]
    out = sde_step_ref(x, v, z, coefficients_RK, uncond=uncond, guidance=guidance, m_prev=m_prev)
    return Step(
        x=out.x,
        model_input=out.x.to(model_dtype),
        velocity=out.velocity,
        u=out.u if keep_u else None,
        m=out.m if keep_m else None,
        square_R=out.square_R if keep_square else None,
    )


def _sde_step_triton(
    x: Tensor,
    v: Tensor,
    table_TK: Tensor,
    step_R: Tensor,
    seed: Seed | None,
    sample_id: Tensor | None,
    uncond: Tensor | None,
    m_prev: Tensor | None,
    guidance: float,
    model_dtype: torch.dtype,
    *keep: bool,
) -> Step:
    """The kernel on inputs of any layout: what is not contiguous is copied."""
    rows = (None if t is None else t.flatten(1).contiguous() for t in (x, v, uncond, m_prev))
    x_next, low, velocity, u, m, sums = _sde_step_op(
        *rows, table_TK.contiguous(), step_R.contiguous(),
        None if seed is None else seed_tensor(seed, x.device),
        None if sample_id is None else sample_id.contiguous(), guidance, model_dtype, *keep,
    )  # fmt: skip
    keep_u, keep_m, keep_square = keep
    return Step(
        x=x_next.view(x.shape),
        model_input=(x_next if model_dtype == torch.float32 else low).view(x.shape),
        velocity=v if uncond is None else velocity.view(x.shape),
        u=u.view(x.shape) if keep_u else None,
        m=m.view(x.shape) if keep_m else None,
        square_R=sums.sum(1) / x[0].numel() if keep_square else None,
    )


def _check(
    op: str,
    x: Tensor,
    v: Tensor,
    table_TK: Tensor,
    step_R: Tensor,
    seed: Seed | None,
    sample_id: Tensor | None,
    uncond: Tensor | None,
    m_prev: Tensor | None,
) -> None:
    check_samples(op, "x", x)
    for name, tensor in (("v", v), ("uncond", uncond), ("m_prev", m_prev)):
        if tensor is not None:
            check_like(op, name, tensor, "x", x)
    check_rows(op, "step_R", step_R, "x", x)
    if step_R.dtype != torch.int64:
        raise ValueError(f"{op}: step_R has dtype {step_R.dtype}; pass int64")
    check_device(op, "table_TK", table_TK, "x", x)
    columns = len(STEP_COLUMNS)
    if table_TK.ndim != 2 or table_TK.shape[1] < columns or table_TK.dtype != torch.float32:
        raise ValueError(
            f"{op}: table_TK has shape {tuple(table_TK.shape)} and dtype {table_TK.dtype}; pass "
            f"[T, K] fp32 that begins with the columns {', '.join(STEP_COLUMNS)}"
        )
    if (seed is None) != (sample_id is None):
        raise ValueError(f"{op}: pass seed and sample_id together; noise is a function of both")
    if sample_id is not None:
        check_rows(op, "sample_id", sample_id, "x", x)
        check_ids(op, sample_id)
    if x.device.type != "cpu":
        return
    if bool(((step_R < 0) | (step_R >= len(table_TK))).any()):
        raise ValueError(f"{op}: step_R is {step_R.tolist()}; the table has {len(table_TK)} steps")
    for name, term, column in (("seed", seed, "std"), ("m_prev", m_prev, "C")):
        factor_R = table_TK[step_R, STEP_COLUMNS.index(column)]
        if term is None and bool((factor_R != 0).any()):
            raise ValueError(
                f"{op}: {name} is None but {column} is {factor_R.tolist()}; pass {name}, or rows "
                f"whose {column} is 0"
            )
