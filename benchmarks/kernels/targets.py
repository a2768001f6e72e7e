"""What the kernels are meant to reach on an H200, as data, and which of it a run reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log
from typing import Any

from .cases import BANDWIDTH, LAUNCH

Row = Mapping[str, Any]

CORE = ("policy_loss", "nft_loss", "awm_loss", "sde_step")
FLUX_1024, FLUX_512 = "64x4096x64", "3x1024x64"


@dataclass(frozen=True)
class Target:
    """`value` of the rows of `way` against `bound`, or, with `against`, how many times faster `way`
    is than that one: the geometric mean over all matching cases. `worst` takes the largest value of
    them instead."""

    text: str
    bound: float
    ops: tuple[str, ...]
    way: str = "triton"
    value: str = "median_us"
    against: str = ""
    at_least: bool = False
    where: Mapping[str, str] = field(default_factory=dict)
    size: str = "any"  # or "launch", "bandwidth"


def faster(times: float, ops: tuple[str, ...], against: str, **more: Any) -> Target:
    way = "triton_graph" if against.endswith("_graph") else "triton"
    size = {"launch": "launch-bound shapes", "bandwidth": "bandwidth-bound shapes"}
    place = size.get(more.get("size", ""), " ".join(more.get("where", {}).values()))
    what = ops[0] if len(ops) == 1 else "core ops"
    return Target(
        f"{what}, {place}: {way} against {against}, times",
        times, ops, way, against=against, at_least=True, **more,
    )  # fmt: skip


LARGE = {"shape": FLUX_1024, "dtype": "bfloat16", "gate": "0.1", "layout": "plain"}
SMALL = {"shape": FLUX_512, "dtype": "bfloat16", "gate": "0.1", "layout": "plain"}
GROUPS, CROWD = {"shape": "48x24x1024", "layout": "plain"}, {"shape": "1x4096x1024"}
NEAREST = ("nearest_cosine",)

TARGETS = (
    Target("policy_loss forward + backward, 1024 px B=64: % of copy, inputs read twice", 85,
           ("policy_loss",), value="two_pass_percent", at_least=True, where=LARGE),
    Target("sde_step with its noise, 1024 px B=64: % of copy", 80, ("sde_step",),
           value="percent_of_copy", at_least=True, where=LARGE),
    Target("policy_loss, 512 px B=3, CUDA graph: us", 8, ("policy_loss",), "triton_graph",
           where=SMALL),
    Target("sde_step, 512 px B=3, CUDA graph: us", 8, ("sde_step",), "triton_graph", where=SMALL),
    Target("core ops: host syncs of a call, at most", 0, CORE, value="syncs"),
    faster(10, CORE, "released", size="launch"),
    faster(1.3, CORE, "compiled", size="launch"),
    faster(1.2, CORE, "compiled_graph", size="launch"),
    faster(6, CORE, "released", size="bandwidth"),
    faster(1.2, CORE, "compiled", size="bandwidth"),
    Target("nearest_cosine 48x24x1024, CUDA graph: us", 8, NEAREST, "triton_graph", where=GROUPS),
    faster(5, NEAREST, "eager", where=GROUPS),
    faster(2, NEAREST, "compiled", where=GROUPS),
    faster(1.5, NEAREST, "eager", where=CROWD),
    Target("log-ratios of 1e-7: largest relative error", 1e-4, ("policy_loss",),
           value="log_ratio_error", where={"layout": "tiny"}),
    Target("gradient in fp32: RMS error", 1e-5, ("policy_loss", "nft_loss", "awm_loss"),
           value="error", where={"dtype": "float32"}),
    Target("runs whose bits differ, of 10", 0, (*CORE, *NEAREST), value="repeatable"),
)  # fmt: skip


def matches(target: Target, row: Row) -> bool:
    sizes = {
        "any": True,
        "launch": float(row["elements"]) < LAUNCH,
        "bandwidth": float(row["least_bytes"] or 0) > BANDWIDTH,
    }
    return (
        row["op"] in target.ops
        and sizes[target.size]
        and all(str(row[name]) == value for name, value in target.where.items())
    )


def case_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("op", "shape", "dtype", "gate", "layout"))


def number(row: Row, value: str) -> float | None:
    if str(row[value]) in ("True", "False"):
        return float(str(row[value]) == "False")
    return None if row[value] == "" else float(row[value])


def measured(target: Target, rows: Sequence[Row]) -> float | None:
    """The target's number in these rows (of a run or of its CSV); None where they have none."""
    fitting = [row for row in rows if matches(target, row)]
    ours = {case_of(row): number(row, target.value) for row in fitting if row["way"] == target.way}
    known = {case: value for case, value in ours.items() if value is not None}
    if not target.against:
        ordered = sorted(known.values())
        return (ordered[0] if target.at_least else ordered[-1]) if ordered else None
    others = {case_of(row): number(row, target.value) for row in fitting
              if row["way"] == target.against}  # fmt: skip
    logs = [log(others[case] / us) for case, us in known.items() if others.get(case)]  # type: ignore[operator]
    return exp(sum(logs) / len(logs)) if logs else None


def verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every target with what was measured: met, missed, or not measured."""
    out = []
    for target in TARGETS:
        value = measured(target, rows)
        reached = value is not None and (
            value >= target.bound if target.at_least else value <= target.bound
        )
        out.append({
            "target": target.text,
            "bound": f"{'>=' if target.at_least else '<='} {target.bound:g}",
            "measured": "" if value is None else f"{value:.3g}",
            "verdict": "not measured" if value is None else "met" if reached else "missed",
        })  # fmt: skip
    return out
