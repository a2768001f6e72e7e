"""What a run was made with, how fast it was, and the commands to go on with it: for the report."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from gardo.report.metrics_log import Record
from gardo.report.page import text
from gardo.report.phase_table import warm
from gardo.report.progress import format_number


def read_environment(run_folder: Path) -> list[dict[str, Any]]:
    """The starts in the run's `environment.json`; none where it has no such file, or a damaged one.

    The last is what the run's newest steps were made with.
    """
    try:
        found = json.loads((run_folder / "environment.json").read_text(encoding="utf-8"))
        return [start for start in found["starts"] if isinstance(start, dict)]
    except (OSError, ValueError, LookupError, TypeError):
        return []


@dataclass(frozen=True)
class Throughput:
    """Means of a step without the first, in which libraries warm up; None of what is not logged."""

    seconds_a_step: float | None
    images_per_second: float | None  # drawn for training, of all ranks
    rows_per_second: float | None  # of the training's forward passes, of all ranks
    peak_bytes: int | None  # of the fullest rank


def throughput(steps: Sequence[Record], ranks: int = 1) -> Throughput:
    """How fast the run is; rows are counted on the first of its `ranks`, which have as many."""
    logged = [step for step in warm(steps) if step.get("seconds")]
    totals = [sum(step["seconds"].values()) for step in logged]
    rates = [step["images_per_second"] for step in logged if step.get("images_per_second")]
    rows = sum(step.get("rows", {}).get("train", 0) for step in logged)
    peaks = [step["peak_bytes"] for step in steps if step.get("peak_bytes")]
    return Throughput(
        seconds_a_step=fmean(totals) if totals else None,
        images_per_second=1 / fmean(1 / rate for rate in rates) if rates else None,
        rows_per_second=ranks * rows / sum(totals) if rows and sum(totals) else None,
        peak_bytes=int(max(peaks)) if peaks else None,
    )


def commands(
    run_folder: Path, recipe: Mapping[str, Any], start: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """What to type, from where the report was made: (what it does, command)."""
    folder = _typed(run_folder)
    found = [
        ("go on from the last checkpoint", _resume(run_folder, start)),
        ("weights for diffusers", f"gardo export {folder}"),
    ]
    train = recipe.get("train")
    if isinstance(train, Mapping) and train.get("ema") is not None:
        found.append(("the average of the weights", f"gardo export {folder} --ema"))
    return [*found, ("this page again", f"gardo report {folder}")]


def resume_command(run_folder: Path) -> str:
    """What to type to go on with a run, on as many ranks as it had."""
    return _resume(run_folder, (read_environment(run_folder) or [{}])[-1])


def _resume(run_folder: Path, start: Mapping[str, Any]) -> str:
    ranks, machines = start.get("ranks", 1), start.get("machines", 1)
    many = f" --gpus {ranks}" if ranks > 1 and machines == 1 else ""
    resumed = f"gardo train {_typed(run_folder / 'recipe.yaml')} --resume{many}"
    return resumed + " --hostfile HOSTFILE" * (machines > 1)


def _typed(path: Path) -> str:
    """The path for a shell: from here where it lies below, else with ~ for the home folder."""
    full = path.resolve()
    for base, begin in ((Path.cwd(), ""), (Path.home(), "~/")):
        if full.is_relative_to(base):
            return begin + shlex.quote(str(full.relative_to(base)))
    return shlex.quote(str(full))


def facts(steps: Sequence[Record], starts: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(label, value) in plain text: speed and memory, then what the run was last started with."""
    start = starts[-1] if starts else {}
    speed = throughput(steps, start.get("ranks", 1))
    found = [
        ("Seconds a step", _rounded(speed.seconds_a_step)),
        ("Images a second", _rounded(speed.images_per_second)),
        ("Rows trained a second", _rounded(speed.rows_per_second)),
        ("Peak memory of a rank", f"{speed.peak_bytes / 1e9:.2f} GB" if speed.peak_bytes else ""),
        ("Devices", _devices(start.get("devices", ()))),
        ("Ranks", _ranks(start)),
        ("gardo", _gardo(starts)),
        ("Libraries", ", ".join(f"{n} {v}" for n, v in start.get("packages", {}).items())),
        ("CUDA", _cuda(start)),
        ("System", str(start.get("system", ""))),
        ("Started", _began(starts)),
    ]
    return [(label, value) for label, value in found if value]


def _rounded(value: float | None) -> str:
    return "" if value is None else format_number(value, 3)


def _devices(devices: Sequence[Mapping[str, Any]]) -> str:
    """8 x NVIDIA H100 80GB HBM3 (85.2 GB)"""
    sizes = {one.get("name", "?"): one.get("bytes", 0) for one in devices}
    counts = Counter(one.get("name", "?") for one in devices)
    parts = []
    for name, count in counts.items():
        size = f" ({sizes[name] / 1e9:.1f} GB)" if sizes[name] else ""
        parts.append(f"{f'{count} x ' if count > 1 else ''}{name}{size}")
    return ", ".join(parts)


def _ranks(start: Mapping[str, Any]) -> str:
    if "ranks" not in start:
        return ""
    machines = start.get("machines", 1)
    return f"{start['ranks']}" + (f" on {machines} machines" if machines > 1 else "")


def _gardo(starts: Sequence[Mapping[str, Any]]) -> str:
    """Versions, each with its revision, in the order in which the run met them."""
    seen = dict.fromkeys(
        " ".join(filter(None, (start.get("gardo"), start.get("revision")))) for start in starts
    )
    return ", then ".join(filter(None, seen))


def _cuda(start: Mapping[str, Any]) -> str:
    if not start.get("driver"):
        return ""
    return f"{start.get('cuda')}, driver {start['driver']}"


def _began(starts: Sequence[Mapping[str, Any]]) -> str:
    if not starts:
        return ""
    resumed = [f"{start.get('after_step')}" for start in starts[1:]]
    more = f"; resumed after step {', '.join(resumed)}" if resumed else ""
    return f"{starts[0].get('at')}{more}"


def as_html(
    run_folder: Path,
    steps: Sequence[Record],
    recipe: Mapping[str, Any],
    starts: Sequence[Mapping[str, Any]],
) -> str:
    """A list of facts, and under it the commands."""
    rows = "".join(
        f"<dt>{text(label)}</dt><dd>{text(value)}</dd>" for label, value in facts(steps, starts)
    )
    start = starts[-1] if starts else {}
    lines = "".join(
        f"<dt>{text(what)}</dt><dd><code>{text(command)}</code></dd>"
        for what, command in commands(run_folder, recipe, start)
    )
    return f'<dl class="facts">{rows}</dl><h3>Commands</h3><dl class="facts">{lines}</dl>'
