"""Runs read from their folders, and their differences: of recipes, and of rewards by prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gardo.evaluation.statistics import Interval, paired_change
from gardo.report.environment import throughput
from gardo.report.findings import Run, findings
from gardo.report.metrics_log import Record
from gardo.report.verdict import Verdict, gaps, judge

_NAMING = ("run.name", "run.folder")  # no two runs share these
_EVALUATED = ("prompts", "prompt_count", "images_per_prompt", "steps")  # of the recipe's evaluate


@dataclass(frozen=True)
class Compared:
    """A run under a name that no other of the comparison has."""

    name: str
    folder: Path
    run: Run

    @property
    def verdict(self) -> Verdict:
        return judge(self.run.evaluations, self.run.steps)

    @property
    def last_step(self) -> int:
        return int(self.run.steps[-1]["step"]) if self.run.steps else 0

    def evaluation(self, step: int | None) -> Record | None:
        """Its evaluation at a step; the last for None."""
        found = [one for one in self.run.evaluations if step is None or one["step"] == step]
        return found[-1] if found else None


def read(folders: Sequence[Path]) -> list[Compared]:
    """The runs of these folders, named after them; the parent too where two have one name.

    Raises:
        ValueError: fewer than two, one twice, or no run; it opens with the folder.
    """
    if len(folders) < 2:
        raise ValueError(f"{folders[0] if folders else 'nothing'}: compare it with what?")
    seen: set[Path] = set()
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise ValueError(f"{folder}: no metrics.jsonl; name the folder of a run")
        if folder.resolve() in seen:
            raise ValueError(f"{folder}: given twice; each run once")
        seen.add(folder.resolve())
    full = [folder.resolve() for folder in folders]
    depth = next(n for n in range(1, 99) if len({one.parts[-n:] for one in full}) == len(full))
    names = ["/".join(one.parts[-depth:]) for one in full]
    return [
        Compared(name, folder, Run.of(folder)) for name, folder in zip(names, folders, strict=True)
    ]


def common_step(runs: Sequence[Compared]) -> int | None:
    """The last step at which all were evaluated.

    None where there is none, or where it is the start although all have a later evaluation: what
    came of them is then in the last evaluation of each.
    """
    steps = [{one["step"] for one in run.run.evaluations} for run in runs]
    shared = max(set.intersection(*steps), default=None)
    return None if shared == 0 and all(map(max, steps)) else shared


def differing(runs: Sequence[Compared]) -> dict[str, list[Any]]:
    """The recipes' fields that are not the same in all, each with its value in every run.

    None where a recipe has no such field. An algorithm's fields are under its own name,
    `flow_grpo.beta`, whatever is wrapped around it; `algorithm` says in what order they are.
    """
    fields = [dict(_flat(_by_name(run.run.recipe))) for run in runs]
    found = {}
    for name in dict.fromkeys(name for one in fields for name in one):
        values = [one.get(name) for one in fields]
        if name not in _NAMING and any(value != values[0] for value in values):
            found[name] = values
    return found


def paired(first: Compared, other: Compared, step: int | None) -> dict[str, Interval]:
    """For each reward that both have `other`'s mean less `first`'s, paired by prompt.

    Empty where the two were not evaluated alike: other prompts, images a prompt or denoise steps.
    """
    a, b = first.evaluation(step), other.evaluation(step)
    if a is None or b is None or not _alike(first, other, a, b):
        return {}
    ours, theirs = a.get("by_prompt", {}), b.get("by_prompt", {})
    return {
        name: paired_change(_values(ours[name]), _values(theirs[name]))
        for name in ours
        if len(theirs.get(name, ())) == len(ours[name])
    }


def as_data(runs: Sequence[Compared]) -> dict[str, Any]:
    """What scripts read: JSON's kinds, with null for what is not finite."""
    step = common_step(runs)
    return {
        "step": step,
        "differs": {
            field: dict(zip((run.name for run in runs), values, strict=True))
            for field, values in _finite(differing(runs)).items()
        },
        "runs": [_one(run, runs[0], step) for run in runs],
    }


def _one(run: Compared, first: Compared, step: int | None) -> dict[str, Any]:
    evaluation, verdict = run.evaluation(step) or {}, run.verdict
    speed = throughput(run.run.steps, run.run.environment.get("ranks", 1))
    moves = [one for one in gaps(run.run.evaluations) if step in (None, one.step)]
    changes = {} if run is first else paired(first, run, step)
    return _finite({
        "name": run.name,
        "folder": str(run.folder),
        "steps": run.last_step,
        "evaluated_at": evaluation.get("step"),
        "verdict": {"tone": verdict.tone, "conclusion": verdict.conclusion},
        "rewards": evaluation.get("rewards", {}),
        "diversity": evaluation.get("diversity", {}),
        "gap": moves[-1].gap if moves else None,
        "against_first": {name: asdict(change) for name, change in changes.items()},
        "throughput": asdict(speed),
        "findings": [
            {"severity": one.severity, "sentence": one.sentence, "advice": one.advice}
            for one in findings(run.run)
        ],
    })  # fmt: skip


def _alike(first: Compared, other: Compared, a: Record, b: Record) -> bool:
    said = [
        [one.setting(f"evaluate.{name}") for name in _EVALUATED] for one in (first.run, other.run)
    ]
    same_file = said[0][1:] == said[1][1:] and _file(said[0][0]) == _file(said[1][0])
    return same_file and a.get("prompts") == b.get("prompts")


def _file(prompts: object) -> object:
    """Where runs were started from does not matter."""
    return Path(prompts).name if isinstance(prompts, str) else prompts


def _values(values: Sequence[float | None]) -> torch.Tensor:
    return torch.tensor([math.nan if value is None else value for value in values]).double()


def _by_name(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with each layer of its algorithm as a section of its own."""
    layer, layers = recipe.get("algorithm"), {}
    while isinstance(layer, Mapping):
        name = str(layer.get("name"))
        layers[name] = {key: value for key, value in layer.items() if key not in ("name", "base")}
        layer = layer.get("base")
    return {**recipe, "algorithm": " around ".join(layers), **layers}


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            yield from _flat(inner, f"{before}{name}.")
        else:
            yield f"{before}{name}", inner


def _finite(value: Any) -> Any:
    """The same without NaN and infinities, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
