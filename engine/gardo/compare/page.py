"""The page of a comparison: the same kind of page as a run's report, with a colour for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gardo.compare.runs import Compared, common_step, differing, paired
from gardo.files import write_atomically
from gardo.report.curves import ROLES, evaluation_charts, reward_names, step_charts
from gardo.report.environment import throughput
from gardo.report.findings import findings
from gardo.report.findings.page import as_html as findings_as_html
from gardo.report.interactive import FIGURE_CSS, script
from gardo.report.page import minus, number, page, section, text
from gardo.report.progress import format_interval
from gardo.report.samples import image, picture_path, side_by_side

_LARGE = 1400  # longest side of an embedded picture, pixels
_NONE = '<p class="soft">{}</p>'
_CSS = """
table.words td,table.words th{text-align:left;white-space:normal;overflow-wrap:anywhere}
table.words code{white-space:nowrap}th:first-child,td:first-child{text-align:left}
""".strip()


def write_page(runs: Sequence[Compared], path: Path) -> None:
    """One self-contained HTML file. OSError where it cannot be written."""
    step = common_step(runs)
    evaluations = {one.name: one.run.evaluations for one in runs}
    steps = {one.name: one.run.steps for one in runs}
    at = f"Evaluations at step {step}" if step is not None else "Last evaluations"
    title = " and ".join(filter(None, [", ".join(one.name for one in runs[:-1]), runs[-1].name]))
    body = [
        f"<h1>{text(title)}</h1>",
        section("What came of them", _outcomes(runs)),
        section(at, _rewards(runs, step)),
        section("What differs", _recipes(runs)),
        _optional("Pictures", _pictures(runs, step)),
        _optional("Evaluation curves", evaluation_charts(evaluations).as_html()),
        _optional("Training curves", step_charts(steps).as_html()),
        section("What to look at", _found(runs)),
    ]
    whole = page(title, body, css=f"{FIGURE_CSS}\n{_CSS}", script=script())
    write_atomically(path, whole.encode("utf-8", "replace"))


def _optional(title: str, body: str) -> str:
    return section(title, body) if body else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{top}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


def _outcomes(runs: Sequence[Compared]) -> str:
    rows = []
    for one in runs:
        speed = throughput(one.run.steps, one.run.environment.get("ranks", 1))
        peak = f"{speed.peak_bytes / 1e9:.2f}" if speed.peak_bytes else "\u2013"
        cells = [number(speed.seconds_a_step, 3), number(speed.images_per_second, 3), peak]
        verdict = minus(text(one.verdict.conclusion))
        rows.append([text(one.name), verdict, str(one.last_step), *cells])
    head = ["run", "its own evaluations say", "steps", "s a step", "images a second", "peak GB"]
    return _table(head, rows, ' class="words"')


def _recipes(runs: Sequence[Compared]) -> str:
    """The fields that all have; folded away those of parts that some are without."""
    fields = differing(runs)
    if not fields:
        return _NONE.format("Their recipes are the same but for their names.")
    shared = {name: values for name, values in fields.items() if None not in values}
    partial = {name: values for name, values in fields.items() if None in values}
    found = _fields(runs, shared) if shared else ""
    if partial:
        said = f"{len(partial)} field{'s' * (len(partial) > 1)} that not all have"
        found += f"<details><summary>{said}</summary>{_fields(runs, partial)}</details>"
    return found


def _fields(runs: Sequence[Compared], fields: Mapping[str, Sequence[Any]]) -> str:
    rows = [
        [f"<code>{text(name)}</code>"]
        + ["\u2013" if value is None else text(value) for value in values]
        for name, values in fields.items()
    ]
    return _table(["field", *(text(one.name) for one in runs)], rows, ' class="words"')


def _rewards(runs: Sequence[Compared], step: int | None) -> str:
    """A row for each run: rewards with their interval and the difference to the first, diversity"""
    shown = [(one, one.evaluation(step)) for one in runs]
    records = [record for _, record in shown if record]
    if not records:
        return _NONE.format("No evaluation was logged.")
    rewards = reward_names(records)
    spread = list(dict.fromkeys(name for one in records for name in one.get("diversity", {})))
    head = ["run"]
    head += [f"{text(n)}<small>{ROLES.get(r, text(r))}</small>" for n, r in rewards.items()]
    head += [f"{text(name)}<small>diversity</small>" for name in spread]
    rows, unpaired = [], []
    for one, record in shown:
        record = record or {}
        changes = {} if one is runs[0] else paired(runs[0], one, step)
        if one is not runs[0] and not changes:
            unpaired.append(one.name)
        cells = [text(one.name)]
        if step is None and record:
            cells[0] += f"<small>step {record['step']}</small>"
        for name in rewards:
            value = record.get("rewards", {}).get(name)
            cell = minus(format_interval(value)) if value else "\u2013"
            if name in changes:
                change = minus(format_interval(asdict(changes[name]), signed=True))
                cell += f"<small>{change}</small>"
            cells.append(cell)
        cells += [number(record.get("diversity", {}).get(name), 3) for name in spread]
        rows.append(cells)
    note = f"Means with 95 % intervals over prompts; below, the difference to {runs[0].name}, "
    note += "paired by prompt."
    if step is None:
        note += " They share no evaluation after the start: each is at its own last one."
    if unpaired:
        note += f" Evaluated otherwise, so without a difference: {', '.join(unpaired)}."
    return _NONE.format(text(note)) + _table(head, rows)


def _pictures(runs: Sequence[Compared], step: int | None) -> str:
    """The evaluations' grids side by side; those of one set of prompts say them."""
    shown = [(one, one.evaluation(step)) for one in runs]
    found = [(one, it) for one, it in shown if it and picture_path(one.folder, it)]
    if not found:
        return ""
    columns = [
        (f"{one.name}, step {it['step']}", image(one.folder, it, _LARGE)) for one, it in found
    ]
    prompts = [it.get("prompts", []) for _, it in found]
    same = all(one == prompts[0] for one in prompts)
    note = "One row for each prompt" if same else "The runs were evaluated on other prompts"
    return _NONE.format(f"{note}.") + side_by_side(columns, prompts[0] if same else [])


def _found(runs: Sequence[Compared]) -> str:
    return "".join(
        f"<h3>{text(one.name)}</h3>{findings_as_html(findings(one.run))}" for one in runs
    )
