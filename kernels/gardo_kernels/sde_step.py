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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gardo_kernels._examples import Examples, On
from gardo_kernels._launch import (
    INTERPRETED,
    Backend,
    block_and_row,
    cdiv,
    check_device,
    check_like,
    check_rows,
    check_samples,
    choose_backend,
    compute_dtype,
    grid_of_rows,
    launch,
    looked_on,
)
from gardo_kernels._launch_shape import LaunchShape, launch_shape, leaves_idle
from gardo_kernels.philox import (
    Seed,
    check_ids,
    halves,
    interleave,
    normal_pair,
    philox_words,
    random_normal_ref,
    seed_tensor,
)

# What a table of steps begins with; more columns may follow.
STEP_COLUMNS = ("sigma", "A", "B", "C", "std", "u_scale")


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
        start = uncond.to(dtype)
        velocity = (start + guidance * (v.to(dtype) - start)).to(v.dtype)
    stepped = velocity.to(dtype)
    x_next = A * x.to(dtype) + B * stepped
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
        m=x.to(dtype) - sigma * stepped,
        square_R=(std * z).detach().square().flatten(1).mean(1),
    )


# ---- kernel --------------------------------------------------------------------------------------


@triton.jit
def _sde_step_fwd_kernel(
    x_ptr, v_ptr, uncond_ptr, m_prev_ptr, table_ptr, step_ptr, seed_ptr, id_ptr,
    x_next_ptr, model_input_ptr, velocity_ptr, u_ptr, m_ptr, sums_ptr,
    elements, steps, columns, guidance, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of a row; sums[row, block] = the block's sum of (std z)^2.

    Inputs and outputs without a tensor are left out.
    """
    block, row = block_and_row(elements, BLOCK)
    step = tl.load(step_ptr + row)
    in_table = (step >= 0) & (step < steps)  # a step outside the table gives NaN
    entry = table_ptr + step * columns
    sigma = tl.load(entry, mask=in_table, other=float("nan"))
    A = tl.load(entry + 1, mask=in_table, other=float("nan"))
    B = tl.load(entry + 2, mask=in_table, other=float("nan"))
    C = tl.load(entry + 3, mask=in_table, other=float("nan"))
    std = tl.load(entry + 4, mask=in_table, other=float("nan"))
    u_scale = tl.load(entry + 5, mask=in_table, other=float("nan"))
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    at = row * elements + element
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + at, mask=inside, other=0.0).to(tl.float32)
        velocity = (uncond + guidance * (v - uncond)).to(velocity_ptr.dtype.element_ty)
        tl.store(velocity_ptr + at, velocity, mask=inside)
        v = velocity.to(tl.float32)
    x_next = A * x + B * v
    if m_prev_ptr is not None:
        x_next += C * tl.load(m_prev_ptr + at, mask=inside, other=0.0).to(tl.float32)
    else:
        x_next += tl.where(C == 0, 0.0, float("nan"))
    noise = tl.zeros((BLOCK,), tl.float32)
    if seed_ptr is not None:
        if std != 0:
            seed_low, seed_high = halves(tl.load(seed_ptr))
            id_low, id_high = halves(tl.load(id_ptr + row))
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
    tl.store(x_next_ptr + at, x_next, mask=inside)
    if model_input_ptr is not None:
        rounded = x_next.to(model_input_ptr.dtype.element_ty)
        tl.store(model_input_ptr + at, rounded, mask=inside)
    if u_ptr is not None:
        tl.store(u_ptr + at, u_scale * noise, mask=inside)
    if m_ptr is not None:
        tl.store(m_ptr + at, x - sigma * v, mask=inside)
    if sums_ptr is not None:
        square = tl.sum(tl.where(inside, noise * noise, 0.0)) * std * std
        tl.store(sums_ptr + tl.program_id(0), square)


# ---- op ------------------------------------------------------------------------------------------

WIDE = LaunchShape(block=2048)
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def default_shape(R: int, N: int, device: torch.device, guided: bool = False) -> LaunchShape:
    """16 elements a thread where registers hold them and no multiprocessor stays idle."""
    return LaunchShape() if guided or leaves_idle(R, N, WIDE.block, device) else WIDE


def _empty(
    x: Tensor, v: Tensor, uncond: Tensor | None, model_dtype: torch.dtype, keep_u: bool,
    keep_m: bool, keep_square: bool,
) -> Outputs:  # fmt: skip
    """x', its copy, the guided velocity, u, m like x, square [R]; empty where not asked for."""

    def empty(kept: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        return x.new_empty(x.shape if kept else 0, dtype=dtype)

    return (
        empty(True),
        empty(model_dtype != torch.float32, model_dtype),
        empty(uncond is not None, v.dtype),
        empty(keep_u),
        empty(keep_m),
        x.new_empty(x.shape[0] if keep_square else 0, dtype=torch.float32),
    )


def _launch_step(
    x: Tensor, v: Tensor, uncond: Tensor | None, m_prev: Tensor | None, table_TK: Tensor,
    step_R: Tensor, seed: Tensor | None, sample_id_R: Tensor | None, guidance: float,
    model_dtype: torch.dtype, keep_u: bool, keep_m: bool, keep_square: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`Outputs` of inputs that are contiguous, as `_empty` lays them out."""
    R, (steps, columns) = x.shape[0], table_TK.shape
    N = x.numel() // R
    default = default_shape(R, N, x.device, guided=uncond is not None)
    shape = launch_shape("sde_step", R, N, x.device, default)
    outputs = _empty(x, v, uncond, model_dtype, keep_u, keep_m, keep_square)
    x_next, model_input, velocity, u, m = (t if t.shape[0] else None for t in outputs[:5])
    sums_RC = x.new_empty(R, cdiv(N, shape.block), dtype=torch.float32) if keep_square else None
    launch(
        _sde_step_fwd_kernel, grid_of_rows(R, N, shape.block), shape, x_ptr=x, v_ptr=v,
        uncond_ptr=uncond, m_prev_ptr=m_prev, table_ptr=table_TK, step_ptr=step_R, seed_ptr=seed,
        id_ptr=sample_id_R, x_next_ptr=x_next, model_input_ptr=model_input, velocity_ptr=velocity,
        u_ptr=u, m_ptr=m, sums_ptr=sums_RC, elements=N, steps=steps, columns=columns,
        guidance=guidance, FAST=not INTERPRETED, BLOCK=shape.block,
    )  # fmt: skip
    return outputs if sums_RC is None else (*outputs[:5], sums_RC.sum(1) / N)


_sde_step_op = torch.library.custom_op("gardo::sde_step", _launch_step, mutates_args=())


@_sde_step_op.register_fake
def _(x: Tensor, v: Tensor, uncond: Tensor | None, *others: Any) -> Outputs:
    return _empty(x, v, uncond, *others[-4:])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, v, uncond, m_prev, table_TK, step_R, _, _, ctx.guidance, *_ = inputs
    ctx.save_for_backward(table_TK, step_R)
    ctx.dtypes = [None if t is None else t.dtype for t in (x, v, uncond, m_prev)]
    ctx.mark_non_differentiable(output[3], output[5])
    ctx.set_materialize_grads(False)


def _backward(ctx, g_x, g_model_input, g_velocity, _u, g_m, _square):  # type: ignore[no-untyped-def]
    """Every output is linear in x, v, v_uncond and m_prev; rounding passes gradients through."""
    # what was not kept is empty, and so is its gradient where a compiler hands one in
    g_x, g_model_input, g_velocity, g_m = (
        None if t is None or t.numel() == 0 else t.float()
        for t in (g_x, g_model_input, g_velocity, g_m)
    )
    table_TK, step_R = ctx.saved_tensors
    like = next(t for t in (g_x, g_model_input, g_velocity, g_m) if t is not None)
    columns_R4 = table_TK[step_R, :4].view(-1, 4, *[1] * (like.ndim - 1))
    sigma, A, B, C = columns_R4.unbind(1)
    used = [t for t in (g_x, g_model_input) if t is not None]
    g = sum(used) if used else torch.zeros_like(like)
    x, v, m_prev = A * g, B * g, C * g
    if g_velocity is not None:
        v = v + g_velocity
    if g_m is not None:
        x, v = x + g_m, v - sigma * g_m
    guided = ctx.dtypes[2] is not None
    grads = (x, ctx.guidance * v if guided else v, (1 - ctx.guidance) * v, m_prev)
    of_inputs = [None if d is None else t.to(d) for t, d in zip(grads, ctx.dtypes, strict=True)]
    return *of_inputs, *[None] * 9


_sde_step_op.register_autograd(_backward, setup_context=_save)


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
    and not under a compiler; elsewhere that would cost a synchronisation: a step outside the table,
    noise without a seed or C without m_prev raise ValueError there, and give NaN in the row
    elsewhere. Source: the table of `gardo.flow`; Flow-GRPO, arXiv 2505.05470.
    """
    op, samples = "sde_step", {"v": v, "uncond": uncond, "m_prev": m_prev}
    check_samples(op, "x", x)
    for name, tensor in samples.items():
        if tensor is not None:
            check_like(op, name, tensor, "x", x)
    _check_rows(op, x, table_TK, step_R, seed, sample_id)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(op, table_TK, step_R, std=("seed", seed), C=("m_prev", m_prev))
    model_dtype = model_dtype or torch.float32
    if choose_backend(op, backend, x, v) == "torch":
        z = None
        if seed is not None and sample_id is not None:
            z = random_normal_ref(seed, sample_id, step_R, x[0].numel()).view(x.shape)
        out = sde_step_ref(
            x, v, z, table_TK[step_R], uncond=uncond, guidance=guidance, m_prev=m_prev
        )
        return Step(
            x=out.x, model_input=out.x.to(model_dtype), velocity=out.velocity,
            u=out.u if keep_u else None, m=out.m if keep_m else None,
            square_R=out.square_R if keep_square else None,
        )  # fmt: skip
    tensors = [None if t is None else t.contiguous() for t in (x, *samples.values())]
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    step: Callable[..., Any] = _sde_step_op if trained or looked_on() else _launch_step
    x_next, model_input, velocity, u, m, square_R = step(
        *tensors, table_TK.contiguous(), step_R.contiguous(),
        None if seed is None else seed_tensor(seed, x.device),
        None if sample_id is None else sample_id.contiguous(), guidance, model_dtype,
        keep_u, keep_m, keep_square,
    )  # fmt: skip
    return Step(
        x=x_next, model_input=x_next if model_dtype == torch.float32 else model_input,
        velocity=v if uncond is None else velocity, u=u if keep_u else None,
        m=m if keep_m else None, square_R=square_R if keep_square else None,
    )  # fmt: skip


def _check_rows(
    op: str, x: Tensor, table_TK: Tensor, step_R: Tensor, seed: Seed | None,
    sample_id: Tensor | None,
) -> None:  # fmt: skip
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


def _check_values(
    op: str, table_TK: Tensor, step_R: Tensor, **terms: tuple[str, Seed | Tensor | None]
) -> None:
    """Every step is one of the table's, and where a term is None its column is 0."""
    if bool(((step_R < 0) | (step_R >= len(table_TK))).any()):
        raise ValueError(f"{op}: step_R is {step_R.tolist()}; the table has {len(table_TK)} steps")
    for column, (name, term) in terms.items():
        factor_R = table_TK[step_R, STEP_COLUMNS.index(column)]
        if term is None and bool((factor_R != 0).any()):
            raise ValueError(
                f"{op}: {name} is None but {column} is {factor_R.tolist()}; pass {name}, or rows "
                f"whose {column} is 0"
            )


def examples(on: On) -> Examples:
    """Unguided as a rollout calls it, and with all that there is; see `_examples.py`."""
    v, uncond, x, m_prev = on.samples(4)
    row_R = on.row_index()
    columns = {"sigma": 0.5, "A": 0.9, "B": -0.2, "C": 0.0, "std": 0.4, "u_scale": -2.0}
    table_TK = torch.tensor([columns[name] for name in STEP_COLUMNS], device=on.device)[None]
    plain: dict[str, Any] = {
        "seed": 1, "sample_id": row_R, "keep_u": True, "model_dtype": on.dtype
    }  # fmt: skip
    more = {"uncond": uncond, "guidance": 2.0, "m_prev": m_prev.float(), "keep_m": True,
            "keep_square": True}  # fmt: skip
    for name, table, options in (("", table_TK, plain), ("guided", table_TK + 0.1, plain | more)):
        out = sde_step(x.float(), v, table, 0 * row_R, **options, backend=on.backend)
        yield name, [value for value in vars(out).values() if value is not None]
