"""What the tests of the losses over rows share: kernels against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there under Triton's interpreter
# Within, at and past a block, and past a chunk; the other dtypes past a block.
SHAPES_AND_DTYPES = [
    *((shape, torch.float32) for shape in ((1,), (64, 16), (5, 300), (4097,))),
    *(((5, 300), dtype) for dtype in (torch.bfloat16, torch.float16)),
]
CASES = pytest.mark.parametrize(("shape", "dtype"), SHAPES_AND_DTYPES)
GATES = st.sampled_from([0.0, 0.5, 1.0])
# Written in the velocities' dtype: bf16 keeps 8 bits (the interpreter cuts, a GPU rounds), fp16 11;
# the gradient itself is asked to be within 1e-5.
GRADIENT_ERROR = {
    torch.float32: 1e-5,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7 if DEVICE == "cpu" else 2.0**-8,
}


def numbers(low, high):
    """Multiples of a 1024th of the range: fp32 holds them, so both precisions are asked the same,
    and no product of them underflows."""
    return st.integers(0, 1024).map(lambda k: low + (high - low) * k / 1024)


def on_device(*tensors):
    return [x.to(DEVICE) for x in tensors]


def answer(op, inputs, options, backend, widen=False, **more):
    """(result, gradient of 3 times the loss to the first input), widened to fp64 or as they are."""

    def move(x):
        if not isinstance(x, torch.Tensor):
            return x
        return x.to(DEVICE).double() if widen and x.is_floating_point() else x.to(DEVICE)

    v, *rest = (move(x) for x in inputs)
    trained = v.detach().requires_grad_()
    named = {name: move(x) for name, x in options.items()}
    out = op(trained, *rest, **named, **more, backend=backend)
    (3.0 * out.loss).backward()
    return out, trained.grad


def both(op, inputs, options, **more):
    """`answer` of the kernels, and of the reference in fp64 on the same numbers."""
    return (
        answer(op, inputs, options, "triton", **more),
        answer(op, inputs, options, "torch", widen=True, **more),
    )


def check_statistics(ours, exact, tolerance):
    """Every field of the result, in fp32, within `tolerance` of the larger of 1 and its value."""
    for name, theirs in vars(exact).items():
        mine = getattr(ours, name)
        assert mine.shape == theirs.shape, name
        if theirs.dtype == torch.bool:
            assert torch.equal(mine, theirs), name
        else:
            assert mine.dtype == torch.float32, name
            torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance)


def check_gradient(grad, exact, dtype):
    assert grad.dtype == dtype and not grad.isnan().any()
    assert (grad.double() - exact).norm() <= GRADIENT_ERROR[dtype] * exact.norm()


def check_repeats(op, inputs, options, times, again=None, **more):
    """The same bits every time, and from `again`, the same numbers in another layout."""
    first, grad = answer(op, inputs, options, "triton", **more)
    for _ in range(times - 1):
        out, same = answer(op, again or inputs, options, "triton", **more)
        assert torch.equal(grad, same)
        for name, x in vars(first).items():
            assert torch.equal(x, getattr(out, name)), name


def check_poisoned(monkeypatch, op, inputs, options, tolerance, **more):
    """No kernel reads what none wrote: every `empty` comes full of NaN, the answer is right."""

    plain = torch.Tensor.new_empty

    def poisoned(self, *size, **options):
        x = plain(self, *size, **options)
        return x.fill_(-1 if x.dtype == torch.int32 else torch.nan)  # bool: true

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        patch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
        ours, grad = answer(op, inputs, options, "triton", **more)
    exact, exact_grad = answer(op, inputs, options, "torch", widen=True, **more)
    check_statistics(ours, exact, tolerance)
    check_gradient(grad, exact_grad, inputs[0].dtype)


def check_one_graph(op, inputs, options, **more):
    """Traced whole by a compiler, with the gradient that eager mode has."""
    v, *rest = on_device(*inputs)
    options = {name: x.to(DEVICE) for name, x in options.items()}

    def loss(trained):
        return op(trained, *rest, **options, **more, backend="triton").loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    eager, traced = (v.clone().requires_grad_() for _ in range(2))
    loss(eager).backward()
    compiled(traced).backward()
    assert torch.equal(eager.grad, traced.grad)
