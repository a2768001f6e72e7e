"""The model card of exported weights: a README.md as Hugging Face's hub shows it, and its pictures.

Every statement is of the run's folder or of tables of this package; what is not known is left out,
or said to be unknown. Texts of users (names, prompts) are escaped: they are texts, not Markdown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gardo.files import write_atomically
from gardo.licences import Licence
from gardo.report.card_pictures import Shown, write_pictures
from gardo.report.card_usage import usage
from gardo.report.chart import line_chart
from gardo.report.curves import ROLES, reward_names
from gardo.report.markdown import code, escape, escape_line, fenced, table
from gardo.report.metrics_log import Record
from gardo.report.progress import format_interval
from gardo.report.series import Series
from gardo.report.verdict import judge

CARD, BESIDE = "README.md", "card"  # the file, and the folder of its pictures
ELSEWHERE = "MODEL_CARD.md"  # where a README.md is in the way that is not ours
MARK = "<!-- Written by `gardo export`, which writes over files with this line. -->"
MOST_ROWS = 12  # evaluations in the table


@dataclass(frozen=True)
class Scored:
    """A reward, as a row of the card's table."""

    name: str
    role: str
    kind: str
    formula: str = ""
    weights: tuple[str, ...] = ()  # hub ids and revisions, or names of folders
    licence: str = ""


@dataclass(frozen=True)
class CardFacts:
    """What the card says. No path, address or token is among it."""

    name: str
    base: str  # hub id, builtin:NAME, or a folder's name
    hub_id: str | None
    identity: Mapping[str, str]  # its revision, or sha256 of its transformer
    licence: Licence
    family: str
    pipeline: str  # classes of diffusers
    transformer: str
    precision: str
    format: str
    average: bool  # the weights' average, not the weights
    evaluated_average: bool  # which of them evaluations drew with
    step: int
    recipe: Mapping[str, Any]  # the resolved one
    processes: int | None = None
    algorithms: Sequence[tuple[str, str]] = ()  # the name and what it is, the outermost first
    prompts: str = ""
    prompt_count: int | None = None
    rewards: Sequence[Scored] = ()
    evaluations: Sequence[Record] = ()
    steps: Sequence[Record] = ()
    trained_with: Mapping[str, str] = field(default_factory=dict)  # versions, by name
    exported_with: Mapping[str, str] = field(default_factory=dict)
    devices: str = ""  # that trained

    @property
    def lora(self) -> bool:
        return bool(self.recipe["train"]["weights"]["kind"] == "lora")


def write_card(folder: Path, facts: CardFacts, run_folder: Path) -> Path:
    """Writes the card and its pictures into the folder of the weights; returns its path.

    A README.md of somebody else's is left as it is, the card is MODEL_CARD.md then. Pictures that
    cannot be read are left out. OSError where nothing can be written.
    """
    shown = write_pictures(folder / BESIDE, run_folder, facts.evaluations,
                           columns=facts.recipe["evaluate"]["images_per_prompt"])  # fmt: skip
    charts = []
    for number, (name, svg) in enumerate(_charts(facts.evaluations), start=1):
        (folder / BESIDE).mkdir(parents=True, exist_ok=True)
        chart = folder / BESIDE / f"curve-{number}.svg"
        write_atomically(chart, svg.encode("utf-8", "replace"))
        charts.append((name, f"{BESIDE}/{chart.name}"))
    path = folder / CARD
    if path.exists() and MARK not in path.read_text("utf-8", "replace"):
        path = folder / ELSEWHERE
    write_atomically(path, as_markdown(facts, shown, charts).encode("utf-8", "replace"))
    return path


def as_markdown(
    facts: CardFacts, shown: Shown | None = None, charts: Sequence[tuple[str, str]] = ()
) -> str:
    """The card. `charts` are what they show and their files, relative to the card."""
    shown = shown or Shown()
    parts = [
        f"---\n{_front_matter(facts, shown)}---",
        f"# {escape(facts.name)}",
        "\n".join(_summary(facts)),
        *(["<Gallery />"] if shown.samples else []),
        "## Licence",
        _licence(facts),
        "## Use",
        usage(facts.format, base=facts.base, findable=facts.hub_id or _builtin(facts),
              pipeline=facts.pipeline, transformer=facts.transformer, precision=facts.precision,
              model=facts.recipe["model"], steps=facts.recipe["evaluate"]["steps"]),
        "## What came of it",
        "\n\n".join(_results(facts, shown, charts)),
        "## How it was trained",
        "\n".join(_training(facts)),
        *_rewards(facts),
        "## Limits",
        "\n".join(_limits(facts)),
        "## Do it again",
        _again(facts),
        MARK,
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


# ---- the head ------------------------------------------------------------------------------------


def _front_matter(facts: CardFacts, shown: Shown) -> str:
    kind = ["lora"] if facts.lora else []
    said: dict[str, Any] = {}
    if facts.hub_id:
        said["base_model"] = facts.hub_id
        said["base_model_relation"] = "adapter" if facts.lora else "finetune"
    said |= facts.licence.front_matter
    said |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    said["tags"] = [*kind, "text-to-image", facts.family, "gardo", "reinforcement-learning"]
    if shown.samples:
        said["widget"] = [
            {"text": str(prompt), "output": {"url": f"{BESIDE}/{file}"}}
            for prompt, file in shown.samples
        ]
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True)


def _summary(facts: CardFacts) -> Iterator[str]:
    weights = facts.recipe["train"]["weights"]
    what = f"A LoRA of rank {weights['rank']}" if facts.lora else "All weights of the transformer"
    names = " around ".join(code(name) for name, _ in facts.algorithms)
    how = f" ({names})" if names else ""
    iterations = f"{facts.step:,} iteration{'' if facts.step == 1 else 's'}"
    yield (
        f"{what} of {code(facts.base)}, fine-tuned by reinforcement learning{how} for "
        f"{iterations} with gardo."
    )
    if facts.average:
        yield "These are the exponential moving average of the weights."


def _licence(facts: CardFacts) -> str:
    licence = facts.licence
    if not licence.known:
        return (
            f"What is trained on {code(facts.base)} has the licence of that model, which is not "
            "known here: look it up before you use or share these weights."
        )
    title = f"[{licence.title}]({licence.link})" if licence.link else licence.title
    terms = f" {licence.terms}" if licence.terms else ""
    page = " Its own page is what holds." if facts.hub_id else ""
    return f"That of the base model, {code(facts.base)}: {title}.{terms}{page}"


def _builtin(facts: CardFacts) -> str | None:
    return facts.base if facts.base.startswith("builtin:") else None


# ---- what came of it -----------------------------------------------------------------------------


def _results(facts: CardFacts, shown: Shown, charts: Sequence[tuple[str, str]]) -> Iterator[str]:
    if not facts.evaluations:
        yield "The run's folder has no evaluation: nothing is known of what training changed."
        return
    first, last = facts.evaluations[0]["step"], facts.evaluations[-1]["step"]
    verdict = judge(facts.evaluations, facts.steps)
    if verdict.sentences:
        yield (
            f"From iteration {first} to {last}, with 95 % intervals over prompts, changes paired "
            f"by prompt: {escape(' '.join(verdict.sentences))}"
        )
    yield f"**{escape(verdict.conclusion)}**"
    if facts.average != facts.evaluated_average:
        which = "the average of the weights" if facts.evaluated_average else "the live weights"
        yield f"The evaluations drew with {which}, not with the weights that are exported here."
    if last != facts.step:
        yield f"The weights are those after iteration {facts.step}, last evaluated after {last}."
    yield _table(facts.evaluations)
    yield from (f"![{escape(name)}, over iterations]({file})" for name, file in charts)
    yield from _pictures(shown)


def _table(evaluations: Sequence[Record]) -> str:
    """A row an evaluation, the first and the last among them: means with their intervals."""
    rewards = reward_names(evaluations)
    head = ["iteration", *(f"{escape(n)} ({ROLES.get(r, escape(r))})" for n, r in rewards.items())]
    count = len(evaluations)
    most = min(count, MOST_ROWS)
    chosen = [round(k * (count - 1) / max(1, most - 1)) for k in range(most)]
    rows = []
    for one in (evaluations[index] for index in chosen):
        values = [one.get("rewards", {}).get(name) for name in rewards]
        rows.append([str(one["step"]), *(format_interval(v) if v else "" for v in values)])
    return table(head, rows)


def _charts(evaluations: Sequence[Record]) -> Iterator[tuple[str, str]]:
    """The curve of each proxy and held-out reward, where there are two points: its name, SVG."""
    if len(evaluations) < 2:
        return
    x = [one["step"] for one in evaluations]
    for name, role in reward_names(evaluations).items():
        if role not in ("proxy", "held_out"):
            continue
        rows = [one.get("rewards", {}).get(name, {}) for one in evaluations]
        mean, low, high = ([row.get(key) for row in rows] for key in ("mean", "low", "high"))
        if not any(value is not None and math.isfinite(value) for value in mean):
            continue
        series = Series(name, x, mean, low, high, color=role == "held_out", points=True)
        unit = f"{ROLES[role]}, mean and 95 % interval"
        svg = line_chart([series], name, y_label=unit, x_label="iteration", standalone=True)
        yield f"{name}, {ROLES[role]}", svg


def _pictures(shown: Shown) -> Iterator[str]:
    if not shown.before_and_after:
        return
    prompts = "".join(f"\n{n}. {escape_line(p)}" for n, p in enumerate(shown.prompts, start=1))
    rows = f" A row is a prompt:\n{prompts}" if prompts else ""
    yield f"The same prompts and the same noise.{rows}"
    for step, file in shown.before_and_after:
        yield f"After iteration {step}:\n\n![pictures after iteration {step}]({BESIDE}/{file})"


# ---- how it was trained --------------------------------------------------------------------------


def _training(facts: CardFacts) -> Iterator[str]:
    recipe = facts.recipe
    which = "".join(f", {name} {code(said)}" for name, said in facts.identity.items())
    yield f"- Base model: {code(facts.base)}{which}"
    yield f"- Trained: {_trained(recipe['train'])}"
    for name, said in facts.algorithms:
        yield f"- Algorithm {code(name)}{': ' if said else ''}{escape(said)}"
    yield from (f"- {text}" for text in _gardo(recipe["algorithm"]))
    count = facts.prompt_count
    prompts = f", {count:,} prompt{'' if count == 1 else 's'}" if count else ""
    data = recipe["data"]
    yield (
        f"- Prompts: {code(facts.prompts)}{prompts}; {data['prompts_per_step']} an iteration, "
        f"{data['images_per_prompt']} images each"
    )
    sampler, model = recipe["sampler"], recipe["model"]
    yield (
        f"- Sampling: {sampler['steps']} denoise steps, {sampler['train_steps']} of them trained, "
        f"{' x '.join(map(str, model['size']))} pixels, guidance {model['guidance']:g}"
    )
    yield f"- Iterations: {facts.step} of {recipe['run']['steps']}, seed {recipe['run']['seed']}"


def _trained(train: Mapping[str, Any]) -> str:
    weights, optimizer = train["weights"], train["optimizer"]
    what = "all weights of the transformer"
    if weights["kind"] == "lora":
        targets = ", ".join(map(code, weights.get("targets") or ()))
        what = f"a LoRA of rank {weights['rank']}, alpha {weights['alpha']:g}"
        what += f", on {targets}" if targets else ""
    return f"{what}, by {code(optimizer['name'])} with learning rate {optimizer['lr']:g}"


def _gardo(algorithm: Mapping[str, Any]) -> Iterator[str]:
    """What GARDO added to its base, part by part."""
    if algorithm.get("name") != "gardo":
        return
    gate, diversity, reference = (algorithm.get(p) for p in ("gate", "diversity", "reference"))
    if gate:
        low, high = gate["limits"]
        yield (
            f"Gate: the KL acts on a share of the samples, {gate['fraction']:g} at first and "
            f"within {low:g} and {high:g}"
        )
    if diversity:
        yield f"Diversity: advantages scaled by distances of {code(diversity['features'])} features"
    if reference:
        limits = {
            "reset_kl": "where its KL passes {:g}",
            "reset_updates": "after {} updates",
            "reset_iterations": "after {} iterations",
        }
        when = [text.format(reference[n]) for n, text in limits.items() if reference.get(n)]
        yield f"Reference: reset to the policy {' or '.join(when) or 'never'}"
    parts = {"gate": gate, "diversity": diversity, "reference resets": reference}
    if off := [name for name, part in parts.items() if not part]:
        yield f"Switched off: {', '.join(off)}"


def _rewards(facts: CardFacts) -> Iterator[str]:
    if not facts.rewards:
        return
    head = ["reward", "role", "kind", "formula", "weights", "their licence"]
    rows = []
    for one in facts.rewards:
        role = ROLES.get(one.role, one.role)
        weights = ", ".join(map(code, one.weights))
        told = (escape(one.formula), weights, escape(one.licence))
        rows.append([code(one.name), escape(role), code(one.kind), *told])
    yield " ".join(_roles(facts))
    yield table(head, rows)


def _roles(facts: CardFacts) -> Iterator[str]:
    """What rewards of the roles that there are were for."""
    roles = {one.role for one in facts.rewards}
    if "proxy" in roles:
        yield "The proxy is what was optimised."
    if "auxiliary" in roles and facts.recipe["algorithm"].get("gate"):
        yield "By the auxiliaries the gate tells which values of the proxy not to trust."
    if "held_out" in roles:
        yield "Held-out rewards were only measured."


def _limits(facts: CardFacts) -> Iterator[str]:
    roles = {one.role for one in facts.rewards}
    yield "- A proxy is not quality: pictures that it likes better need not be better."
    if "held_out" not in roles:
        yield "- No held-out reward was measured: whether the proxy was exploited is not known."
    last = facts.evaluations[-1] if facts.evaluations else {}
    if last.get("image_count") and last.get("prompt_count"):
        where = "on prompts of the training set, " if _on_training_prompts(facts.recipe) else ""
        yield (
            f"- The numbers are of {last['image_count']:,} images of {last['prompt_count']:,} "
            f"prompts, {where}at one seed: of other prompts they say nothing."
        )
    if fell := _fell(facts.evaluations):
        yield f"- {fell}"
    yield "- The limits of the base model, and what its licence forbids, hold here too."


def _on_training_prompts(recipe: Mapping[str, Any]) -> bool:
    return not recipe["evaluate"].get("prompts") and not recipe["data"].get("held_out")


def _fell(evaluations: Sequence[Record]) -> str:
    """The held-out rewards that clearly fell, with the change."""
    if len(evaluations) < 2:
        return ""
    last = evaluations[-1]
    fell = [
        f"{code(name)} ({format_interval(change, signed=True)})"
        for name, change in last.get("change", {}).items()
        if last.get("rewards", {}).get(name, {}).get("role") == "held_out" and _below_zero(change)
    ]
    return f"Held-out rewards fell since the start: {', '.join(fell)}." if fell else ""


def _below_zero(change: Mapping[str, Any]) -> bool:
    high = change.get("high")
    return high is not None and math.isfinite(high) and high < 0


# ---- again ---------------------------------------------------------------------------------------


def _again(facts: CardFacts) -> str:
    gpus = f" --gpus {facts.processes}" if facts.processes else ""
    average = " --ema" if facts.average else ""
    text = yaml.safe_dump(dict(facts.recipe), sort_keys=False, allow_unicode=True)
    run = facts.recipe["run"]
    export = f"gardo export {run['folder']}/{run['name']} --format {facts.format}"
    return "\n\n".join([
        "With the recipe below in `recipe.yaml`:",
        fenced(f"gardo train recipe.yaml{gpus}\n{export} --step {facts.step}{average}", "bash"),
        " ".join(_made_with(facts)),
        "<details><summary>The resolved recipe: of paths the last part, addresses left out"
        f"</summary>\n\n{fenced(text.rstrip(), 'yaml')}\n\n</details>",
    ])  # fmt: skip


def _made_with(facts: CardFacts) -> Iterator[str]:
    for what, versions in (("Trained", facts.trained_with), ("Exported", facts.exported_with)):
        said = ", ".join(f"{escape(name)} {escape(value)}" for name, value in versions.items())
        on = f" on {escape(facts.devices)}" if what == "Trained" and facts.devices else ""
        if said:
            yield f"{what}{on} with {said}."
