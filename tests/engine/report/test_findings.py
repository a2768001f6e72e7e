"""What is found in a run: each rule where it applies, nothing where all is well, and the study."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gardo.evaluation.statistics import bootstrap_mean, paired_change
from gardo.report.findings import RULES, Finding, Run, findings
from gardo.report.findings.page import as_html
from gardo.report.metrics_log import Record, read_metrics
from tests import ROOT
from tests.engine.report.records import evaluation_record, step_record, write_log

CELLS = ROOT / "benchmarks" / "results" / "study" / "cells"
ROLES = {
    "tiny_count": "proxy", "tiny_shape": "auxiliary", "tiny_purity": "auxiliary",
    "tiny_fidelity": "held_out", "tiny_patches": "held_out",
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "train": {"updates_per_step": 2, "max_grad_norm": 1.0},
    "algorithm": {
        "name": "gardo",
        "base": {"name": "flow_grpo", "clip_range": 1e-4, "beta": 0.04},
        "gate": {"limits": [0.02, 0.2], "warmup": 20},
        "reference": {"reset_kl": 1e-3},
    },
}
GPU = {"devices": [{"name": "a GPU", "bytes": 80e9}]}


def step(number: int, **metrics: float) -> Record:
    """A step of a healthy run, its metrics changed."""
    record = step_record(number, seconds={"sample": 20.0, "reward": 3.0, "train": 24.0})
    known = record["metrics"] | {
        "ratio_error": 1e-5, "clip_fraction": 0.1, "gate_share": 0.1, "gate_fraction": 0.1,
        "kl": 2e-4 + 1e-5 * (number % 3), "grad_norm": 0.2,
    }  # fmt: skip
    return record | {"metrics": known | metrics, "peak_bytes": 60e9}


def steps(count: int = 40, **metrics: float) -> list[Record]:
    return [step(number, **metrics) for number in range(1, count + 1)]


def changed(change: Callable[[Record], None], count: int = 40) -> list[Record]:
    """Healthy steps, each changed."""
    records = steps(count)
    for record in records:
        change(record)
    return records


def of_rewards(**values: dict[str, float]) -> Callable[[Record], None]:
    """Changes entries of rewards."""

    def change(record: Record) -> None:
        for name, value in values.items():
            record["rewards"][name].update(value)

    return change


def evaluated(proxy: float = 0.1, held_out: float = 0.0, layout: float = 2.9) -> list[Record]:
    last = evaluation_record(40, proxy=proxy, held_out=held_out)
    return [evaluation_record(0), evaluation_record(20), last | {"diversity": {"layout": layout}}]


def found(run: Run, rule: str) -> list[Finding]:
    return [one for each in RULES if each.__name__ == rule for one in each(run)]


def test_a_healthy_run_has_good_findings_only() -> None:
    run = Run(steps(), evaluated(), RECIPE, GPU)
    (good,) = findings(run)
    assert good.severity == "good" and good.about == ("count",)
    assert good.sentence == (
        "The proxy count rose by 0.100 [0.090, 0.110], from 0.600 to 0.700, and no held-out reward "
        "clearly fell."
    )
    assert findings(Run([], [])) == findings(Run(steps(3), evaluated()[:1], RECIPE)) == []


def noisy_clip(record: Record) -> None:
    record["metrics"]["ratio_error"] = 4e-5


def two_skipped(record: Record) -> None:
    if record["step"] in (7, 30):
        record["metrics"]["skipped_updates"] = 1


def saturated(record: Record) -> None:
    if record["step"] > 10:
        record["rewards"]["hpsv2"]["std"] = 0.002


def exploding(record: Record) -> None:
    if record["step"] > 35:
        record["metrics"]["kl"] = 0.05


def asked(record: Record) -> None:
    record["judges"] = {"better": {"questions": 100, "unanswered": 1, "unreadable": 14}}


def events(name: str, every: int) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        if record["step"] % every == 0:
            record["events"] = [f"{name} (why)"]

    return change


NO_HELD_OUT = [
    one | {"rewards": {"count": one["rewards"]["count"]}, "change": {}} for one in evaluated()
]
CASES: list[tuple[str, str, Run, str]] = [
    ("hacked", "warning", Run(steps(), evaluated(held_out=-0.2)),
     "The reward is probably being hacked: held-out quality fell by 0.200 [0.190, 0.210], from "
     "0.900 to 0.700, while the proxy count rose"),
    ("hacked", "note", Run(steps(), evaluated(held_out=-0.02)), "Held-out quality fell by 0.020"),
    ("hacked", "warning", Run(steps(), evaluated(0.0, -0.2)), "nothing is won"),
    ("less_diverse", "note", Run([], evaluated(layout=2.25)), "layout fell by 25 %, from 3.00"),
    ("less_diverse", "warning", Run([], evaluated(layout=1.0)), "layout fell by 67 %"),
    ("not_finite", "warning", Run(steps(loss=float("nan")), []), "lately in step 40"),
    ("bad_updates", "warning", Run(changed(two_skipped), [], RECIPE),
     "2 of 80 updates were left out, the last in step 30."),
    ("no_signal", "warning", Run(changed(of_rewards(hpsv2={"std": 0.0})), []),
     "hpsv2 says the same of every sample"),
    ("no_signal", "warning", Run(changed(saturated), []), "(spread 0.0020, 0.10 at the start)"),
    ("no_gradient", "warning", Run(steps(grad_norm=0.0), []), "The gradient was 0 in the last 20"),
    ("kl_explodes", "warning", Run(changed(exploding), []), "0.050 in the last 5 iterations"),
    ("ratio_noise", "warning", Run(changed(noisy_clip), [], RECIPE),
     "Ratio noise, 4e-5, is near the clip range, 1e-4"),
    ("clipped_rows", "warning", Run(steps(clip_fraction=0.7), []), "70 % of rows were clipped"),
    ("gate_clamped", "warning", Run(steps(26) + steps(14, gate_fraction=0.2), [], RECIPE),
     "The gate's share was at its upper clamp, 20 %, in 14 of the last 20 iterations"),
    ("gate_clamped", "note", Run(steps(gate_fraction=0.02), [], RECIPE), "lower clamp, 2 %"),
    ("gate_empty", "warning", Run(steps(gate_share=0.0), [], RECIPE), "took no sample"),
    ("gate_catches", "good",
     Run(changed(of_rewards(pickscore={"gated": 22.0})), []), "below all in 20 of the last 20"),
    ("gate_catches", "warning",
     Run(changed(of_rewards(pickscore={"gated": 23.0})), []), "holds back what pickscore likes"),
    ("reference_resets", "warning", Run(changed(events("reference reset", 2)), [], RECIPE),
     "reset in 10 of the last 20"),
    ("reference_resets", "note", Run(steps(100, kl=2e-5), [], RECIPE), "never reset in 100 steps"),
    ("not_learning", "note", Run(steps(clip_fraction=0.0), evaluated(0.0)), "hardly move"),
    ("masked_rewards", "warning", Run(changed(of_rewards(pickscore={"valid": 86})), []),
     "pickscore gave no value for 10 % of the samples"),
    ("unread_answers", "warning", Run(changed(asked), []), "better left 15 % of its questions"),
    ("recomputed", "note", Run(changed(events("old velocities recomputed", 1)), []), "20 of the"),
    ("clipped_gradient", "note", Run(steps(grad_norm=3.0), [], RECIPE), "in 20 of the last 20"),
    ("slow_phase", "note",
     Run(changed(lambda r: r["seconds"].update(reward=60.0)), []), "reward takes 58 % of"),
    ("memory_full", "note",
     Run(steps(), [], {}, {"devices": [{"bytes": 62e9}]}), "60.0 of 62.0 GB"),
    ("nothing_held_out", "note", Run([], NO_HELD_OUT), "No held-out reward"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "severity", "run", "words"), CASES)
def test_rule(rule: str, severity: str, run: Run, words: str) -> None:
    (one,) = found(run, rule)
    assert one.severity == severity and words in one.sentence
    assert one.sentence.endswith(".") and one.advice.endswith(".")
    assert one in findings(run)


def test_a_hacked_run_is_told_which_checkpoint_to_keep() -> None:
    first, last = evaluation_record(0), evaluation_record(60, proxy=0.2, held_out=-0.3)
    middle = [evaluation_record(20, proxy=0.1), evaluation_record(40, proxy=0.2, held_out=-0.2)]
    (said,) = found(Run([], [first, *middle, last]), "hacked")
    assert "that of step 20 had the highest held-out" in said.advice
    (said,) = found(Run([], [first, last]), "hacked")
    assert "keep an earlier checkpoint" in said.advice


def test_every_rule_has_a_case() -> None:
    assert {rule.__name__ for rule in RULES} == {case[0] for case in CASES}


def test_warnings_come_first() -> None:
    run = Run(steps(clip_fraction=0.7, grad_norm=3.0), evaluated(), RECIPE, GPU)
    assert [one.severity for one in findings(run)] == ["warning", "note", "good"]


def test_steps_that_are_too_few_say_nothing() -> None:
    few = [step(n, clip_fraction=0.9, grad_norm=0.0, gate_share=0.0) for n in range(1, 4)]
    assert findings(Run(few, [], RECIPE)) == []


@cache
def study(arm: str) -> list[list[Finding]]:
    """The findings in each seed of an arm, from its raw metrics and the evaluations they hold."""
    of_seeds = []
    for path in sorted(CELLS.glob(f"{arm}-seed*.jsonl")):
        records = read_metrics(path)
        evaluations = [record for record in records if record["kind"] == "evaluation"]
        start = {n: torch.tensor(v).double() for n, v in evaluations[0]["by_prompt"].items()}
        for one in (evaluations[0], evaluations[-1]):
            values = {name: torch.tensor(v).double() for name, v in one["by_prompt"].items()}
            one["rewards"] = {
                n: asdict(bootstrap_mean(v, resamples=400)) | {"role": ROLES[n]}
                for n, v in values.items()
            }
            one["change"] = {
                n: asdict(paired_change(start[n], v, resamples=400)) for n, v in values.items()
            }
        trained = [record for record in records if record["kind"] == "step"]
        for one in trained:
            one["rewards"] = {n: {"mean": v, "role": ROLES[n]} for n, v in one["rewards"].items()}
        of_seeds.append(findings(Run(trained, evaluations, RECIPE)))
    return of_seeds


@pytest.mark.parametrize(
    ("arm", "seeds", "called_hacked"),
    [
        ("no_kl", 8, 8), ("no_kl_counts", 4, 4), ("no_kl_nft", 4, 3), ("uniform_kl_weak", 4, 3),
        ("gardo_nft", 4, 3), ("gardo", 8, 0), ("gardo_counts", 4, 0), ("uniform_kl", 8, 0),
        ("no_diversity", 4, 0), ("no_reset", 4, 0), ("no_gate", 4, 0), ("official_sign", 4, 0),
        ("uniform_kl_strong", 4, 0),
    ],
)  # fmt: skip
def test_the_study_is_judged_as_its_page_has_it(arm: str, seeds: int, called_hacked: int) -> None:
    """Seeds whose held-out fell far are called hacked, those of GARDO are not: evidence.md."""
    of_seeds = study(arm)
    assert len(of_seeds) == seeds
    hacked = [any("hacked" in one.sentence for one in found) for found in of_seeds]
    assert sum(hacked) == called_hacked


@pytest.mark.parametrize(("arm", "hacked"), [("gardo", {3}), ("uniform_kl", {1, 2, 3, 4, 8})])
def test_seeds_that_fell_five_points_have_a_note(arm: str, hacked: set[int]) -> None:
    """The study's own limit is stricter: what it calls hacked is not passed over."""
    noted = {
        seed
        for seed, found in enumerate(study(arm), start=1)
        for one in found
        if one.severity == "note" and one.sentence.startswith("Held-out")
    }
    assert hacked <= noted


def test_no_other_warning_in_gardo_s_runs_of_the_study() -> None:
    warnings = [one for found in study("gardo") for one in found if one.severity == "warning"]
    assert warnings == []
    assert sum(one.severity == "good" for found in study("gardo") for one in found) >= 5


def test_a_run_is_read_from_its_folder(tmp_path: Path) -> None:
    write_log(tmp_path / "metrics.jsonl", [*evaluated()[:1], *steps(14, gate_fraction=0.2)])
    bare = Run.of(tmp_path)
    assert len(bare.steps) == 14 and len(bare.evaluations) == 1 and not bare.recipe
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "environment.json").write_text(json.dumps({"starts": [{}, GPU]}))
    assert Run.of(tmp_path) == Run(bare.steps, bare.evaluations, RECIPE, GPU)
    assert Run.of(tmp_path).algorithm("clip_range") == 1e-4
    (tmp_path / "recipe.yaml").write_text("a: [")
    assert Run.of(tmp_path).recipe == {} and Run.of(tmp_path).algorithm("gate.limits") is None


def test_the_page_says_all_of_it_and_escapes_names() -> None:
    named = Finding("warning", "The proxy <b>x</b> fell by -0.1.", "Look & see.")
    page = as_html([named, *findings(Run(steps(), evaluated()))])
    assert "The proxy &lt;b&gt;x&lt;/b&gt; fell by −0.1." in page and "Look &amp; see." in page
    assert page.count("<li") == 2 and 'class="finding good"' in page
    assert "<li" not in as_html([])
