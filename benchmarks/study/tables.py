"""The study's tables, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan, nan
from statistics import fmean

from gardo.evaluation.statistics import Interval
from study.lead import SIGNALS, Seen
from study.measures import (
    HELD_OUT,
    MEASURES,
    NEVER,
    PATCHES,
    PROXY,
    Arms,
    images_to_level,
    interval,
    of_arm,
    paired,
    wins,
)
from study.protocol import SIGNS_TITLES, Protocol
from study.raw import Raw

SHOWN = {  # measure: (title, digits, sign)
    "proxy": ("proxy", 1, "+"),
    "held_out": ("held-out", 1, "+"),
    "patches": ("patches", 1, "+"),
    "gated": ("gated, %", 0, ""),
    "layout": ("layout", 2, ""),
    "size": ("size", 2, ""),
    "hue": ("hue", 2, ""),
    "features": ("features", 2, ""),
    "drift": ("drift, nats", 0, ""),
}
AREAS = {
    "area_proxy": ("area under the proxy", 1, "+"),
    "area_held_out": ("under the held-out", 1, "+"),
    "area_both": ("under both", 1, "+"),
}
FORMS = SHOWN | AREAS


def line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def header(cells: Sequence[str]) -> list[str]:
    return [line(cells), "|---" * len(cells) + "|"]


def shown(value: Interval, digits: int, sign: str) -> str:
    mean, low, high = (f"{v:{sign}.{digits}f}" for v in (value.mean, value.low, value.high))
    return mean if isnan(value.low) else f"{mean} [{low}, {high}]"


def summary(
    arms: Arms, titles: Mapping[str, str], hacked: float, measures: Sequence[str] = tuple(SHOWN)
) -> str:
    """A row an arm: means over its seeds, and in how many of them it was hacked."""
    lines = header(["", "seeds", *(FORMS[name][0] for name in measures), "hacked"])
    for arm, title in titles.items():
        cells = [
            shown(interval([*of_arm(arms, arm, name).values()]), *FORMS[name][1:])
            for name in measures
        ]
        falls = [value <= -hacked for value in of_arm(arms, arm, "held_out").values()]
        lines.append(line([title, len(falls), *cells, f"{sum(falls)} of {len(falls)}"]))
    return "\n".join(lines)


def against(arms: Arms, titles: Mapping[str, str], one: str) -> str:
    """`one` less every other arm, paired by seed, and in how many seeds it is higher."""
    measures = ("proxy", "held_out", "area_both")
    heads = [h for m in measures for h in (FORMS[m][0], "wins")]
    lines = header([f"{titles[one]} less", *heads])
    for other, title in titles.items():
        if other == one:
            continue
        cells: list[str] = []
        for measure in measures:
            _, digits, _ = FORMS[measure]
            won, of = wins(arms, one, other, measure)
            cells.append(shown(interval(paired(arms, one, other, measure)), digits, "+"))
            cells.append(f"{won:g} of {of}")
        lines.append(line([title, *cells]))
    return "\n".join(lines)


def matrix(arms: Arms, titles: Mapping[str, str]) -> str:
    """Arm against arm: in how many of the seeds that both have the row's is higher, by proxy and
    by held-out."""
    lines = header(["proxy / held-out wins against", *titles.values()])
    for one, title in titles.items():
        cells = []
        for other in titles:
            (proxy, of), (held_out, _) = (wins(arms, one, other, m) for m in ("proxy", "held_out"))
            cells.append("" if one == other else f"{proxy:g} / {held_out:g} of {of}")
        lines.append(line([title, *cells]))
    return "\n".join(lines)


def by_seed(arms: Arms, titles: Mapping[str, str]) -> str:
    """Proxy and held-out change of every seed."""
    seeds = sorted({seed for curves in arms.values() for seed in curves})
    lines = header(["proxy / held-out, change", *(f"seed {seed}" for seed in seeds)])
    for arm, title in titles.items():
        proxy, held_out = (of_arm(arms, arm, m) for m in ("proxy", "held_out"))
        cells = [
            f"{proxy[seed]:+.1f} / {held_out[seed]:+.1f}" if seed in proxy else "" for seed in seeds
        ]
        lines.append(line([title, *cells]))
    return "\n".join(lines)


def to_level(arms: Arms, titles: Mapping[str, str], protocol: Protocol) -> str:
    """Images until the proxy has risen by the level while the held-out has not fallen."""
    rules, images = protocol.rules, protocol.images
    lines = header(["", "reached", "images, median of those that reached it"])
    for arm, title in titles.items():
        counts = [images_to_level(c, images, rules) for c in arms[arm].values()]
        reached = sorted(n for n in counts if n != NEVER)
        middle = f"{reached[(len(reached) - 1) // 2]:.0f}" if reached else "never"
        lines.append(line([title, f"{len(reached)} of {len(counts)}", middle]))
    return "\n".join(lines)


def catches(raws: Mapping[str, Mapping[int, Raw]], titles: Mapping[str, str]) -> str:
    """Held-out fidelity of the pictures that either sign would gate, less that of all, by thirds
    of the run; means over seeds."""
    thirds = ("first", "second", "last")
    heads = [f"{name}, {third} third" for name in SIGNS_TITLES.values() for third in thirds]
    lines = header(["held-out of the gated, less all", *heads])
    for arm, title in titles.items():
        cells = [
            over_seeds([_gap(raw, sign, third) for raw in raws[arm].values()])
            for sign in SIGNS_TITLES
            for third in range(3)
        ]
        lines.append(line([title, *cells]))
    return "\n".join(lines)


def _gap(raw: Raw, sign: str, third: int) -> float:
    """In percent points; NaN where the sign gates nothing in this third of the run."""
    length = len(raw.steps)
    part = raw.steps[third * length // 3 : (third + 1) * length // 3]
    pairs = [(r["metrics"][f"{sign}_gated_{HELD_OUT}"], r["rewards"][HELD_OUT]) for r in part]
    gaps = [100 * (gated - everyone) for gated, everyone in pairs if gated is not None]
    return fmean(gaps) if gaps else nan


def over_seeds(values: Sequence[float]) -> str:
    """Of the seeds that have a value; nothing where none has."""
    known = [value for value in values if not isnan(value)]
    return shown(interval(known), 1, "+") if known else ""


def leads(seen: Mapping[str, Sequence[Seen]], titles: Mapping[str, str]) -> str:
    """How many iterations before the fall of the held-out each signal was raised."""
    heads = [h for title in SIGNALS.values() for h in (f"{title}: raised", "lead")]
    lines = header(["", "fell", *heads])
    for arm, title in titles.items():
        cells = seen[arm]
        fell = sum(cell.fell is not None for cell in cells)
        row: list[str] = [title, f"{fell} of {len(cells)}"]
        for signal in SIGNALS:
            raised = sum(cell.raised[signal] is not None for cell in cells)
            found = [lead for cell in cells if (lead := cell.lead(signal)) is not None]
            row.append(f"{raised} of {len(cells)}")
            spread = f" ({min(found)} to {max(found)})" if found else ""
            row.append(f"{fmean(found):.0f}{spread}" if found else "")
        lines.append(line(row))
    return "\n".join(lines)


def rewards(arms: Arms, titles: Mapping[str, str]) -> str:
    """Change of the evaluated rewards alone: for a part of the prompts."""
    measures = ("proxy", "held_out", "patches")
    heads = [h for m in measures for h in (f"{SHOWN[m][0]} at the start", "change")]
    lines = header(["", *heads])
    names = {"proxy": PROXY, "held_out": HELD_OUT, "patches": PATCHES}
    for arm, title in titles.items():
        cells = []
        for measure in measures:
            _, digits, sign = SHOWN[measure]
            cells.append(f"{fmean(c.start[names[measure]] for c in arms[arm].values()):.1f}")
            values = [*of_arm(arms, arm, measure).values()]
            cells.append(shown(interval(values), digits, sign))
        lines.append(line([title, *cells]))
    return "\n".join(lines)


def measured(arms: Arms) -> list[list[object]]:
    """Rows of a CSV: every measure of every cell."""
    return [
        [arm, seed, name, f"{measure(curve):.5g}"]
        for arm, curves in arms.items()
        for seed, curve in curves.items()
        for name, measure in MEASURES.items()
    ]
