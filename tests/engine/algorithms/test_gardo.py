"""GARDO's gate, diversity and reference around real base algorithms."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gardo.algorithms.advantage import AdvantageSettings
from gardo.algorithms.base import SamplerSettings, World
from gardo.algorithms.diffusion_nft import DiffusionNFTSettings
from gardo.algorithms.flow_grpo import FlowGRPOSettings
from gardo.algorithms.gardo import (
    DiversitySettings,
    Gardo,
    GardoSettings,
    Gate,
    GateSettings,
    Reference,
    ReferenceSettings,
    diversity_factor,
    most_uncertain,
    nearest_euclidean,
    uncertainty,
)
from gardo.algorithms.refl import ReFLSettings
from gardo.distributed.base import OptimizerSettings
from gardo.distributed.local import LocalEngine
from gardo.flow import sd3_sigmas
from gardo.types import Credit, Metrics, Points, Scores

SAMPLER = SamplerSettings(steps=5, train_steps=3)
WORLD = World(sampler=SAMPLER, sigmas=sd3_sigmas(5), seed=1)


def scores_of(proxy, auxiliaries=None, *, valid=None, group=None, sample=None, features=None):
    proxy = torch.as_tensor(proxy, dtype=torch.float32)
    count = len(proxy)
    rewards = {n: torch.as_tensor(v).float() for n, v in (auxiliaries or {}).items()}
    return Scores(
        sample_B=torch.arange(count) if sample is None else torch.as_tensor(sample),
        group_B=torch.zeros(count, dtype=torch.int64) if group is None else torch.as_tensor(group),
        proxy_B=proxy,
        valid_B=torch.ones(count, dtype=torch.bool) if valid is None else torch.as_tensor(valid),
        rewards={"proxy": proxy, **rewards},
        auxiliaries=tuple(rewards),
        features_BD=features,
    )


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_scores(count=60, seed=0, groups=5):
    draw = generator(seed)
    return scores_of(
        torch.rand(count, generator=draw),
        {n: torch.rand(count, generator=draw) for n in ("fidelity", "purity")},
        group=torch.arange(count) // (count // groups),
        features=torch.randn(count, 6, generator=draw),
    )


def gardo(base=None, **parts):
    return Gardo(GardoSettings(base=base or FlowGRPOSettings(beta=0.04), **parts), WORLD)


# ---- uncertainty and the choice of samples ----------------------------------------------------


def test_uncertainty_by_hand():
    proxy = [0.9, 0.5, 0.5, 0.1]  # win rates 3/4, 1/4, 1/4, 0: a tie wins against nobody
    auxiliaries = {"a": [1, 1, 0, 0], "b": [0, 1, 2, 3]}  # 1/2, 1/2, 0, 0 and 0, 1/4, 1/2, 3/4
    result = uncertainty(scores_of(proxy, auxiliaries), "batch")
    assert result.tolist() == [0.5, -0.125, 0.0, -0.375]
    grouped = uncertainty(scores_of(proxy, auxiliaries, group=[8, 8, 2, 2]), "group")
    assert grouped.tolist() == [0.5, -0.25, 0.5, -0.25]


def test_failed_scores_are_in_nobodys_population():
    nan = float("nan")
    whole = scores_of([0.9, 0.5, 0.0, 0.1], {"a": [1, 2, nan, 3]}, valid=[True, True, False, True])
    kept = scores_of([0.9, 0.5, 0.1], {"a": [1, 2, 3]})
    result = uncertainty(whole, "batch")
    assert torch.equal(result[whole.valid_B], uncertainty(kept, "batch"))
    assert uncertainty(kept, "batch").tolist() == pytest.approx([2 / 3, 0, -2 / 3], abs=1e-6)
    gate_B, statistic = Gate(GateSettings(fraction=1.0, limits=(0.0, 1.0))).select(whole)
    assert gate_B.tolist() == [True, True, False, True]
    assert statistic == pytest.approx(2 / 9, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=25),
    st.sampled_from([0.0, 0.02, 0.1, 0.2, 0.37, 1.0]),
    st.randoms(use_true_random=False),
)
def test_choice_is_the_exact_count_of_the_most_uncertain(drawn, fraction, random):
    level, valid = zip(*drawn, strict=True)
    sample = random.sample(range(100), len(drawn))
    gate_B = most_uncertain(
        torch.tensor(level, dtype=torch.float64) / 4,
        torch.tensor(valid),
        torch.tensor(sample),
        fraction,
    )
    ranking = sorted((-u, s) for u, v, s in zip(level, valid, sample, strict=True) if v)
    count = int(fraction * len(ranking) + 0.5)
    expected = {s for _, s in ranking[:count]}
    assert {s for s, g in zip(sample, gate_B.tolist(), strict=True) if g} == expected


def test_many_exact_ties_go_by_sample_id():
    sample = torch.randperm(50, generator=generator(3))
    equal = scores_of(torch.ones(50), {"a": torch.ones(50)}, sample=sample)
    gate_B, statistic = Gate(GateSettings(fraction=0.1)).select(equal)
    assert sorted(sample[gate_B].tolist()) == [0, 1, 2, 3, 4]
    assert statistic == 0


def test_ties_that_only_rounding_could_break_stay_ties():
    # Win rates .1 and .2 of sample 1, .3 and 0 of sample 3: the same mean, but not in binary.
    auxiliaries = {"a": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], "b": [3, 2, 1, 0, 4, 5, 6, 7, 8, 9]}
    result = uncertainty(scores_of(torch.ones(10), auxiliaries), "batch")
    assert result[1] == result[3] == pytest.approx(-0.15)


def official_uncertainty(scores):
    """The release: rank 1 is the best, U = rank(proxy) - mean rank(auxiliaries)."""

    def rank(values):
        return 1 + values.argsort(descending=True).argsort().double()

    others = torch.stack([rank(scores.rewards[n]) for n in scores.auxiliaries]).mean(0)
    return rank(scores.proxy_B) - others


def test_the_release_gates_the_other_end():
    scores = random_scores()
    ours, theirs = uncertainty(scores, "batch"), official_uncertainty(scores)
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] == pytest.approx(-1, abs=1e-5)
    paper, _ = Gate(GateSettings(fraction=0.1)).select(scores)
    official, _ = Gate(GateSettings(fraction=0.1, sign="official_code")).select(scores)
    assert paper.sum() == official.sum() == 6
    assert not (paper & official).any()
    assert ours[paper].min() >= ours[~paper].max()
    assert theirs[official].min() >= theirs[~official].max()


@pytest.mark.parametrize("population", ["batch", "group"])
def test_the_order_of_the_gathered_batch_does_not_matter(population):
    scores = random_scores(seed=4)
    tied = (scores.rewards["fidelity"] * 4).round()  # many ties
    scores = scores_of((scores.proxy_B * 4).round(), {"a": tied}, group=scores.group_B)
    order = torch.randperm(60, generator=generator(5))
    shuffled = scores_of(
        scores.proxy_B[order], {"a": tied[order]}, group=scores.group_B[order], sample=order
    )
    chosen = []
    for one in (scores, shuffled):
        credit = gardo(gate=GateSettings(fraction=0.15, population=population)).credit(one)
        chosen.append(set(one.sample_B[credit.gate_B].tolist()))
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 9


# ---- the fraction follows the statistic -------------------------------------------------------


def uncertain(k, count=100):
    """Scores whose mean positive uncertainty is k (count - k) / count^2: k win rates up for all."""
    ascending = torch.arange(float(count))
    return scores_of(ascending.roll(-k), {"a": ascending})


def fractions(gate, levels):
    seen = []
    for k in levels:
        gate_B, statistic = gate.select(uncertain(k))
        assert statistic == pytest.approx(k * (100 - k) / 1e4, abs=1e-6)
        assert int(gate_B.sum()) == int(gate.fraction * 100 + 0.5), "the new fraction gates"
        seen.append(gate.fraction)
    return seen


def test_fraction_follows_the_window():
    gate = Gate(GateSettings(fraction=0.1, warmup=3, window=2))
    assert fractions(gate, [5, 2, 8]) == [0.1] * 3  # warm-up
    up = 0.1 * 1.1
    assert fractions(gate, [9]) == [pytest.approx(up)]  # above 2 and 8
    assert fractions(gate, [5]) == [pytest.approx(up * 0.9)]  # below 8 and 9
    assert fractions(gate, [7]) == [pytest.approx(up * 0.9)]  # between 9 and 5
    assert fractions(gate, [8]) == [pytest.approx(up * 0.9 * 1.1)]  # above 5 and 7; 9 has left
    assert fractions(gate, [8, 8]) == [pytest.approx(up * 0.9 * 1.1)] * 2  # equal is not above


def test_fraction_is_clamped():
    gate = Gate(GateSettings(fraction=0.1, warmup=1, window=3, limits=(0.07, 0.2)))
    climb = fractions(gate, range(1, 14))
    assert climb[1] == pytest.approx(0.11) and climb == sorted(climb)
    assert climb[-1] == climb[-3] == 0.2
    descent = fractions(gate, range(11, 0, -1)) + fractions(gate, [0])
    assert descent == sorted(descent, reverse=True)
    assert descent[-1] == 0.07 < descent[-3]


def test_limits_must_be_ordered():
    for limits in ((0.2, 0.1), (-0.1, 0.2), (0.5, 1.1)):
        with pytest.raises(ValueError, match="low <= high"):
            GateSettings(limits=limits)
    assert GateSettings(limits=[0.0, 1.0]).limits == (0.0, 1.0)


def test_gate_state_continues_identically():
    parts = GateSettings(warmup=2, window=3)
    gate = Gate(parts)
    fractions(gate, [3, 5, 7, 9])
    restored = Gate(parts)
    restored.load_state_dict(json.loads(json.dumps(gate.state_dict())))
    levels = [11, 8, 9, 2, 1, 12]
    assert fractions(restored, levels) == fractions(gate, levels)
    assert fractions(Gate(parts), levels) != fractions(restored, levels), "state decides nothing"


# ---- diversity --------------------------------------------------------------------------------

# Group 0 at 0, 60 and 180 degrees: nearest 1/2, 1/2, 3/2. Group 1 twice one image. Group 2 alone.
DEGREES = torch.tensor([0.0, 60, 180, 45, 45, 10])
FEATURES = torch.stack([DEGREES.deg2rad().cos(), DEGREES.deg2rad().sin()], 1)
THREE_GROUPS = torch.tensor([0, 0, 0, 1, 1, 2])


@pytest.mark.parametrize(
    ("normalise", "expected"),
    [("group_mean", [0.24, 0.12, -0.6, 0.5, -0.5, 0]), ("raw", [0.2, 0.1, -0.6, 0, -0.5, 0])],
)
def test_diversity_scales_positive_advantages(normalise, expected):
    scores = scores_of([1, 0.8, 0, 1, 0, 3], group=THREE_GROUPS, features=FEATURES * 7)
    base = FlowGRPOSettings(advantage=AdvantageSettings(std="none"))
    credit = gardo(base, diversity=DiversitySettings(normalise=normalise)).credit(scores)
    assert credit.advantage_B.tolist() == pytest.approx(expected, abs=1e-6)
    assert credit.info["nearest"] == pytest.approx(2.5 / 6, abs=1e-6)
    # Mean pairwise distances 4/3, 0 and 0, times 100, over the images.
    assert credit.info["diversity"] == pytest.approx(100 * (3 * 4 / 3) / 6, abs=1e-4)


def test_euclidean_distances_by_hand():
    points = torch.tensor([[0.0, 0], [3, 4], [-8, 15], [1, 1], [1, 1], [7, 7]])
    nearest, mean = nearest_euclidean(points, THREE_GROUPS)
    apart = (5 + 17 + 242**0.5) / 3  # (0, 0), (3, 4) and (-8, 15): 5, 17 and sqrt(11^2 + 11^2)
    assert nearest.tolist() == pytest.approx([5, 5, 242**0.5, 0, 0, 0])
    assert mean.tolist() == pytest.approx([apart, apart, apart, 0, 0, 0])
    order = torch.tensor([4, 0, 5, 2, 3, 1])  # groups may lie anywhere in the batch
    shuffled = nearest_euclidean(points[order], THREE_GROUPS[order])
    assert torch.equal(shuffled[0], nearest[order]) and torch.equal(shuffled[1], mean[order])


def test_the_metric_is_the_settings():
    features = torch.tensor([[1.0, 0], [3, 0], [0, 1]])  # two of one direction, but 2 apart
    base = FlowGRPOSettings(advantage=AdvantageSettings(std="none"))
    scores = scores_of([1, 1, -2], features=features)
    raw = {
        metric: gardo(base, diversity=DiversitySettings(metric=metric, normalise="raw"))
        .credit(scores)
        .advantage_B.tolist()
        for metric in ("cosine", "euclidean")
    }
    assert raw["cosine"] == pytest.approx([0, 0, -2], abs=1e-6)
    assert raw["euclidean"] == pytest.approx([2**0.5, 2, -2])


def test_diversity_factor_by_hand():
    nearest = torch.tensor([0.5, 0.5, 1.5, 0.0, 0.0, 0.0])
    advantage = torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0, 1.0])
    valid = torch.ones(6, dtype=torch.bool)
    factor = diversity_factor(nearest, advantage, valid, THREE_GROUPS, "group_mean")
    assert factor.tolist() == pytest.approx([0.6, 1, 1.8, 1, 1, 1])
    raw = diversity_factor(nearest, advantage, valid, THREE_GROUPS, "raw")
    assert raw.tolist() == [0.5, 1, 1.5, 0, 0, 0]
    valid[2] = False  # out of the group's mean: 1/2
    factor = diversity_factor(nearest, advantage, valid, THREE_GROUPS, "group_mean")
    assert factor[:2].tolist() == [1, 1]


# ---- what is left out does nothing ------------------------------------------------------------


@pytest.mark.parametrize(
    "base", [FlowGRPOSettings(beta=0.04), DiffusionNFTSettings(beta=0.04)], ids=lambda s: s.name
)
@pytest.mark.parametrize(
    ("parts", "same"),
    [
        ({}, {"advantage", "gate"}),
        ({"reference": ReferenceSettings(reset_updates=1)}, {"advantage", "gate"}),
        ({"gate": GateSettings()}, {"advantage"}),
        ({"diversity": DiversitySettings()}, {"gate"}),
    ],
    ids=lambda value: "-".join(sorted(value)) or "nothing",
)
def test_each_mechanism_touches_its_own_field(base, parts, same):
    scores = random_scores()
    wrapper = gardo(base, **parts)
    plain, credit = wrapper.base.credit(scores), wrapper.credit(scores)
    assert plain.gate_B.all() and plain.advantage_B.any()
    assert torch.equal(plain.advantage_B, credit.advantage_B) == ("advantage" in same)
    assert torch.equal(plain.gate_B, credit.gate_B) == ("gate" in same)
    if len(same) == 2:
        assert credit.info == plain.info


@pytest.mark.parametrize("part", ["gate", "reference"])
def test_a_base_without_kl_cannot_be_gated_or_reset(part):
    parts = {part: {"gate": GateSettings(), "reference": ReferenceSettings()}[part]}
    for base in (FlowGRPOSettings(beta=0.0), DiffusionNFTSettings(beta=0.0), ReFLSettings()):
        with pytest.raises(ValueError, match=f"algorithm.base.beta: {base.name} has no KL"):
            Gardo.check(GardoSettings(base=base, **parts), SAMPLER)
    Gardo.check(GardoSettings(base=FlowGRPOSettings(beta=0.01), **parts), SAMPLER)


def test_diversity_needs_advantages():
    diverse = {"diversity": DiversitySettings()}
    with pytest.raises(ValueError, match=r"algorithm\.diversity: refl has no"):
        Gardo.check(GardoSettings(base=ReFLSettings(), **diverse), SAMPLER)
    Gardo.check(GardoSettings(base=DiffusionNFTSettings(), **diverse), SAMPLER)


# ---- the reference ----------------------------------------------------------------------------


def test_when_a_reset_is_due():
    by_kl = Reference(ReferenceSettings(reset_kl=1e-4))
    assert by_kl.why_due(1.1e-4) == "kl 1.10e-04 > 1.00e-04"
    assert by_kl.why_due(1e-4) is None
    assert by_kl.why_due(float("nan")) is None
    by_kl.updates = 10**6
    assert by_kl.why_due(0.0) is None
    by_updates = Reference(ReferenceSettings(reset_updates=3))
    for updates, reason in ((2, None), (3, "3 updates"), (4, "4 updates")):
        by_updates.updates = updates
        assert by_updates.why_due(float("nan")) == by_updates.why_due(1e9) == reason
    neither = Reference(ReferenceSettings())
    neither.updates = 10**6
    assert neither.why_due(1e9) is None


class Trainer:
    """A wrapper with real slots, over a single linear layer."""

    def __init__(self, algorithm):
        self.algorithm = algorithm
        self.model = nn.Linear(3, 2)
        self.engine = LocalEngine(
            dict(self.model.named_parameters()),
            optimizer=OptimizerSettings(),
            accumulation=1,
            max_grad_norm=1.0,
            device=torch.device("cpu"),
        )
        self.engine.make_slots(algorithm.slots)

    def iteration(self, kl=(), updates=2):
        """Two gradient steps' worth of change, then the end of an iteration with these KLs."""
        for _ in range(updates):
            with torch.no_grad():
                self.model.weight += 1
            self.algorithm.after_update(self.engine.slots)
        metrics = Metrics().mean("kl", torch.tensor(kl))
        return self.algorithm.after_step(self.engine.slots, metrics)

    def reference_is_live(self):
        return torch.equal(self.engine.slots.pieces("reference")[0], self.model.weight.flatten())


def wanted(algorithm):
    sample_R = torch.tensor([0, 0, 1, 1, 2, 2])
    points = Points(
        sample_R=sample_R,
        prompt_R=torch.zeros_like(sample_R),
        step_R=torch.zeros_like(sample_R),
        sigma_R=torch.ones(6),
        x_RX=torch.zeros(6, 2),
    )
    gate_B = torch.tensor([True, False, True])
    credit = Credit(advantage_B=torch.zeros(3), gate_B=gate_B)
    return {name: rows.tolist() for name, rows in algorithm.teachers(points, credit).items()}


GATED = [True, True, False, False, True, True]


def test_after_a_reset_the_rollout_is_the_reference():
    algorithm = gardo(reference=ReferenceSettings(reset_updates=4), gate=GateSettings())
    run = Trainer(algorithm)
    assert algorithm.slots == ("reference",)
    assert wanted(algorithm) == {}, "at the start the reference samples"
    assert run.iteration() == []
    assert wanted(algorithm) == {"reference": GATED}
    assert not run.reference_is_live()
    assert run.iteration() == ["reference reset (4 updates)"]
    assert run.reference_is_live()
    assert wanted(algorithm) == {}
    assert run.iteration() == []
    assert wanted(algorithm) == {"reference": GATED}
    assert not run.reference_is_live()
    assert run.iteration() == ["reference reset (4 updates)"], "the count starts again"


def test_reset_by_the_kl_of_gated_rows():
    algorithm = gardo(reference=ReferenceSettings(reset_kl=1e-4))
    run = Trainer(algorithm)
    assert run.iteration(kl=[]) == []  # nothing was gated
    assert run.iteration(kl=[1e-5, 1e-4]) == []
    assert not run.reference_is_live()
    (event,) = run.iteration(kl=[1e-3])
    assert event == "reference reset (kl 1.00e-03 > 1.00e-04)"
    assert run.reference_is_live()


@pytest.mark.parametrize(("statistic", "due"), [("gated", True), ("loss", False)])
def test_the_kl_that_resets_is_the_gated_rows_or_the_losss(statistic, due):
    """Of four gated rows' KL 4e-4 the loss, which has it in a quarter of its rows, sees 1e-4."""
    algorithm = gardo(reference=ReferenceSettings(reset_kl=3e-4, statistic=statistic))
    run = Trainer(algorithm)
    metrics = Metrics().mean("kl", torch.full((4,), 4e-4))
    metrics.mean("kl_loss", torch.tensor([4e-4, 0, 0, 0] * 4))
    assert bool(algorithm.after_step(run.engine.slots, metrics)) == due


def test_without_a_schedule_the_reference_stays():
    algorithm = gardo(gate=GateSettings())
    run = Trainer(algorithm)
    start = run.engine.slots.pieces("reference")[0].clone()
    assert [run.iteration(kl=[1e9]) for _ in range(3)] == [[], [], []]
    assert torch.equal(run.engine.slots.pieces("reference")[0], start)
    assert wanted(algorithm) == {"reference": GATED}


def test_nft_samples_from_old_so_it_always_asks():
    algorithm = gardo(DiffusionNFTSettings(beta=0.04), reference=ReferenceSettings(reset_updates=2))
    run = Trainer(algorithm)
    assert set(algorithm.slots) == {"old", "reference"}
    for _ in range(2):
        assert wanted(algorithm) == {"old": [True] * 6, "reference": GATED}
        assert run.iteration() == ["reference reset (2 updates)"]
        assert run.reference_is_live()
    assert wanted(algorithm) == {"old": [True] * 6, "reference": GATED}
    assert not torch.equal(run.engine.slots.pieces("old")[0], run.model.weight.flatten())


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_state_continues_identically(iterations):
    def fresh():
        return gardo(
            gate=GateSettings(warmup=1, window=2), reference=ReferenceSettings(reset_updates=4)
        )

    first = fresh()
    run = Trainer(first)
    for k in range(iterations):
        first.credit(uncertain(5 + k))
        run.iteration()
    second = fresh()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    other = Trainer(second)
    for k in (9, 2, 12):
        assert wanted(first) == wanted(second)
        one, two = first.credit(uncertain(k)), second.credit(uncertain(k))
        assert one.info == two.info and torch.equal(one.gate_B, two.gate_B)
        assert run.iteration() == other.iteration()


def test_state_of_a_wrapper_without_parts():
    algorithm = gardo(DiffusionNFTSettings())
    Trainer(algorithm).iteration()
    restored = gardo(DiffusionNFTSettings())
    restored.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    assert restored.state_dict() == algorithm.state_dict()
    assert restored.base.updates == 2
