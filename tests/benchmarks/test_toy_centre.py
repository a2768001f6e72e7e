"""The toy's second question: its cases, a seed of it, the first step taken apart, its tables."""

import pytest
import torch

from tests import ROOT
from toy import centre
from toy.centre_tables import findings, first_step, looks, page, table
from toy.pulls import ascents, regions
from toy.seeds import START
from toy.tables import MEASURES
from toy.train import Run
from toy.world import load, pretrain

TOY = load(ROOT / "benchmarks/toy/toy.yaml")
QUESTION = centre.load_question(ROOT / "benchmarks/toy/centre.yaml")


def test_cases_are_the_toy_but_for_the_centre_and_the_spurious_place():
    for case in QUESTION.cases.values():
        toy = case.toy(TOY)
        assert toy.training == TOY.training and toy.pretraining == TOY.pretraining
        assert toy.arms == {name: TOY.arms[name] for name in case.arms}
        assert toy.layout.centre_density == case.centre_density
        assert toy.layout.spurious.height == case.spurious_height
        fields = {"centre_density": 0.1, "spurious": TOY.layout.spurious}
        assert toy.layout.model_copy(update=fields) == TOY.layout
    assert QUESTION.cases["tenth"].centre_density == TOY.layout.centre_density
    assert QUESTION.looked_at[-1] == TOY.training.iterations


def test_regions_by_hand():
    places = [[0.9, 0.0], [4.0, 0.9], [2.8284, 2.8284], [0.0, -4.0], [2.0, 0.0], [9.0, 0.0]]
    found = regions(TOY.layout, torch.tensor(places))
    assert {name: region_B.nonzero().flatten().tolist() for name, region_B in found.items()} == {
        "centre": [0],
        "rewarded": [1, 3],
        "unrewarded": [2],
        "between": [4, 5],
    }


@pytest.fixture(scope="module")
def pretrained():
    toy = QUESTION.cases["equal"].toy(TOY)
    return pretrain(toy.layout, toy.pretraining.model_copy(update={"iterations": 300}), seed=0)


def test_regions_parts_of_a_step_add_up_to_the_step(pretrained):
    toy = QUESTION.cases["equal"].toy(TOY)
    run = Run(toy, "diversity", 3, pretrained)
    rollout, scores = run.rollout(7)
    (batch,) = run.batches(rollout, run.credit(scores), 7)
    loss, _ = run.algorithm.loss(run.ctx, batch)
    whole = torch.autograd.grad(loss, list(run.policy.parameters()))
    parts = ascents(Run(toy, "diversity", 3, pretrained), 7)
    assert all(float(part_P.norm()) > 0 for part_P in parts.values())
    added_P = torch.stack(list(parts.values())).sum(0)
    expected_P = -torch.nn.utils.parameters_to_vector(whole)
    torch.testing.assert_close(added_P, expected_P, rtol=1e-3, atol=1e-6)


def test_a_seed_has_a_row_for_each_look_and_is_not_run_again(tmp_path):
    short = {"iterations": 60}
    toy = TOY.model_copy(update={"pretraining": TOY.pretraining.model_copy(update=short)})
    only = {"third": QUESTION.cases["third"]}
    question = QUESTION.model_copy(update={"seeds": 1, "looked_at": [1, 2], "cases": only})
    path = tmp_path / "centre.csv"
    centre.of_all_seeds(question, toy, path, processes=1, resume=False)
    rows = centre.read(path)
    assert [(row["arm"], row["iteration"]) for row in rows] == [
        (START, "0"),
        *((arm, now) for arm in ("no_kl", "diversity", "gardo") for now in "12"),
    ]
    assert all(0 <= float(row["centre_share"]) <= 1 for row in rows)
    assert all(row["revision"] and row["torch"] for row in rows)
    assert all((row["pull_centre"] != "") == (row["arm"] == START) for row in rows)
    written = path.stat().st_mtime_ns
    centre.of_all_seeds(question, toy, path, processes=1, resume=True)
    assert path.stat().st_mtime_ns == written


def row(case, arm, seed, iteration, level):
    """A row whose measures are `level` plus 0.01 a seed, and whose pulls are -1, 0, 1 and 2."""
    measured = dict.fromkeys(MEASURES, str(level + 0.01 * seed))
    pulled = {name: str(place - 1) for place, name in enumerate(centre.PULLS)}
    at = {"case": case, "arm": arm, "seed": str(seed), "iteration": str(iteration)}
    return {**at, **measured, **pulled, "revision": "abc", "torch": "2"}


LEVELS = {"no_kl": 0.01, "diversity": 0.03, "gardo": 4.6}


def rows_of(*names):
    """Seeds 0 to 2 of some cases; diversity loses what it had after 100 iterations."""
    rows = []
    for name in names:
        for seed in (1, 0, 2):
            rows.append(row(name, START, seed, 0, 0.5))
            for arm in QUESTION.cases[name].arms:
                for now in QUESTION.looked_at:
                    lost = arm == "diversity" and now > 100
                    rows.append(row(name, arm, seed, now, 0.0 if lost else LEVELS[arm]))
    return rows


def test_table_has_a_row_an_arm_and_a_column_a_look():
    lines = table(rows_of("third", "equal_spurious"), QUESTION, TOY).splitlines()
    assert len(lines) == 2 + 3 + 2, "cases without rows are left out"
    assert len({line.count("|") for line in lines}) == 1
    cells = [cell.strip() for cell in lines[2].split("|")]
    assert cells[1:3] == ["0.3", "β = 0"]
    assert cells[3].startswith("0.510 [0.485, 0.535]") and cells[3].endswith(", 3 of 3")
    assert cells[4].startswith("0.020 [-0.005, 0.045]") and cells[4].endswith(", 2 of 3")
    covered = [cell.strip()[-6:] for cell in lines[3].split("|")[4:7]]
    assert covered == ["3 of 3", "1 of 3", "1 of 3"]


def test_findings_hold_look_by_look():
    lines = findings(rows_of("third", "equal_spurious"), QUESTION, TOY).splitlines()[2:]
    verdicts = [["not" not in cell for cell in line.split("|")[3:6]] for line in lines]
    nowhere, everywhere = [False] * 3, [True] * 3
    assert verdicts == [nowhere, nowhere, everywhere, everywhere, [True, False, False]]
    assert "+0.020 [+0.020, +0.020]: holds" in lines[-1]
    assert "-0.010 [-0.010, -0.010]: **does not hold**" in lines[-1]


def test_first_step_and_the_page():
    rows = rows_of("third")
    step = first_step(rows, QUESTION).splitlines()
    same = [f"{v:+.2f} [{v:+.2f}, {v:+.2f}]" for v in (-1, 0, 1, 2, 2)]
    assert step[2] == f"| 0.3 | {' | '.join(same)} |"
    assert "3 of the 8 seeds" in page(rows, QUESTION, TOY)
    assert set(looks(rows, "third")) == {0, 100, 200, 300}
