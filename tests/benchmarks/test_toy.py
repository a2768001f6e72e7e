"""The toy of ./run toy: its plane, its policy, one iteration of every arm, its table."""

import csv
import math

import pytest
import torch

from tests import ROOT
from toy.tables import FIELDS, MEASURES, Comparison, claims, table
from toy.train import Run, positions
from toy.world import (
    Mixture,
    PlanePolicy,
    load,
    matching_loss,
    measures,
    panel,
    pretrain,
    rewarded_places,
    spurious_place,
)

TOY = load(ROOT / "benchmarks/toy/toy.yaml")
LAYOUT = TOY.layout


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def short(**training):
    """The toy with little training."""
    return TOY.model_copy(update={"training": TOY.training.model_copy(update=training)})


# ---- the plane --------------------------------------------------------------------------------


def test_density_is_the_mixture_s():
    mixture = Mixture(LAYOUT)
    density = mixture.log_density(mixture.modes_K2).exp()
    peak = 1 / (2 * math.pi * 0.3**2 * 8.1)  # other modes are over 10 std away
    assert density.tolist() == pytest.approx([peak] * 8 + [0.1 * peak], rel=1e-5)
    one_std = mixture.log_density(torch.tensor([[4.0 + 0.3, 0.0]])).exp()
    assert float(one_std) == pytest.approx(peak * math.exp(-0.5), rel=1e-4)
    line = torch.linspace(-6, 6, 241)
    grid = torch.cartesian_prod(line, line)
    total = mixture.log_density(grid).double().exp().sum() * 0.05**2
    assert float(total) == pytest.approx(1, abs=1e-4)


def test_samples_fall_on_the_modes_as_often_as_they_should():
    mixture = Mixture(LAYOUT)
    distance = torch.cdist(mixture.sample(40_000, generator()), mixture.modes_K2)
    near = (distance < 1.2).double().mean(0)  # 4 std: all but exp(-8) of a mode
    assert near.tolist() == pytest.approx([1 / 8.1] * 8 + [0.1 / 8.1], abs=0.01)  # 6 std
    assert float((distance.amin(1) ** 2).mean()) == pytest.approx(2 * 0.3**2, rel=0.03)


def test_rewards_by_hand():
    spurious = spurious_place(LAYOUT)
    assert spurious.tolist() == pytest.approx([6.5 / 2**0.5] * 2)
    places = torch.stack([torch.tensor([4.0, 0]), torch.tensor([0, 4.0]), torch.zeros(2), spurious])
    zeros = torch.zeros(4, dtype=torch.int64)
    scores = panel(LAYOUT)(places, [""] * 4, sample_B=torch.arange(4), group_B=zeros)
    # A ring mode is 4.77 from the spurious place, whose std is 1.2, and 4 from the centre.
    tail = 1.5 * math.exp(-(4**2 + 6.5**2 - 2 * 4 * 6.5 / 2**0.5) / (2 * 1.2**2))
    assert scores.rewards["true"].tolist() == pytest.approx([1, 1, 1, 0], abs=1e-6)
    assert scores.proxy_B.tolist() == pytest.approx([1 + tail, 1 + tail, 1, 1.5], abs=1e-5)
    assert scores.auxiliaries == ("wide", "taste")
    assert scores.rewards["taste"].tolist() == pytest.approx([1, 0.6, 0.8, 0], abs=1e-5)
    wide = 1 + math.exp(-(4**2) / (2 * 1.2**2))  # a ring mode's and the centre's: (4, 0)
    assert float(scores.rewards["wide"][0]) == pytest.approx(wide, abs=1e-4)
    assert torch.equal(scores.features_BD, places)
    beside = panel(LAYOUT).rewards["true"].score(torch.tensor([[4.0, 0.6]]), [""])[0]
    assert float(beside) == pytest.approx(math.exp(-0.5), abs=1e-6)


def test_measures_by_hand():
    places = rewarded_places(LAYOUT)
    spurious = spurious_place(LAYOUT)
    few = [1, 2, 40, 0, 3]  # of 100 samples; 2 % cover a mode
    x = torch.cat([p.repeat(n, 1) for p, n in zip(places, few, strict=True)])
    x = torch.cat([x, (spurious + torch.tensor([1.4, 0])).repeat(50, 1)])
    x = torch.cat([x, (spurious + torch.tensor([1.6, 0])).repeat(4, 1)])
    found = measures(LAYOUT, x)
    assert found["modes"] == 3
    assert found["centre_share"] == pytest.approx(0.03)
    assert found["spurious_share"] == pytest.approx(0.5)
    assert found["true"] == pytest.approx(0.46, abs=1e-4)
    bump = [1.5 * math.exp(-(d**2) / (2 * 1.2**2)) for d in (1.4, 1.6)]
    ring = 1.5 * math.exp(-(4**2 + 6.5**2 - 2 * 4 * 6.5 / 2**0.5) / (2 * 1.2**2))
    beside = 0.5 * bump[0] + 0.04 * bump[1] + 0.03 * ring  # three samples on the nearest two modes
    assert found["proxy"] - found["true"] == pytest.approx(beside, abs=1e-6)


# ---- the policy -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained():
    return pretrain(LAYOUT, TOY.pretraining.model_copy(update={"iterations": 300}), seed=0)


@torch.no_grad()
def test_pretraining_learns_the_mixture(pretrained):
    data = Mixture(LAYOUT).sample(4000, generator(5))
    fresh = PlanePolicy(TOY.pretraining.width, generator(0))
    before, after = (float(matching_loss(p, data, generator(6))) for p in (fresh, pretrained))
    # A constant predicts eps - x0 with an error of 1 + E|x0|^2 / 2 = 9; what no velocity can know
    # (which mode, at high sigma) remains.
    assert after < before / 2
    radius = positions(pretrained, TOY.training, 0).norm(dim=1)
    assert 3 < float(radius.mean()) < 4.5, "samples lie on the ring"


@pytest.mark.parametrize("arm", TOY.arms)
def test_every_arm_trains_and_repeats(arm, pretrained):
    toy = short(groups=2, evaluation_samples=50)
    start = [p.clone() for p in pretrained.parameters()]
    ends = []
    for _ in range(2):
        run = Run(toy, arm, 3, pretrained)
        scores, totals, events = run.iteration(0)
        assert len(scores.proxy_B) == 48 and events == []
        assert totals["ratio"] == pytest.approx(1, abs=1e-4), "one update an iteration"
        run.iteration(1)
        ends.append(run.positions())
        moved = zip(run.policy.parameters(), start, strict=True)
        assert all(not torch.equal(p, s) for p, s in moved)
    assert torch.equal(*ends)
    kept = zip(pretrained.parameters(), start, strict=True)
    assert all(torch.equal(p, s) for p, s in kept), "arms share the pre-trained policy"


def test_arms_differ_only_by_what_they_are_named_for():
    sections = {name: arm.algorithm for name, arm in TOY.arms.items()}
    bases = {name: section.get("base", section) for name, section in sections.items()}
    assert bases["gardo"] == bases["large_beta"]
    assert bases["diversity"] == bases["no_kl"]
    assert len({str({**base, "beta": 0}) for base in bases.values()}) == 1
    betas = [bases[a]["beta"] for a in ("large_beta", "middle_beta", "small_beta", "no_kl")]
    assert betas == sorted(betas, reverse=True) and betas[-1] == 0
    assert sections["gardo"]["diversity"] == sections["diversity"]["diversity"]


# ---- the table --------------------------------------------------------------------------------


def written(path, values):
    """A CSV in which an arm's measures are the given ones plus 0.01 a seed, rows out of order."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for seed in (1, 0, 2):
            for arm, level in values.items():
                row = dict.fromkeys(MEASURES, level + 0.01 * seed)
                writer.writerow({"arm": arm, "seed": seed, "cpu_seconds": 1, **row})
    return Comparison.read(path)


LEVELS = {
    "pretrained": 0.5,
    "large_beta": 0.6,
    "middle_beta": 0.7,
    "small_beta": 1.0,
    "no_kl": 1.5,
    "diversity": 2.0,
    "gardo": 4.75,
}


def test_table_of_a_csv(tmp_path):
    comparison = written(tmp_path / "toy.csv", LEVELS)
    lines = table(comparison, TOY).splitlines()
    assert len(lines) == 2 + 7 + 6
    assert lines[2].startswith("| pre-trained | 0.51 [0.49, 0.53]")
    assert lines[2].endswith("| 2 of 8 |"), "0.50, 0.51 and 0.52: two are above a half"
    paired = "+4.25 [+4.25, +4.25]"  # seeds differ, their differences do not
    assert lines[9].startswith(f"| *GARDO − pre-trained* | {paired} | {paired} | ")
    assert all(line.count("|") == 8 for line in lines)


def test_claims_of_a_csv(tmp_path):
    def verdicts(values):
        lines = claims(written(tmp_path / "toy.csv", values), TOY).splitlines()[2:]
        return ["not" not in line.split("|")[4] for line in lines]

    assert verdicts(LEVELS) == [True, True, False, True, True, True]
    other = {**LEVELS, "large_beta": 0.8, "small_beta": 2.6, "diversity": 4.8, "gardo": 4.4}
    assert verdicts(other) == [False, False, True, False, False, False]
