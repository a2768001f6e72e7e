"""One self-contained `report.html` from a run's folder.

Verdict, evaluations, pictures over time, curves, events and the resolved recipe, all from
`metrics.jsonl`, `samples/` and `recipe.yaml`. No script and nothing fetched: a content policy in
the page forbids both. Every string from the run (prompts, reward names, the recipe) is escaped.
"""

import base64
import html
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from PIL import Image

from gardo.files import write_atomically
from gardo.report import phase_table
from gardo.report.chart import CHART_CSS, Mark
from gardo.report.curves import ROLES, evaluation_charts, resets, reward_names, step_charts
from gardo.report.metrics_log import Record, read_metrics
from gardo.report.progress import format_duration, format_interval, format_number
from gardo.report.verdict import judge

_MOST_SMALL = 12  # pictures between the first, the middle and the last
_LARGE, _SMALL = 1400, 560  # longest side of an embedded picture, pixels

_CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1200px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px}
h2{font-size:20px;margin:40px 0 12px;padding-top:14px;border-top:1px solid var(--line)}
h3{font-size:15px;margin:22px 0 8px;color:var(--soft);font-weight:600}
p{margin:8px 0;max-width:85ch}
.soft{color:var(--soft);font-size:14px;max-width:100ch}
.verdict{border-left:5px solid var(--c7);padding:4px 0 4px 16px;margin:18px 0;font-size:17px}
.verdict.good{border-color:var(--c2)}.verdict.bad{border-color:var(--c4)}
.conclusion{font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:6px 0 6px 22px;text-align:right;white-space:nowrap}
tr{border-bottom:1px solid var(--line)}
th{vertical-align:bottom;font-weight:600}th:first-child,td:first-child{padding-left:0}
td{vertical-align:top}
td small,th small{display:block;color:var(--soft);font-weight:400}
.charts{display:grid;gap:18px 28px}
.charts{grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr))}
.grids{display:grid;gap:6px 14px;align-items:start;overflow-x:auto}
.grids .prompts{display:grid;align-self:stretch;contain:size;font-size:13px;line-height:1.2}
.grids .prompts span{display:flex;align-items:safe center;min-height:0;overflow:hidden}
.grids .prompts{overflow-wrap:anywhere}
.grids img,.strip img{display:block;width:100%;height:auto}
.caption{font-size:13px;color:var(--soft)}.caption b{color:var(--ink)}
.strip{display:grid;gap:14px;margin-top:20px}
.strip{grid-template-columns:repeat(auto-fill,minmax(170px,1fr))}
pre{overflow-x:auto;font-size:13px;line-height:1.4;padding:12px;border:1px solid var(--line)}
summary{cursor:pointer}
ul{padding-left:20px;font-size:14px}
""".strip()

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title><style>{css}</style></head>
<body><main>{body}</main></body></html>
"""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into the run's folder, whole or not at all, and return its path.

    A run still going, or one without evaluations, steps, pictures or a recipe, gets a report that
    says what is missing.

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
    body = [
        f"<h1>{_text(name)}</h1>",
        _facts(steps, evaluations),
        _verdict(evaluations, steps),
        _section("Evaluations", _table(evaluations)),
        _section("Pictures over time", _pictures(run_folder, evaluations)),
        _section("Evaluation curves", _evaluation_curves(evaluations, marks)),
        _section("Training curves", _charts(step_charts(steps, marks)) if steps else _no_steps()),
        _section("Where the time went", phase_table.as_html(steps) if steps else _no_steps()),
        _section("Events", _events(steps)),
        _section("Recipe", _recipe(recipe)),
    ]
    page = _PAGE.format(title=_text(name), css=CHART_CSS + "\n" + _CSS, body="\n".join(body))
    path = run_folder / "report.html"
    write_atomically(path, page.encode("utf-8", "replace"))
    return path


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
    line = f'<p class="soft">{" · ".join(map(_text, facts))}</p>'
    damaged = sum(not all(map(math.isfinite, _numbers(step))) for step in steps)
    if damaged:
        line += f"<p><b>{_count(damaged, 'step')} logged numbers that are not finite.</b></p>"
    return line


def _verdict(evaluations: Sequence[Record], steps: Sequence[Record]) -> str:
    """The verdict's sentences, and between what they compare."""
    verdict = judge(evaluations, steps)
    span = ""
    if verdict.sentences:
        first, last = evaluations[0]["step"], evaluations[-1]["step"]
        note = "intervals are 95 % over prompts, changes are paired by prompt."
        span = f'<p class="soft">From step {first} to step {last}: {note}</p>'
        span += f"<p>{_minus(_text(' '.join(verdict.sentences)))}</p>"
    conclusion = f'<p class="conclusion">{_text(verdict.conclusion)}</p>'
    return f'<div class="verdict {verdict.tone}">{span}{conclusion}</div>'


def _table(evaluations: Sequence[Record]) -> str:
    """One row for each evaluation: rewards with interval and paired change, then diversity."""
    if not evaluations:
        return _no_evaluations()
    rewards = reward_names(evaluations)
    spread = list(dict.fromkeys(name for one in evaluations for name in one.get("diversity", {})))
    head = ["<th>step</th>"]
    head += [
        f"<th>{_text(name)}<small>{ROLES.get(role, _text(role))}</small></th>"
        for name, role in rewards.items()
    ]
    head += [f"<th>{_text(name)}<small>diversity</small></th>" for name in spread]
    rows: list[str] = []
    for one in evaluations:
        cells = [f"<td>{one['step']}</td>"]
        for name in rewards:
            value = one.get("rewards", {}).get(name)
            change = one.get("change", {}).get(name) if rows else None  # the first is the start
            cell = _minus(format_interval(value)) if value else "\u2013"
            if change:
                cell += f"<small>{_minus(format_interval(change, signed=True))}</small>"
            cells.append(f"<td>{cell}</td>")
        cells += [f"<td>{_number(one.get('diversity', {}).get(name), 3)}</td>" for name in spread]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    note = '<p class="soft">Means with 95 % intervals over prompts; below, the paired change.</p>'
    head_row = f"<thead><tr>{''.join(head)}</tr></thead>"
    return (
        f'{note}<div class="scroll"><table>{head_row}<tbody>{"".join(rows)}</tbody></table></div>'
    )


def _pictures(run_folder: Path, evaluations: Sequence[Record]) -> str:
    """The grids: first, middle and last side by side with their prompts, the others small."""
    shown = [one for one in evaluations if _picture_path(run_folder, one)]
    if not shown:
        return _missing("No evaluation left a picture.")
    large = sorted({0, len(shown) // 2, len(shown) - 1})
    others = [index for index in range(len(shown)) if index not in large]
    kept = _spread(others, _MOST_SMALL)
    captions = "".join(
        f'<div class="caption"><b>step {shown[index]["step"]}</b></div>' for index in large
    )
    images = "".join(_image(run_folder, shown[index], _LARGE) for index in large)
    prompts = shown[-1].get("prompts", [])
    labels = "".join(f'<span title="{_text(prompt)}">{_text(prompt)}</span>' for prompt in prompts)
    rows = f"grid-template-rows:repeat({max(1, len(prompts))},minmax(0,1fr))"
    columns = f"grid-template-columns:minmax(90px,150px) repeat({len(large)},minmax(240px,1fr))"
    body = (
        '<p class="soft">The same prompts and the same noise at every evaluation: one row for each '
        "prompt. Rows that come to look alike, or pictures no prompt asks for, are what a reward "
        "cannot see.</p>"
        f'<div class="grids" style="{columns}"><div></div>{captions}'
        f'<div class="prompts" style="{rows}">{labels}</div>{images}</div>'
    )
    if kept:
        small = "".join(
            f'<div>{_image(run_folder, shown[index], _SMALL)}<div class="caption">'
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


def _picture_path(run_folder: Path, evaluation: Record) -> Path | None:
    """The evaluation's picture, if it is a readable PNG inside the run's folder."""
    if not isinstance(evaluation.get("images"), str):
        return None
    path: Path = (run_folder / evaluation["images"]).resolve()
    if not path.is_relative_to(run_folder.resolve()) or not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            picture.verify()
    except (OSError, SyntaxError, Image.DecompressionBombError):  # Pillow's ways to refuse
        return None
    return path


def _image(run_folder: Path, evaluation: Record, longest: int) -> str:
    """An `<img>` with its data inside, made smaller if a side is longer than `longest` pixels."""
    path = _picture_path(run_folder, evaluation)
    assert path is not None, "only evaluations with a picture come here"
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
        if max(picture.size) > longest:
            reduced = picture.convert("RGB")
            reduced.thumbnail((longest, longest), Image.Resampling.LANCZOS)
            smaller = io.BytesIO()
            reduced.save(smaller, format="PNG", optimize=True)
            data = smaller.getvalue()
    encoded = base64.b64encode(data).decode("ascii")
    return f'<img src="data:image/png;base64,{encoded}" alt="samples at step {evaluation["step"]}">'


def _evaluation_curves(evaluations: Sequence[Record], marks: Sequence[Mark]) -> str:
    if not evaluations:
        return _no_evaluations()
    return _charts(evaluation_charts(evaluations, marks))


def _events(steps: Sequence[Record]) -> str:
    """Events of the same name on one line, with their steps."""
    by_name: dict[str, list[int]] = {}
    for step in steps:
        for event in step.get("events", ()):
            by_name.setdefault(event, []).append(step["step"])
    if not by_name:
        return _missing("No event was logged.")
    lines = "".join(
        f"<li>{_text(name)}: step{'s' if len(at) > 1 else ''} {', '.join(map(str, at))}</li>"
        for name, at in by_name.items()
    )
    return f"<ul>{lines}</ul>"


def _recipe(recipe: str) -> str:
    if not recipe.strip():
        return _missing("No recipe.yaml in this folder.")
    return f"<details><summary>Resolved recipe</summary><pre>{_text(recipe)}</pre></details>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _missing(text: str) -> str:
    return f'<p class="soft">{_text(text)}</p>'


def _no_evaluations() -> str:
    return _missing("No evaluation was logged.")


def _no_steps() -> str:
    return _missing("No training step was logged.")


def _charts(charts: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>'


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


def _text(value: object) -> str:
    return html.escape(str(value))


def _minus(text: str) -> str:
    """A true minus sign before numbers; hyphens in names stay."""
    return re.sub(r"(?<![\w.])-(?=\d)", "\u2212", text)


def _number(value: float | None, digits: int = 4) -> str:
    return "\u2013" if value is None else _minus(format_number(value, digits))
