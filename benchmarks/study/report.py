"""What ./run study writes: tables, figures and a CSV, from the raw metrics."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from gardo.evaluation.evaluate import EvaluateSettings
from gardo.tiny import world
from pages import ROOT, fill
from study import figure, lead, raw, tables
from study.measures import Arms, Curve, curve, paired, stopped_early
from study.protocol import Cell, Protocol
from study.raw import Raw

RESULTS = ROOT / "benchmarks" / "results"
MAIN = "main"  # the question that early stopping, the figures and the closer tables belong to
EARLY = "early_stopping"  # an arm that nothing trains: what is kept of no KL's cells

SHORT = ("proxy", "held_out", "features", "drift")  # of README's table

Raws = Mapping[str, Mapping[int, Raw]]  # {arm: {seed: raw}}


def collected(cells: Sequence[Cell], folder: Path) -> dict[str, dict[int, Raw]]:
    """The cells that are there."""
    found: dict[str, dict[int, Raw]] = {}
    for cell in cells:
        known = raw.known(folder, cell)
        if known:
            found.setdefault(cell.arm, {})[cell.seed] = known
    return found


def compared(
    protocol: Protocol, raws: Raws, question: str, prompts: Sequence[int] | None = None
) -> Arms:
    """Curves of the arms that answer a question, early stopping after the arm it is made of."""
    arms: dict[str, dict[int, Curve]] = {}
    for name, arm in protocol.arms.items():
        if arm.question != question or name not in raws:
            continue
        arms[name] = {seed: curve(one, prompts) for seed, one in raws[name].items()}
        if name == protocol.watched_arm:
            arms[EARLY] = {s: stopped_early(c, protocol.rules) for s, c in arms[name].items()}
    return arms


def titles(protocol: Protocol, arms: Mapping[str, object]) -> dict[str, str]:
    known = {name: arm.title for name, arm in protocol.arms.items()}
    known[EARLY] = f"{known.get(protocol.watched_arm, '')}, stopped early"
    return {name: known[name] for name in arms}


def machines(raws: Raws) -> str:
    """Where the cells were trained, and how long they took."""
    about = [one.about for by_seed in raws.values() for one in by_seed.values()]
    revisions = list(dict.fromkeys(r for a in about for r in a["revision"].split()))
    places = list(dict.fromkeys(", ".join(filter(None, [a["machine"], a["gpu"]])) for a in about))
    seconds = sorted(a["seconds"] for a in about)
    return (
        f"{len(about)} cells, {seconds[0]:.0f} to {seconds[-1]:.0f} s each (median "
        f"{seconds[len(seconds) // 2]:.0f}), {sum(seconds) / 3600:.1f} hours in all on one core "
        f"each. Revision{'s' * (len(revisions) > 1)} {', '.join(revisions)}; {'; '.join(places)}."
    )


def sections(protocol: Protocol, raws: Raws) -> dict[str, str]:
    """{mark of the page: its table}, of the questions that have cells."""
    found: dict[str, str] = {}
    questions = list(dict.fromkeys(arm.question for arm in protocol.arms.values()))
    for question in questions:
        arms = compared(protocol, raws, question)
        if not arms:
            continue
        named, parts = titles(protocol, arms), protocol.parts.get(question, {})
        for part, (first, end) in parts.items():
            of_part = compared(protocol, raws, question, range(first, end))
            found[f"{question} {part}"] = tables.rewards(of_part, named)
        if not parts:
            found[question] = tables.summary(arms, named, protocol.rules.hacked)
        ours = protocol.ours.get(question)
        if ours in arms and len(arms) > 1:
            found[f"{question} against"] = tables.against(arms, named, ours)
        if question == MAIN:
            found |= _closer(protocol, raws, arms, named)
    found["where" if MAIN in questions else f"{questions[0]} where"] = machines(raws)
    return found


def _closer(protocol: Protocol, raws: Raws, arms: Arms, named: Mapping[str, str]) -> dict[str, str]:
    """Of the main question: every seed, images to a level, what a gate catches and how early."""
    trained = {name: title for name, title in named.items() if name in raws}
    return {
        "areas": tables.summary(arms, named, protocol.rules.hacked, tuple(tables.AREAS)),
        "wins": tables.matrix(arms, named),
        "seeds": tables.by_seed(arms, named),
        "level": tables.to_level(arms, named, protocol),
        "gate": tables.catches(raws, trained),
        "lead": tables.leads(
            {n: [lead.seen(one, protocol.rules) for one in raws[n].values()] for n in trained},
            trained,
        ),
    }


def draw(protocol: Protocol, cells: Sequence[Cell], out: Path) -> str:
    """Writes tables, figures and the CSV to `out`, and fills the page; the tables."""
    raws = collected(cells, out / "cells")
    if not raws:
        raise SystemExit(f"{out / 'cells'}: no cell of this protocol; train some")
    found = sections(protocol, raws)
    text = "\n\n".join(f"## {mark}\n\n{table}" for mark, table in found.items())
    (out / "tables.md").write_text(f"# {protocol.title}\n\n{text}\n", encoding="utf-8")
    arms = compared(protocol, raws, MAIN)
    with (out / "measures.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["arm", "seed", "measure", "value"], *tables.measured(arms)])
    headline = {n: t for n, t in titles(protocol, arms).items() if n in protocol.headline}
    if headline:
        figure.curves(arms, headline, out / "curves.png")
        trained = {n: t for n, t in headline.items() if n in raws}
        figure.gated(raws, trained, out / "gate.png")
        _pictures(protocol, cells, arms, headline, out)
    if out == (RESULTS / protocol.results).resolve():
        for mark, table in found.items():
            fill(ROOT / "docs" / protocol.page, mark, table)
        if headline:
            short = tables.summary(arms, headline, protocol.rules.hacked, SHORT)
            fill(ROOT / "README.md", "study", short)
    return text


def _pictures(
    protocol: Protocol, cells: Sequence[Cell], arms: Arms, headline: Mapping[str, str], out: Path
) -> None:
    """The headline arms' last pictures with the seed in which ours leads by the median."""
    ours, other = protocol.ours[MAIN], protocol.watched_arm
    seeds = [seed for seed in arms[ours] if seed in arms[other]]
    leads = paired(arms, ours, other, "held_out")
    seed = figure.median_seed(dict(zip(seeds, leads, strict=True)))
    samples = {
        headline[cell.arm]: raw.samples_of(out / "cells", cell)
        for cell in cells
        if cell.arm in headline and cell.seed == seed
    }
    start = out / "cells" / f"start-seed{seed}.png"
    prompts = world.prompts()
    shown = prompts[:: len(prompts) // EvaluateSettings().shown]
    caption = (
        f"seed {seed}, by which {headline[ours]}'s lead over {headline[other]} in held-out "
        f"fidelity is the median of {len(seeds)}; after {protocol.iterations} iterations, "
        f"the same noise in every panel. Rows: {', '.join(shown)}"
    )
    figure.pictures({"start": start} | samples, caption, out / "samples.png")
