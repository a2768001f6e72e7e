"""What the tests of the policy loss ask of the op and of its kernels."""

import torch


def problem(rows=5, shape=(3, 4), dtype=torch.float64, size=0.3, seed=0):
    """Rows within and beyond CLIP, every other one gated, NaN where no reference ran."""
    generator = torch.Generator().manual_seed(seed)
    v, v_old, u, v_ref = torch.randn(4, rows, *shape, generator=generator, dtype=torch.float64)
    v = v_old + size * v
    advantage, h, B = torch.randn(3, rows, generator=generator, dtype=torch.float64)
    gate = torch.arange(rows) % 2 == 0
    v_ref[~gate] = torch.nan
    options = {
        "advantage": 3 * advantage,
        "h": h.abs() + 0.2,
        "B": B,
        "gate": gate,
        "v_ref": v_ref,
        "kl_scale": torch.linspace(0.5, 2.0, rows, dtype=torch.float64),
    }
    options = {k: x.to(dtype) if x.is_floating_point() else x for k, x in options.items()}
    return v.to(dtype), v_old.to(dtype), u.to(dtype), options


CLIP = {"clip_low": 0.2, "clip_high": 0.1}
GUARD = {"quadratic": False, "weight": torch.tensor([10.0, 4.0, 25.0, 1.0, 12.5, 3.0, 8.0, 2.0])}
PLAIN = {"quadratic": True, "weight": None}


def of_rows(variant, rows):
    return {k: x[:rows] if isinstance(x, torch.Tensor) else x for k, x in variant.items()}


def of_kernels(**shape):
    """(samples, options) with row values in fp32, whatever the dtype of the samples."""
    v, v_old, u, options = problem(**shape)
    options = {k: x.float() if x.ndim == 1 and x.is_floating_point() else x
               for k, x in options.items()}  # fmt: skip
    return (v, v_old, u), options
