"""The curves of charts: values over steps, how they are smoothed, and how long ones are thinned."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

MOST_POINTS = 500  # more than these are drawn as means of neighbours with their range


@dataclass(frozen=True)
class Series:
    """One curve. Values that are None, NaN or infinite are gaps.

    `low` and `high` are drawn as error bars where `points` is set, else as a band. Where `smooth`
    is above 1, a moving mean of so many values is drawn and the values themselves faint; 0 is for
    what must not be smoothed. `color` is one of eight; the chart chooses by position without it.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    color: int | None = None
    points: bool = False
    smooth: int = 0


@dataclass(frozen=True)
class Mark:
    """An event: a dashed vertical line, hovering shows `label`.

    Marks of one `kind` share a legend entry.
    """

    x: float
    kind: str
    label: str = ""


def smoothed(y: Sequence[float | None], window: int) -> list[float | None]:
    """Centred moving mean of the finite values over `window` neighbours; None where none is."""
    half = window // 2
    result: list[float | None] = []
    for index in range(len(y)):
        near = [value for value in y[max(0, index - half) : index + half + 1] if finite(value)]
        result.append(_mean(near) if near else None)
    return result


def finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def bucket(values: Sequence[float], size: int) -> list[float]:
    return [_mean(values[start : start + size]) for start in range(0, len(values), size)]


def thinned(one: Series) -> Series:
    """A long curve as means of neighbours, with their smallest and largest value as a band."""
    if len(one.y) <= MOST_POINTS or one.points:
        return one
    size = math.ceil(len(one.y) / MOST_POINTS)
    rows = [
        [value for value in one.y[start : start + size] if finite(value)]
        for start in range(0, len(one.y), size)
    ]
    return replace(
        one,
        x=bucket(one.x, size),
        y=[_mean(row) if row else None for row in rows],
        low=[min(row, default=None) for row in rows],
        high=[max(row, default=None) for row in rows],
    )
