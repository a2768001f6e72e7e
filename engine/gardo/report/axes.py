"""Where an axis has its ticks, and what stands beside them."""

import math
from collections.abc import Sequence
from itertools import pairwise


def nice_ticks(low: float, high: float, target: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside [low, high], about `target` of them."""
    raw = (high - low) / max(target, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """One notation for all: as many decimals as their distance needs, or a common power of ten."""
    largest = max((abs(tick) for tick in ticks), default=0.0)
    if largest == 0:
        return ["0" for _ in ticks]
    distance = min((b - a for a, b in pairwise(ticks)), default=largest)
    power = math.floor(math.log10(largest) + 1e-9)
    exponent = power if not -3 <= power < 5 else 0
    decimals = max(0, exponent - math.floor(math.log10(distance) + 1e-9))
    labels = []
    for tick in ticks:
        zero = abs(tick) < distance * 1e-6
        text = "0" if zero else f"{tick / 10.0**exponent:.{decimals}f}"
        labels.append(
            (text if zero or not exponent else f"{text}e{exponent}").replace("-", "\u2212")
        )
    return labels
