"""The study of ./run study: its tables, rows and curves, and what is left to train."""

import json

import matplotlib.pyplot as plt
import pytest

from study.figure import CURVES, curves
from study.runs import ARMS, Run
from study.tables import FIELDS, demo_table, report, rows, table

MEASURES = ("tiny_count", "tiny_fidelity", "tiny_patches")


def evaluation(step, change):
    """A record whose measures started at 0.5 and changed by `change`."""
    around = {"mean": change, "low": change - 0.01, "high": change + 0.01}
    return {
        "kind": "evaluation",
        "step": step,
        "rewards": {m: {n: 0.5 + v for n, v in around.items()} for m in MEASURES},
        "change": dict.fromkeys(MEASURES, around),
        "diversity": {"layout": 4 + change},
        "image_count": 432,
        "prompt_count": 54,
    }


def study():
    """Arms change by 0.1, 0.2 and 0.3 at 40 iterations, twice that at 100; seed 7 by 0.03 more."""
    return {
        arm: {
            seed: [
                evaluation(0, 0.0),
                evaluation(40, level + 0.03 * (seed == 7)),
                evaluation(100, 2 * level + 0.03 * (seed == 7)),
            ]
            for seed in (42, 7, 8)
        }
        for arm, level in zip(ARMS, (0.1, 0.2, 0.3), strict=True)
    }


# ---- what is written --------------------------------------------------------------------------


def test_table_has_every_run_and_the_mean_over_seeds():
    lines = table(study(), 100).splitlines()
    assert len(lines) == 2 + 3 + 3 * (3 + 1)
    assert all(line.count("|") == 9 for line in lines)
    assert lines[0].startswith("| after 100 iterations | seed |")
    assert lines[2] == "| start | 42 | 50.0 [49.0, 51.0] |  | 50.0 [49.0, 51.0] |  |  | 4.00 |"
    rise = "+23.0 [+22.0, +24.0]"
    assert lines[6] == (
        f"| no KL | 7 | 73.0 [72.0, 74.0] | {rise} | 73.0 [72.0, 74.0] | {rise} | {rise} | 4.23 |"
    )
    mean = "+21.0 (+20.0, +23.0)"
    assert lines[8] == (
        f"| **no KL** | all |  | **{mean}** |  | **{mean}** | {mean} | 4.21 (4.20, 4.23) |"
    )


def test_demo_table_has_a_column_a_seed():
    lines = demo_table(study(), 40).splitlines()
    assert len(lines) == 2 + 3 * 2
    assert lines[0].startswith("| after 40 iterations | change of | seed 42 | seed 7 | seed 8 |")
    same = "+30.0 [+29.0, +31.0]"
    assert lines[-1] == (
        f"| GARDO | held-out, % | {same} | +33.0 [+32.0, +34.0] | {same} | "
        "**+31.0 (+30.0, +33.0)** |"
    )


def test_report_names_the_revisions_and_shows_the_demo_where_it_was_passed():
    text = report(study(), 100, 40, ["abc1234", "def5678"], "a machine")
    assert "after 40 iterations" in text
    assert text.endswith("Trained at revisions abc1234, def5678; a machine.")
    assert "432 images of 54 prompts" in text
    assert "after 40 iterations" not in report(study(), 100, 60, ["abc1234"], "a machine")
    assert report(study(), 40, 40, ["abc1234"], "a machine").count("after 40 iterations") == 1


def test_csv_has_a_row_an_arm_seed_iteration_and_measure():
    revisions = {(arm, seed): f"of{seed}" for arm in ARMS for seed in (42, 7, 8)}
    found = [dict(zip(FIELDS, r, strict=True)) for r in rows(study(), revisions, "a machine")]
    assert len(found) == 3 * 3 * 3 * (3 + 1)
    keys = {(r["arm"], r["seed"], r["iteration"], r["measure"]) for r in found}
    assert len(keys) == len(found)
    (row,) = (
        r for r in found
        if (r["arm"], r["seed"], r["iteration"]) == ("GARDO", 7, 100)
        and r["measure"] == "tiny_fidelity"
    )  # fmt: skip
    assert row["mean"] == pytest.approx(1.13) and row["change"] == pytest.approx(0.63)
    assert row["change_low"] == pytest.approx(0.62) and row["revision"] == "of7"


def test_curves_have_a_line_a_seed_and_their_mean():
    figure = plt.figure()
    axes = figure.subplots(1, len(CURVES))
    curves(study(), axes)
    for axis in axes:
        assert len(axis.lines) == 3 * (3 + 1)
        mean = axis.lines[3]
        assert mean.get_label() == "no KL" and list(mean.get_xdata()) == [0, 40, 100]
        assert mean.get_linewidth() > axis.lines[0].get_linewidth()
    assert axes[0].lines[3].get_ydata()[-1] == pytest.approx(0.5 + 0.21)
    plt.close(figure)


# ---- what is left to train --------------------------------------------------------------------


def evaluated(run, steps, *, exported):
    """The run's folder as training leaves it after these evaluations."""
    run.folder.mkdir(parents=True)
    lines = [json.dumps(evaluation(step, 0.1)) for step in steps]
    (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if exported:
        (run.folder / "export").mkdir()


def test_a_run_is_finished_when_its_last_step_is_evaluated_and_exported(tmp_path):
    new, cut, late, done = (Run("tiny_flux_gardo", seed, tmp_path) for seed in range(4))
    evaluated(cut, [0, 20, 40], exported=False)
    evaluated(late, [0, 20, 40, 100], exported=False)
    evaluated(done, [0, 20, 40, 100], exported=True)
    assert [run.finished(100) for run in (new, cut, late, done)] == [False, False, False, True]
    assert not done.finished(120), "more iterations were asked for"
    assert not done.finished(40), "its weights are not those of 40 iterations"


def test_a_run_s_name_and_command_carry_its_seed_and_resume(tmp_path):
    run = Run("tiny_flux_grpo_kl", 7, tmp_path)
    assert run.folder == tmp_path / "tiny-flux-grpo-kl-seed7"
    alone, beside = (run.command(100, ["train.micro_batch=8"], jobs) for jobs in (1, 2))
    for command in (alone, beside):
        assert "--resume" in command and command[-1] == "train.micro_batch=8"
        assert {"run.seed=7", "run.steps=100", f"run.name={run.name}"} <= set(command)
    assert alone[alone.index("--gpus") + 1] == "2" and "gardo.cli" in alone
    assert "distributed.threads=1" in beside and "gardo.train" in beside


def test_the_revision_is_that_of_the_training(tmp_path):
    run = Run("tiny_flux_gardo", 7, tmp_path)
    assert run.revisions() == ["unknown"]
    run.record_revision("aaaaaaa")
    run.record_revision("bbbbbbb")
    assert run.revisions() == ["bbbbbbb"], "nothing was saved at the first: it starts anew"
    (run.folder / "checkpoints" / "step-000010").mkdir(parents=True)
    for now in ("ccccccc", "ccccccc"):
        run.record_revision(now)
    assert run.revisions() == ["bbbbbbb", "ccccccc"], "it goes on from the checkpoint"
