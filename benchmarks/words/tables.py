"""What the arms of ./run words came to: a table, and a CSV with a row a measure."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from gardo.evaluation.statistics import bootstrap_mean, paired_change
from gardo.files import write_atomically
from gardo.report.metrics_log import Record, step_records
from words.arms import ARMS, evaluations, revisions, run_folder

MEASURES = {"ocr": "proxy, %", "genuine": "held-out, %", "letters": "auxiliary, nats"}
PERCENT = {"ocr": 100, "genuine": 100, "letters": 1}  # of a measure's unit in the table
FIELDS = (
    *("arm", "iteration", "words", "measure", "mean", "low", "high"),
    *("change", "change_low", "change_high", "gated", "features", "revision", "machine"),
)

Row = dict[str, Any]


def machine() -> str:
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    return f"{device}, torch {torch.__version__}"


def gated(steps: Sequence[Record], last: int) -> float | str:
    """Mean share of the samples under the KL in the iterations up to `last`; "" at the start."""
    shares = [r["metrics"].get("gate_share", 0.0) for r in steps if r["step"] <= last]
    return fmean(shares) if shares else ""


def rows(title: str, log: Sequence[Record], steps: Sequence[Record]) -> list[Row]:
    """A row an evaluation, half of the words and measure; intervals are over the half's prompts.

    The first half of the evaluation's prompts has trained words, the second held-out ones.
    """
    found = []
    for record in log:
        for measure in MEASURES:
            first_E, now_E = (
                torch.tensor(r["by_prompt"][measure], dtype=torch.float64) for r in (log[0], record)
            )
            halves = zip(("trained", "held out"), first_E.chunk(2), now_E.chunk(2), strict=True)
            for words, first, now in halves:
                change = asdict(paired_change(first, now))
                found.append(
                    {
                        "arm": title, "iteration": record["step"], "words": words,
                        "measure": measure, **asdict(bootstrap_mean(now)),
                        "change": change["mean"], "change_low": change["low"],
                        "change_high": change["high"], "gated": gated(steps, record["step"]),
                        "features": record["diversity"]["features"],
                    }
                )  # fmt: skip
    return found


def interval(row: Row, name: str, sign: str = "") -> str:
    unit, start = PERCENT[row["measure"]], "" if name == "mean" else f"{name}_"
    ends = (row[name], row[f"{start}low"], row[f"{start}high"])
    mean, low, high = (f"{unit * value:{sign}.{1 if unit > 1 else 2}f}" for value in ends)
    return f"{mean} [{low}, {high}]"


def line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def table(found: Sequence[Row]) -> str:
    """The start, and every arm after its last iteration, trained and held-out words each."""
    at: dict[tuple[str, str], dict[str, Row]] = {}
    for row in found:  # an arm's later rows replace its earlier ones; the first arm's start stays
        title = row["arm"] if row["iteration"] else "start"
        at.setdefault((title, row["words"]), {})[row["measure"]] = row
    heads = [part for head in MEASURES.values() for part in (head, "change")]
    lines = [line(["arm", "words", *heads, "gated, %", "features"])]
    lines.append("|---" * (4 + len(heads)) + "|")
    for (title, words), by_measure in at.items():
        cells: list[Any] = [title, words]
        for measure in MEASURES:
            row = by_measure[measure]
            cells += [
                interval(row, "mean"),
                interval(row, "change", "+") if row["iteration"] else "",
            ]
        share = "" if row["gated"] == "" else f"{100 * row['gated']:.1f}"
        lines.append(line([*cells, share, f"{row['features']:.2f}"]))
    return "\n".join(lines)


def note(logs: Mapping[str, Sequence[Record]], trained_at: Sequence[str]) -> str:
    last = next(iter(logs.values()))[-1]
    return (
        f"After {last['step']} iterations; one seed. {last['image_count']} images of "
        f"{last['prompt_count']} prompts, the same noise each time. [Brackets]: 95 % intervals "
        "over the prompts of a half, changes paired with the start. Held-out words: never drawn in "
        "pre-training, nor trained on. Gated: mean share of the samples under the KL. Features: "
        "mean pairwise distance of a prompt's images, x 100. Trained at revision "
        f"{', '.join(trained_at)}; {machine()}."
    )


def write(out: Path) -> str:
    """words.csv and words.md of the arms that are trained in `out`; the text of the latter."""
    logs = {arm: evaluations(run_folder(out / "runs", arm)) for arm in ARMS}
    trained_at = {arm: revisions(out / "runs", arm) for arm in ARMS}
    found = []
    for arm, log in logs.items():
        steps = step_records(run_folder(out / "runs", arm))
        place = {"revision": " ".join(trained_at[arm]), "machine": machine()}
        found += [{**row, **place} for row in rows(ARMS[arm], log, steps)]
    with (out / "words.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(found)
    every = list(dict.fromkeys(r for some in trained_at.values() for r in some))
    text = f"{table(found)}\n\n{note(logs, every)}"
    write_atomically(out / "words.md", f"{text}\n".encode())
    return text
