"""One step of any affine sampler: x' = A x + B v + C m_prev + std z.

A, B, C, std are one scalar a row, from the transition table of `gardo.flow`, so the rows of a batch
may stand at different steps. C and m_prev = x_prev - s_prev v_prev belong to the two-step ODE
solver (`dpm2`); z is standard normal. Arithmetic and result are fp32: a log-probability of a
rounded x' is no longer that of the step (clip ranges are 1e-4).

Least traffic: x, v, z (and m_prev) in, x' out, once each. Called once a denoise step by
`gardo.rollout`.

Shapes: R rows, any element dimensions after it.
"""

import torch
from torch import Tensor

from gardo_kernels._launch import (
    Backend,
    check_like,
    check_rows,
    check_samples,
    choose_backend,
    compute_dtype,
)


def sde_step_ref(
    x: Tensor,
    v: Tensor,
    z: Tensor | None,
    *,
    A: Tensor,
    B: Tensor,
    std: Tensor,
    C: Tensor | None = None,
    m_prev: Tensor | None = None,
) -> Tensor:
    """The formula in plain torch; differentiable in x, v, z, m_prev."""
    dtype = compute_dtype(x, v)

    def per_row(coefficient_R: Tensor) -> Tensor:
        return coefficient_R.to(dtype).view(-1, *[1] * (x.ndim - 1))

    x_next = per_row(A) * x.to(dtype) + per_row(B) * v.to(dtype)
    for coefficient_R, term in ((C, m_prev), (std, z)):
        if term is not None and coefficient_R is not None:
            x_next = x_next + per_row(coefficient_R) * term.to(dtype)
        elif coefficient_R is not None:
            # A row without the term must have the coefficient 0; NaN says so without a host sync.
            x_next = torch.where(per_row(coefficient_R) == 0, x_next, torch.nan)
    return x_next


def sde_step(
    x: Tensor,
    v: Tensor,
    z: Tensor | None,
    *,
    A: Tensor,
    B: Tensor,
    std: Tensor,
    C: Tensor | None = None,
    m_prev: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """x' = A x + B v + C m_prev + std z, elementwise.

    x, v, z, m_prev: [R, ...] of equal shape, bf16, fp16 or fp32 each; A, B, C, std: [R] fp32.
    Returns [R, ...] fp32 (fp64 where x or v is fp64). z may be None where every std is 0, and
    m_prev where C is None or 0 in every row: otherwise a ValueError on CPU, and NaN in those rows
    on other devices, where looking would cost a synchronisation.

    ValueError for shapes, devices or dtypes that do not fit. Source: docs of `gardo.flow`.
    """
    check_samples("sde_step", "x", x)
    for name, tensor in (("v", v), ("z", z), ("m_prev", m_prev)):
        if tensor is not None:
            check_like("sde_step", name, tensor, "x", x)
    for name, tensor in (("A", A), ("B", B), ("std", std), ("C", C)):
        if tensor is not None:
            check_rows("sde_step", name, tensor, "x", x)
    if m_prev is not None and C is None:
        raise ValueError("sde_step: m_prev is given without C; pass its factor C [R] too")
    if x.device.type == "cpu":
        for name, term, factor, coefficient_R in (("z", z, "std", std), ("m_prev", m_prev, "C", C)):
            if term is None and coefficient_R is not None and bool((coefficient_R != 0).any()):
                raise ValueError(
                    f"sde_step: {name} is None but {factor} is {coefficient_R.tolist()}; "
                    f"pass {name}, or rows whose {factor} is 0"
                )
    choose_backend("sde_step", backend)
    return sde_step_ref(x, v, z, A=A, B=B, std=std, C=C, m_prev=m_prev)
