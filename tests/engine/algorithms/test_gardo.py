"""GARDO around real base algorithms: what each mechanism touches, diversity, resets, state."""

import json

import pytest
import torch
from torch import nn

from gardo.algorithms.advantage import AdvantageSettings
from gardo.algorithms.diffusion_nft import DiffusionNFTSettings
from gardo.algorithms.flow_grpo import FlowGRPOSettings
from gardo.algorithms.gardo import (
    DiversitySettings,
    Gardo,
    GardoSettings,
    GateSettings,
    Reference,
    ReferenceSettings,
)
from gardo.algorithms.gardo_diversity import diversity_factor, nearest_euclidean
from gardo.algorithms.refl import ReFLSettings
from gardo.distributed.local import LocalEngine
from gardo.distributed.optimizers import OptimizerSettings
from gardo.types import Credit, Metrics, Points
from tests.engine.algorithms.judged import (
    SAMPLER,
    credit_of,
    gardo,
    random_scores,
    scores_of,
    uncertain,
)

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
    credit = credit_of(gardo(base, diversity=DiversitySettings(normalise=normalise)), scores)
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
    by = {m: DiversitySettings(metric=m, normalise="raw") for m in ("cosine", "euclidean")}
    raw = {
        metric: credit_of(gardo(base, diversity=settings), scores).advantage_B.tolist()
        for metric, settings in by.items()
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
    plain, credit = wrapper.base.credit(scores), credit_of(wrapper, scores)
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
