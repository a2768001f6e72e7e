"""The pages of an evaluation, from its result.json: `result.md` and a self-contained `result.html`.

Both are made of the same blocks: sentences and tables of plain text.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gardo.report.page import minus, page, picture, section, text
from gardo.report.progress import format_interval, format_number

_LARGE = 1600  # longest side of the picture, pixels
_ROLES = {"held_out": "held out"}
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Block:
    """A section: sentences, then a table."""

    title: str
    sentences: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def as_markdown(result: Result) -> str:
    """The page without its picture's data: it shows grid.png beside it."""
    lines = [f"# {_plain(_title(result))}", "", *(f"- {_plain(f)}" for f in _facts(result))]
    for block in _blocks(result):
        lines += ["", f"## {block.title}", "", *block.sentences]
        if block.rows:
            cells = [block.head, ["---"] * len(block.head), *block.rows]
            table = (f"| {' | '.join(map(_cell, row))} |" for row in cells)
            lines += ["", *table] if block.sentences else table
    lines += [
        "",
        "## Pictures",
        "",
        "A row is a prompt.",
        "",
        "![images of the shown prompts](grid.png)",
    ]
    lines += ["", *(f"{n}. {prompt}" for n, prompt in enumerate(map(_plain, _shown(result)), 1))]
    return "\n".join(lines)


def as_html(result: Result, grid: bytes) -> str:
    """The page with the grid, a PNG, inside."""
    facts = "".join(f"<li>{text(fact)}</li>" for fact in _facts(result))
    body = [f"<h1>{text(_title(result))}</h1>", f"<ul>{facts}</ul>"]
    for block in _blocks(result):
        sentences = "".join(f"<p>{minus(text(sentence))}</p>" for sentence in block.sentences)
        body.append(section(text(block.title), sentences + _table(block.head, block.rows)))
    shown = "".join(f"<li>{text(prompt)}</li>" for prompt in _shown(result))
    image = picture(grid, _LARGE, "images of the shown prompts, a row each")
    body.append(
        section("Pictures", f'<p class="soft">A row is a prompt:</p><ol>{shown}</ol>{image}')
    )
    by_prompt = _table(*_by_prompt(result))
    body.append(section("By prompt", f"<details><summary>Means</summary>{by_prompt}</details>"))
    made = json.dumps(_made(result), indent=1, ensure_ascii=False)
    settings = f"<details><summary>Settings and versions</summary><pre>{text(made)}</pre></details>"
    body.append(section("How it was made", settings))
    return page(_title(result), body)


def _title(result: Result) -> str:
    return f"{model_name(result['model'])} on {result['suite']['name']}"


def model_name(model: Mapping[str, Any]) -> str:
    """`builtin:flux with run NAME, step 40`."""
    on = ""
    if run := model.get("run"):
        average = ", averaged" if run["weights"] == "average" else ""
        on = f" with run {run['name']}, step {run['step']}{average}"
    elif lora := model.get("lora"):
        on = f" with LoRA {lora['path']}"
    return f"{model['id']}{on}"


def _facts(result: Result) -> Iterable[str]:
    asks, model = result["suite"]["asks"], result["model"]
    prompts, each = len(asks["prompts"]), asks["images_per_prompt"]
    weights = (
        f"revision {model['revision']}" if "revision" in model else f"sha256 {model['sha256']}"
    )
    images = f"{prompts * each} images: {each} of each of {prompts} prompts"
    yield f"{images}, noise of seed {asks['seed']}"
    yield (
        f"{asks['steps']} denoise steps, guidance {model['guidance']:g}, "
        f"{' x '.join(map(str, asks['size']))} pixels, {model['precision']}"
    )
    yield f"model {model['id']}, {weights}"
    for kind in ("lora", "run"):
        if kind in model:
            yield f"{kind}, sha256 {model[kind]['sha256']}"
    made = result["made_with"]
    yield ", ".join(f"{name} {version}" for name, version in made.items())
    if against := result.get("against"):
        yield f"compared with {model_name(against['model'])}"
        yield from (f"not the same: {note}" for note in against["differs_in"])


def _blocks(result: Result) -> Iterable[Block]:
    if "against" in result:
        yield _signs(result["against"]["indicators"])
    yield _rewards(result)
    if result["diversity"] or result["label_entropy"]:
        yield _diversity(result)
    if result.get("proxy", {}).get("rank_correlation"):
        yield _correlations(result)


def _signs(indicators: Sequence[Mapping[str, str]]) -> Block:
    title = "Signs of reward hacking"
    if not indicators:
        return Block(title, ["None can be looked for: the suite has no reward with role proxy."])
    order = ("seen", "unknown", "not seen")
    counts = {state: sum(one["state"] == state for one in indicators) for state in order}
    said = f"Of {len(indicators)} signs {counts['seen']} are seen, {counts['not seen']} are not"
    unknown = f", {counts['unknown']} cannot be told" if counts["unknown"] else ""
    ordered = sorted(indicators, key=lambda one: order.index(one["state"]))
    rows = [[one["state"], one["sign"], one["of"], one["sentence"]] for one in ordered]
    note = "A sign is seen where its 95 % interval over prompts, paired by prompt, excludes zero."
    return Block(title, [f"{said}{unknown}. {note}"], ["", "sign", "of", "what was seen"], rows)


def _rewards(result: Result) -> Block:
    against = result.get("against", {}).get("rewards", {})
    head = ["reward", "role", "mean", "spread within a prompt"]
    head += ["change", "win rate", "change of spread"] if against else []
    rows = []
    for name, one in result["rewards"].items():
        lacking = one["images_without_value"]
        cells = [name, _ROLES.get(one["role"], one["role"]), _interval(one)]
        cells[-1] += f" ({lacking} images without a value)" if lacking else ""
        cells.append(_interval(one["spread"]))
        if against:
            change = against.get(name, {})
            cells.append(_interval(change.get("change"), signed=True))
            cells.append(_interval(change.get("win_rate")))
            cells.append(_interval(change.get("spread"), signed=True))
        rows.append(cells)
    note = "Means with 95 % intervals over prompts; the spread is the standard deviation among the "
    note += "images of a prompt."
    paired = (
        " Changes are paired by prompt; a win is a prompt with the higher mean, a tie half of one."
    )
    return Block("Rewards", [note + (paired if against else "")], head, rows)


def _diversity(result: Result) -> Block:
    against = result.get("against")
    rows = []
    for name, one in result["diversity"].items():
        change = [_interval(against["diversity"].get(name), signed=True)] if against else []
        rows.append([name, _interval(one), *change])
    for name, value in result["label_entropy"].items():
        moved = against["label_entropy"].get(name) if against else None
        change = [_dash(moved, signed=True)] if against else []
        rows.append([f"entropy of {name}, nats", _dash(value), *change])
    note = (
        "Among the images of a prompt: 100 x the mean pairwise cosine distance of features, 100 x "
    )
    note += "the distance to the nearest, the Vendi score. Entropies are of all images and have no "
    note += "interval."
    return Block("Diversity", [note], ["", "value", *(["change"] if against else [])], rows)


def _correlations(result: Result) -> Block:
    against = result.get("against", {}).get("rank_correlation", {})
    head = [
        "proxy with",
        "here",
        *(["at the baseline", "change", "of the changes"] if against else []),
    ]
    rows = []
    for name, one in result["proxy"]["rank_correlation"].items():
        more = against.get(name, {})
        kinds = ("baseline", "change", "of_changes") if against else ()
        changes = [_interval(more.get(kind), signed=kind == "change") for kind in kinds]
        rows.append([name, _interval(one), *changes])
    note = "Spearman's rank correlation over prompts, with 95 % intervals."
    return Block("Does the proxy rank as the others do?", [note], head, rows)


def _by_prompt(result: Result) -> tuple[list[str], list[list[str]]]:
    means = {name: one["by_prompt"] for name, one in result["rewards"].items()}
    means |= {name: one["by_prompt"] for name, one in result["diversity"].items()}
    prompts = [prompt for prompt, _ in result["suite"]["asks"]["prompts"]]
    rows = [[p, *(_dash(means[n][at]) for n in means)] for at, p in enumerate(prompts)]
    return ["prompt", *means], rows


def _made(result: Result) -> dict[str, Any]:
    suite = result["suite"]
    asks = {name: value for name, value in suite["asks"].items() if name != "prompts"}
    found = {"suite": {**suite, "asks": asks}, "model": result["model"]}
    return {**found, "made_with": result["made_with"]}


def _shown(result: Result) -> list[str]:
    prompts = result["suite"]["asks"]["prompts"]
    return [prompts[at][0] for at in result["shown"]]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{text(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(map(_td, row))}</tr>" for row in rows)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _td(cell: str) -> str:
    long = ' style="white-space:normal;text-align:left;min-width:30ch"' if len(cell) > 60 else ""
    return f"<td{long}>{minus(text(cell))}</td>"


def _cell(value: str) -> str:
    return _plain(value).replace("|", "\\|")


def _plain(value: str) -> str:
    """A user's text in Markdown: nothing in it opens a tag, a link, a picture or a line."""
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), ("](", "]&#40;")):
        value = value.replace(sign, entity)
    return " ".join(value.split())


def _interval(value: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    if value is None or value["mean"] is None:
        return "\u2013"
    return format_interval(value, signed=signed)


def _dash(value: float | None, *, signed: bool = False) -> str:
    if value is None:
        return "\u2013"
    return ("+" if signed and value > 0 else "") + format_number(value, 3)
