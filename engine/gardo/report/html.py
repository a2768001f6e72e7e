"""One self-contained `report.html` from a run's folder.

Verdict, evaluations, pictures over time, curves, events and the resolved recipe, all from
`metrics.jsonl`, `samples/` and `recipe.yaml`. Nothing is fetched, and no script runs but that of
the charts: a content policy in the page forbids both. Every string from the run (prompts, reward
names, the recipe) is escaped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from gardo.files import write_atomically
from gardo.report import phase_table
from gardo.report.curves import ROLES, evaluation_charts, resets, reward_names, step_charts
from gardo.report.environment import as_html as made_with
from gardo.report.environment import read_environment
from gardo.report.findings import RULES, Run, findings
from gardo.report.findings.outcome import hacked
from gardo.report.findings.page import as_html as findings_as_html
from gardo.report.gated import KEPT_CSS, best_and_worst_section, gated_section
from gardo.report.interactive import FIGURE_CSS, script
from gardo.report.metrics_log import Record, read_metrics
from gardo.report.page import minus, number, page, section, text
from gardo.report.progress import format_duration, format_interval, format_number
from gardo.report.samples import image, picture_path, side_by_side
from gardo.report.verdict import judge

REFRESH = 60  # seconds after which a browser reads a live page again
_MOST_SMALL = 12  # pictures between the first, the middle and the last
_LARGE, _SMALL = 1400, 560  # longest side of an embedded picture, pixels


def write_report(run_folder: Path, *, live: bool = False) -> Path:
    """Write `report.html` into the run's folder, whole or not at all, and return its path.

    A run without evaluations, steps, pictures or a recipe gets a report that says what is missing.
    `live`: of a run that goes on; a browser then reads the page again each minute.

    Raises:
        FileNotFoundError: the folder has no `metrics.jsonl`.
        ValueError: no line of it is a record.
    """
    run_folder = Path(run_folder)
    log = run_folder / "metrics.jsonl"
    records = read_metrics(log)
    if not records and log.stat().st_size:
        raise ValueError(f"no line of {log} is a record")
    steps = [record for record in records if record["kind"] == "step"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    recipe_path = run_folder / "recipe.yaml"
    recipe = recipe_path.read_text("utf-8", "replace") if recipe_path.exists() else ""
    name = _run_name(recipe) or run_folder.resolve().name
    marks = resets(steps)
    run, starts = Run.of(run_folder), read_environment(run_folder)
    body = [
        f"<h1>{text(name)}</h1>",
        _facts(steps, evaluations),
        _live() if live else "",
        _verdict(run),
        _findings(run),
        _optional("What the gate caught", gated_section(run_folder)),
        _optional("The best and the worst by the proxy", best_and_worst_section(run_folder)),
        section("Evaluations", _table(evaluations)),
        section("Pictures over time", _pictures(run_folder, evaluations)),
        _optional("Evaluation curves", evaluation_charts({"": evaluations}, marks).as_html()),
        _optional("Training curves", step_charts({"": steps}, marks).as_html()),
        section("Where the time went", phase_table.as_html(steps) if steps else _no_steps()),
        section("Events", _events(steps)),
        section("Made with", made_with(run_folder, steps, run.recipe, starts)),
        section("Recipe", _recipe(recipe)),
    ]
    path = run_folder / "report.html"
    again = REFRESH if live else None
    css = f"{FIGURE_CSS}\n{KEPT_CSS}"
    whole = page(name, body, css=css, script=script(), refresh=again)
    write_atomically(path, whole.encode("utf-8", "replace"))
    return path


def _live() -> str:
    now = datetime.now(UTC).isoformat(" ", "seconds").replace("+00:00", " UTC")
    return f'<p class="soft">As of {now}. The run goes on, and so does this page.</p>'


def _findings(run: Run) -> str:
    """All but what the verdict says."""
    found = findings(run, [rule for rule in RULES if rule is not hacked])
    return section("What to look at", findings_as_html(found)) if found else ""


def _optional(title: str, body: str) -> str:
    return section(title, body) if body else ""


def _run_name(recipe: str) -> str:
    """`run.name` of the recipe, or nothing."""
    try:
        run = yaml.safe_load(recipe)["run"]
        return str(run["name"])
    except (yaml.YAMLError, KeyError, TypeError):
        return ""


def _facts(steps: Sequence[Record], evaluations: Sequence[Record]) -> str:
    """How much was done and how long it took; a warning if numbers were not finite."""
    totals = [sum(step.get("seconds", {}).values()) for step in steps]
    facts = [_count(steps[-1]["step"] if steps else 0, "training step")]
    if steps:
        facts.append(f"{format_duration(sum(totals))} of training")
        facts.append(f"{format_number(median(totals), 3)} s a step (median)")
    facts.append(_count(len(evaluations), "evaluation"))
    if evaluations and "image_count" in evaluations[-1]:
        images = _count(evaluations[-1]["image_count"], "image")
        prompts = evaluations[-1].get("prompt_count")
        facts[-1] += f" of {images}" + (f" from {_count(prompts, 'prompt')}" if prompts else "")
    line = f'<p class="soft">{" · ".join(map(text, facts))}</p>'
    damaged = sum(not all(map(math.isfinite, _numbers(step))) for step in steps)
    if damaged:
        line += f"<p><b>{_count(damaged, 'step')} logged numbers that are not finite.</b></p>"
    return line


def _verdict(run: Run) -> str:
    """The conclusion with what to try, then the sentences that it rests on."""
    evaluations = run.evaluations
    verdict = judge(evaluations, run.steps)
    said = f'<p class="conclusion">{text(verdict.conclusion)}</p>'
    said += "".join(f'<p class="soft">{text(one.advice)}</p>' for one in hacked(run))
    if verdict.sentences:
        first, last = evaluations[0]["step"], evaluations[-1]["step"]
        lines = "".join(f"<li>{minus(text(sentence))}</li>" for sentence in verdict.sentences)
        note = "intervals are 95 % over prompts, changes are paired by prompt."
        said += f'<ul>{lines}</ul><p class="soft">From step {first} to step {last}: {note}</p>'
    return f'<div class="verdict {verdict.tone}">{said}</div>'


def _table(evaluations: Sequence[Record]) -> str:
    """One row for each evaluation: rewards with interval and paired change, then diversity."""
    if not evaluations:
        return _no_evaluations()
    rewards = reward_names(evaluations)
    spread = list(dict.fromkeys(name for one in evaluations for name in one.get("diversity", {})))
    head = ["<th>step</th>"]
    head += [
        f"<th>{text(name)}<small>{ROLES.get(role, text(role))}</small></th>"
        for name, role in rewards.items()
    ]
    head += [f"<th>{text(name)}<small>diversity</small></th>" for name in spread]
    rows: list[str] = []
    for one in evaluations:
        cells = [f"<td>{one['step']}</td>"]
        for name in rewards:
            value = one.get("rewards", {}).get(name)
            change = one.get("change", {}).get(name) if rows else None  # the first is the start
            cell = minus(format_interval(value)) if value else "\u2013"
            if change:
                cell += f"<small>{minus(format_interval(change, signed=True))}</small>"
            cells.append(f"<td>{cell}</td>")
        cells += [f"<td>{number(one.get('diversity', {}).get(name), 3)}</td>" for name in spread]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = '<p class="soft">Means with 95 % intervals over prompts; below, the paired change.</p>'
    head_row = f"<thead><tr>{''.join(head)}</tr></thead>"
    return (
        f'{note}<div class="scroll"><table>{head_row}<tbody>{"".join(rows)}</tbody></table></div>'
    )


def _pictures(run_folder: Path, evaluations: Sequence[Record]) -> str:
    """The grids: first, middle and last side by side with their prompts, the others small."""
    shown = [one for one in evaluations if picture_path(run_folder, one)]
    if not shown:
        return _missing("No evaluation left a picture.")
    large = sorted({0, len(shown) // 2, len(shown) - 1})
    others = [index for index in range(len(shown)) if index not in large]
    kept = _spread(others, _MOST_SMALL)
    columns = [
        (f"step {shown[index]['step']}", image(run_folder, shown[index], _LARGE)) for index in large
    ]
    body = (
        '<p class="soft">The same prompts and the same noise at every evaluation: one row for each '
        "prompt. Rows that come to look alike, or pictures no prompt asks for, are what a reward "
        f"cannot see.</p>{side_by_side(columns, shown[-1].get('prompts', []))}"
    )
    if kept:
        small = "".join(
            f'<div>{image(run_folder, shown[index], _SMALL)}<div class="caption">'
            f"step {shown[index]['step']}</div></div>"
            for index in kept
        )
        body += f'<div class="strip">{small}</div>'
    if len(kept) < len(others):
        left = _count(len(others) - len(kept), "more picture")
        body += f'<p class="soft">{left} in <code>samples/</code>.</p>'
    missing = len(evaluations) - len(shown)
    if missing:
        body += f'<p class="soft">{_count(missing, "evaluation")} without a readable picture.</p>'
    return body


def _events(steps: Sequence[Record]) -> str:
    """Events of the same name on one line, with their steps."""
    by_name: dict[str, list[int]] = {}
    for step in steps:
        for event in step.get("events", ()):
            by_name.setdefault(event, []).append(step["step"])
    if not by_name:
        return _missing("No event was logged.")
    lines = "".join(
        f"<li>{text(name)}: step{'s' if len(at) > 1 else ''} {', '.join(map(str, at))}</li>"
        for name, at in by_name.items()
    )
    return f"<ul>{lines}</ul>"


def _recipe(recipe: str) -> str:
    if not recipe.strip():
        return _missing("No recipe.yaml in this folder.")
    return f"<details><summary>Resolved recipe</summary><pre>{text(recipe)}</pre></details>"


def _missing(what: str) -> str:
    return f'<p class="soft">{text(what)}</p>'


def _no_evaluations() -> str:
    return _missing("No evaluation was logged.")


def _no_steps() -> str:
    return _missing("No training step was logged.")


def _numbers(value: Any) -> Iterable[float]:
    """All floats inside a record."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, float):
        yield value


def _spread(indices: Sequence[int], most: int) -> list[int]:
    """At most `most` of the indices, evenly spaced."""
    if len(indices) <= most:
        return list(indices)
    return [indices[round(k * (len(indices) - 1) / (most - 1))] for k in range(most)]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
