"""A GPU's rules for NaN, where Triton's interpreter has others: with these every kernel is tested.

`tl.minimum`, `tl.maximum` and `tl.clamp` are min.f32 and max.f32 on a chip, which drop NaN; the
interpreter's are numpy's, which keep it. Its reductions drop NaN, as a chip's do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from triton import language as tl
from triton.runtime.interpreter import InterpreterBuilder


def dropping(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda builder, a, b: builder.binary_op(a, b, op)


def clamped(builder: Any, x: Any, low: Any, high: Any, propagate_nan: Any) -> Any:
    if propagate_nan == tl.PropagateNan.ALL:
        return builder.ternary_op(x, low, high, np.clip)
    return builder.ternary_op(x, low, high, lambda x, low, high: np.fmin(np.fmax(x, low), high))


@pytest.fixture(autouse=True, scope="module")
def nan_as_on_a_chip() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_minnumf", dropping(np.fmin))
        patch.setattr(InterpreterBuilder, "create_maxnumf", dropping(np.fmax))
        patch.setattr(InterpreterBuilder, "create_clampf", clamped)
        yield
