"""Tables and plots of a benchmark's CSV files: nothing is drawn or printed that is not in them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .measure import WAYS
from .targets import CORE, case_of, number, verdicts

Row = Mapping[str, Any]
NOT_YET = "Not yet measured on a GPU: `./run bench kernels` on a machine with one fills this in."


def write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows, or none where the file is not there yet."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def by_case(rows: Sequence[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(case_of(row), {})[str(row["way"])] = row
    return cases


def place(row: Row) -> str:
    clocks = ""
    if row.get("clock_sm_mhz"):
        clocks = f", {row['clock_sm_mhz']} / {row['clock_mem_mhz']} MHz"
    driver = f", driver {row['driver']}" if row.get("driver") else ""
    return (
        f"{row['device']}{clocks}{driver}, torch {row['torch']}, triton {row['triton']}, "
        f"revision {row['revision']}, {row['date']}"
    )


def microseconds(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{float(row['median_us']):.1f}" if row["median_us"] else "failed"


def targets_table(rows: Sequence[Row]) -> str:
    head = ("target", "bound", "measured", "")
    return markdown(head, [tuple(verdict.values()) for verdict in verdicts(rows)])


def speed_table(rows: Sequence[Row]) -> str:
    ways = [way for way in WAYS if any(row["way"] == way for row in rows)]
    lines = []
    for case, found in by_case(rows).items():
        triton = found.get("triton", {})
        cells = [triton.get(n, "") or "-" for n in ("percent_of_copy", "launches", "syncs")]
        lines.append([*case, *(microseconds(found.get(way)) for way in ways), *cells])
    head = ["op", "shape", "dtype", "gate", "inputs", *(f"{way} us" for way in ways),
            "triton: % of copy", "launches", "syncs"]  # fmt: skip
    picture = "![times faster, and GB/s](results/kernels_gpu.png)"
    return f"{markdown(head, lines)}\n\nMedians. {place(rows[0])}.\n\n{picture}"


def cpu_table(rows: Sequence[Row]) -> str:
    ways = [way for way in WAYS if any(row["way"] == way for row in rows)]
    lines = [
        [*case, *(microseconds(found.get(way)) for way in ways)]
        for case, found in by_case(rows).items()
    ]
    head = ["op", "shape", "dtype", "gate", "inputs", *(f"{way} us" for way in ways)]
    text = "On a CPU: that the paths run and agree, no claim about speed."
    return f"{text}\n\n{markdown(head, lines)}\n\nMedians. {place(rows[0])}."


def counts_table(rows: Sequence[Row]) -> str:
    names = ("op", "shape", "dtype", "way", "launches", "triton_launches", "bytes_per_element",
             "temporaries_per_element", "syncs")  # fmt: skip
    head = [name.replace("_", " ").replace("per element", "/ element") for name in names]
    lines = [[row[name] or "-" for name in names] for row in rows]
    first = rows[0]
    return (
        f"{markdown(head, lines)}\n\nCounted, not timed (torch {first['torch']}, triton "
        f"{first['triton']}, revision {first['revision']}).\n\n"
        "![launches, and bytes an element](results/kernels_counts.png)"
    )


def host_table(rows: Sequence[Row]) -> str:
    head = ("op", "call", "median us", "p10", "p90")
    names = ("op", "way", "median_us", "p10_us", "p90_us")
    return f"{markdown(head, [[row[n] for n in names] for row in rows])}\n\n{place(rows[0])}."


def compiled_table(rows: Sequence[Row]) -> str:
    names = ("name", "architecture", "registers", "stack", "spills", "wide", "per_element")
    head = ("kernel", "sm", "registers", "stack", "spills", "128-bit accesses", "SASS / element")
    # what has no wide access sees one value a row, not elements
    lines = [
        [row[n] if n != "per_element" or row["wide"] != "0" else "" for n in names] for row in rows
    ]
    return f"{markdown(head, lines)}\n\ntriton {rows[0]['triton']}, revision {rows[0]['revision']}."


# ---- plots ---------------------------------------------------------------------------------------


def figure(columns: int) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(1, columns, figsize=(5.2 * columns, 3.8), layout="constrained")
    return plt, drawn, axes


def draw_speed(rows: Sequence[Row], path: Path) -> None:
    """How many times faster than the others over the size, and the bandwidth against the copy's."""
    plt, drawn, (left, right) = figure(2)
    for op in CORE:
        for against, style in (("released", "-"), ("compiled", ":")):
            points = {}
            for found in by_case([r for r in rows if r["op"] == op]).values():
                pair = [number(found[w], "median_us") for w in (against, "triton") if w in found]
                if len(pair) == 2 and None not in pair:
                    size = float(found["triton"]["elements"])
                    points[size] = pair[0] / pair[1]  # type: ignore[operator]
            if points:
                xs = sorted(points)
                left.plot(xs, [points[x] for x in xs], style, marker="o", ms=3,
                          label=f"{op} / {against}")  # fmt: skip
    for way, marker in (("released", "s"), ("compiled", "^"), ("triton", "o"), ("copy", "x")):
        some = [r for r in rows if r["way"] == way and r["gbps"] and r["op"] in CORE]
        right.plot([float(r["least_bytes"]) / 2**20 for r in some],
                   [float(r["gbps"]) for r in some], marker, ms=4, label=way)  # fmt: skip
    left.set(xlabel="elements", ylabel="times faster")
    right.set(xlabel="least MiB", ylabel="GB/s of least bytes")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.set(xscale="log", yscale="log")
            axis.legend(fontsize=7)
    drawn.savefig(path, dpi=120)
    plt.close(drawn)


def draw_counts(rows: Sequence[Row], path: Path) -> None:
    """Launches and bytes an element of each path."""
    plt, drawn, axes = figure(2)
    ops = list(dict.fromkeys(row["op"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    for axis, name in zip(axes, ("launches", "bytes_per_element"), strict=True):
        for i, way in enumerate(ways):
            some = [(ops.index(r["op"]), float(r[name])) for r in rows
                    if r["way"] == way and r[name] != ""]  # fmt: skip
            axis.bar([x + 0.27 * (i - 1) for x, _ in some], [y for _, y in some], 0.25, label=way)
        axis.set(ylabel=name.replace("_", " "), yscale="log")
        axis.set_xticks(range(len(ops)), ops, rotation=40, ha="right")
        axis.legend(fontsize=7)
    drawn.savefig(path, dpi=120)
    plt.close(drawn)
