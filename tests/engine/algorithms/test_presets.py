"""GARDO's presets, and what the release does that the paper does not."""

import pytest
import torch

from gardo.algorithms.advantage import AdvantageSettings
from gardo.algorithms.awm import AWM, AWMSettings
from gardo.algorithms.base import SamplerSettings, World
from gardo.algorithms.diffusion_nft import DiffusionNFT, DiffusionNFTSettings
from gardo.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from gardo.algorithms.gardo import (
    Gardo,
    GardoSettings,
    Gate,
    GateSettings,
    Reference,
    ReferenceSettings,
)
from gardo.algorithms.gardo_presets import PRESETS, filled
from gardo.algorithms.uncertainty import uncertainty
from gardo.config import load
from gardo.flow import sd3_sigmas
from gardo.recipe_errors import RecipeError
from gardo.types import Scores
from tests import ROOT
from tests.engine.algorithms.judged import credit_of

BASES = {"flow_grpo": (FlowGRPO, FlowGRPOSettings), "awm": (AWM, AWMSettings),
         "diffusion_nft": (DiffusionNFT, DiffusionNFTSettings)}  # fmt: skip
SAMPLER = SamplerSettings(steps=14, train_steps=6)


def built(section):
    """The wrapper of a recipe's section."""
    settings = GardoSettings(**section)
    Gardo.check(settings, SAMPLER)
    world = World(sampler=SAMPLER, sigmas=sd3_sigmas(14), seed=1)
    return Gardo(settings, world)


def preset(name, base="flow_grpo", **section):
    return built({"name": "gardo", "preset": name, "base": {"name": base, "beta": 0.02}, **section})


def random_scores(count=200, seed=0, levels=None):
    draw = torch.Generator().manual_seed(seed)
    proxy, a, b = torch.rand(3, count, generator=draw)
    if levels:
        proxy, a, b = ((v * levels).round() for v in (proxy, a, b))
    return Scores(
        sample_B=torch.arange(count), group_B=torch.arange(count) // 10, proxy_B=proxy,
        valid_B=torch.ones(count, dtype=torch.bool), rewards={"a": a, "b": b},
        auxiliaries=("a", "b"), features_BD=torch.randn(count, 4, generator=draw),
    )  # fmt: skip


# ---- filling ----------------------------------------------------------------------------------


def test_paper_fills_what_is_left_out():
    settings = preset("paper").settings
    assert settings.gate == GateSettings(
        fraction=0.1, limits=(0.0, 1.0), warmup=20, sign="paper", base="valid", ties="equal"
    )
    assert settings.diversity.normalise == "raw"
    assert settings.reference == ReferenceSettings(
        reset_kl=1e-4, statistic="gated", reset_updates=100
    )
    assert settings.base.advantage == AdvantageSettings(std="none")
    assert settings.base.kl_reduction == "batch" and settings.base.beta == 0.02


def test_official_code_fills_what_is_left_out():
    settings = preset("official_code").settings
    assert settings.gate == GateSettings(
        fraction=0.1, limits=(0.02, 0.2), warmup=1, sign="official_code", base="nonnegative",
        ties="ordered", zero_advantage=False,
    )  # fmt: skip
    assert settings.diversity.normalise == "group_mean"
    assert settings.reference == ReferenceSettings(
        reset_kl=3e-4, statistic="loss", reset_iterations=16
    )
    assert (settings.base.kl_reduction, settings.base.clip_range) == ("released", 1e-4)
    nft = preset("official_code", "diffusion_nft").settings
    assert nft.reference == ReferenceSettings(reset_kl=0.15, statistic="loss", reset_iterations=16)
    assert nft.base.kl_reduction == "released"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "base", ["flow_grpo", "diffusion_nft", "awm", "mix_grpo", "flow_grpo_fast", "dance_grpo",
             "grpo_guard", "ddpo"],
)  # fmt: skip
def test_the_statistic_is_of_the_kl_that_the_base_has(name, base):
    """The loss's KL only where the preset weighs it as the release does, for its threshold."""
    settings = GardoSettings(preset=name, base={"name": base, "beta": 0.5})
    if settings.reference.statistic == "loss":
        assert settings.base.kl_reduction == "released"
    released = name == "official_code" and base in ("flow_grpo", "diffusion_nft")
    assert (settings.reference.statistic == "loss") == released


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("base", BASES)
def test_what_is_given_wins(name, base):
    given = {"name": "gardo", "preset": name,
             "base": {"name": base, "beta": 0.5, "kl_reduction": "batch",
                      "advantage": {"std": "group"}},
             "gate": {"fraction": 0.15, "warmup": 7}, "diversity": None,
             "reference": {"reset_kl": 0.7}}  # fmt: skip
    settings = built(given).settings
    assert (settings.gate.fraction, settings.gate.warmup) == (0.15, 7)
    assert settings.gate.sign == name, "its other fields are still the preset's"
    assert settings.diversity is None
    assert settings.reference.reset_kl == 0.7
    assert settings.base.kl_reduction == "batch" and settings.base.beta == 0.5
    assert settings.base.advantage.std == "group"


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("base", BASES)
def test_settings_are_filled_as_mappings_are(name, base):
    """What was given to settings wins, also where it is their default; the rest is the preset's."""
    settings_of = BASES[base][1]
    given = {"beta": settings_of().beta, "advantage": {"scale": 6.0}}
    expected = GardoSettings(preset=name, base={"name": base, **given}, gate={"fraction": 0.15})
    advantage = AdvantageSettings(scale=6.0)
    settings = GardoSettings(
        preset=name,
        base=settings_of(beta=given["beta"], advantage=advantage),
        gate=GateSettings(fraction=0.15),
    )
    assert settings == expected
    assert type(settings.base) is type(expected.base) is settings_of
    assert settings.base.beta == settings_of().beta
    assert settings.base.kl_reduction == PRESETS[name][base]["base"]["kl_reduction"]
    assert settings.base.advantage == AdvantageSettings(std="none", scale=6.0)
    assert settings.gate.sign == name and settings.gate.fraction == 0.15


def test_settings_of_a_class_of_ones_own_keep_their_class():
    class Own(FlowGRPOSettings):
        more: int = 1

    base = GardoSettings(preset="official_code", base=Own(more=2)).base
    assert type(base) is Own and base.more == 2 and base.kl_reduction == "released"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"name": "flow_grpo", "clip_rage": 1e-4}, "clip_rage"),
        ({"name": "flow_grpo", "beta": "0.1"}, "beta"),
        ({"name": "grpo"}, "'grpo' is none of"),
        ({"beta": 0.1}, "a mapping with its name"),
        (3, "a mapping with its name"),
    ],
)
@pytest.mark.parametrize("preset", [None, "paper"])
def test_a_base_is_checked(preset, base, message):
    with pytest.raises(ValueError, match=message):
        GardoSettings(preset=preset, base=base)


def test_a_recipe_is_filled_and_checked():
    path = ROOT / "recipes/tiny_flux_gardo.yaml"
    released = [
        "algorithm.preset=official_code", "algorithm.gate=", "algorithm.gate.fraction=0.12",
        "algorithm.reference=null", "algorithm.base.clip_range=0.002",
    ]  # fmt: skip
    algorithm = load(path, released).algorithm
    assert algorithm.gate.sign == "official_code" and algorithm.gate.fraction == 0.12
    assert algorithm.reference is None and algorithm.base.clip_range == 0.002
    assert algorithm.base.kl_reduction == "released" and algorithm.base.kl == "gaussian"
    with pytest.raises(RecipeError, match=r"--set algorithm\.preset: 'papier'"):
        load(path, ["algorithm.preset=papier"])
    with pytest.raises(RecipeError, match=r"algorithm\.gate: needs rewards with role auxiliary"):
        load(path, ["algorithm.preset=paper", "rewards.tiny_shape.role=held_out",
                    "rewards.tiny_purity.role=held_out"])  # fmt: skip


def test_no_preset_changes_nothing():
    section = {"name": "gardo", "base": {"name": "flow_grpo", "beta": 0.5}}
    assert filled(section) == section
    settings = GardoSettings(base=FlowGRPOSettings())
    assert settings.gate is settings.diversity is settings.reference is None
    with pytest.raises(ValueError, match="'paper' or 'official_code'"):
        GardoSettings(base=FlowGRPOSettings(), preset="mine")


# ---- what the release does --------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_two_signs_gate_disjoint_samples(seed):
    scores = random_scores(seed=seed)
    gates = {
        sign: Gate(GateSettings(fraction=0.2, sign=sign)).select(scores)[0]
        for sign in ("paper", "official_code")
    }
    assert int(gates["paper"].sum()) == int(gates["official_code"].sum()) == 40
    assert not (gates["paper"] & gates["official_code"]).any()
    presets = [credit_of(preset(name), scores).gate_B for name in PRESETS]
    assert presets[0].any() and presets[1].any() and not (presets[0] & presets[1]).any()


def test_the_release_takes_its_fraction_of_half_the_samples():
    scores = random_scores()
    settings = GateSettings(sign="official_code", base="nonnegative")
    theirs = -uncertainty(scores, "batch")
    half = int((theirs >= 0).sum())
    assert 80 < half < 120
    gate_B, _ = Gate(settings).select(scores)
    assert int(gate_B.sum()) == round(0.1 * half), "about 5 % of the samples"
    # The release: strictly above the 90th percentile of the non-negative ones. On n values the
    # quantile lies between two of them, floor(.9 (n - 1)) from below: ceil(.1 (n - 1)) are above.
    above = theirs > theirs[theirs >= 0].quantile(0.9)
    assert abs(int(above.sum()) - int(gate_B.sum())) <= 1
    assert theirs[gate_B].min() >= theirs[~gate_B].max()


def test_ordered_ties_are_the_releases_ranks():
    scores = random_scores(levels=3)  # four values: most are tied

    def rank(values):  # 1 is the best, equal ones in the order of the batch
        order = values.argsort(descending=True, stable=True)
        return order.argsort().double() + 1

    auxiliary = (rank(scores.rewards["a"]) + rank(scores.rewards["b"])) / 2
    official = rank(scores.proxy_B) - auxiliary
    ours = uncertainty(scores, "batch", "ordered")
    # U in win rates is that in ranks over the number of samples, with the other sign, to 1e-6
    torch.testing.assert_close(-200 * ours, official, rtol=0, atol=2e-4)
    assert not torch.equal(ours, uncertainty(scores, "batch", "equal"))
    free = random_scores()
    assert torch.equal(uncertainty(free, "batch", "ordered"), uncertainty(free, "batch", "equal"))


def test_ordered_ties_do_not_depend_on_the_order_of_the_batch():
    scores = random_scores(levels=3)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    shuffled = Scores(
        sample_B=order, group_B=scores.group_B[order], proxy_B=scores.proxy_B[order],
        valid_B=scores.valid_B, rewards={n: v[order] for n, v in scores.rewards.items()},
        auxiliaries=scores.auxiliaries,
    )  # fmt: skip
    mixed = uncertainty(shuffled, "batch", "ordered")
    assert torch.equal(mixed, uncertainty(scores, "batch", "ordered")[order])


def test_samples_without_advantage_may_be_left_ungated():
    scores = random_scores()
    rewards = scores.proxy_B.clone()
    rewards[:10] = 2.0  # a whole group that the proxy ranks highest, all alike
    scores = Scores(**{**scores.__dict__, "proxy_B": rewards})
    base = {"name": "flow_grpo", "beta": 0.1}
    gates = {}
    for keep in (True, False):
        gate = {"fraction": 0.2, "zero_advantage": keep}
        gates[keep] = built({"base": base, "gate": gate}).credit(scores).gate_B
    assert gates[True][:10].any()
    assert not gates[False][:10].any()
    assert torch.equal(gates[True][10:], gates[False][10:])


def test_the_release_compares_from_the_second_iteration():
    gate = Gate(preset("official_code").settings.gate)
    statistics = []
    for seed in range(4):
        _, statistic = gate.select(random_scores(seed=seed))
        expected = 0.1 if seed == 0 else expected  # noqa: F821  of the iteration before
        if statistics and statistic > max(statistics):
            expected *= 1.1
        elif statistics and statistic < min(statistics):
            expected *= 0.9
        statistics.append(statistic)
        assert gate.fraction == pytest.approx(expected)
    assert gate.fraction != 0.1


def test_the_fraction_moves_as_the_releases():
    """Over 100 iterations; the release averages what it calls uncertainty over its values >= 0."""
    gate = Gate(preset("official_code").settings.gate)
    usual = Gate(gate.settings.model_copy(update={"base": "valid"}))
    fraction, window, apart = 0.1, [], 0
    for seed in range(100):
        scores = random_scores(seed=seed)
        theirs = -uncertainty(scores, "batch", "ordered")
        statistic = float(theirs[theirs >= 0].mean())
        if window and statistic > max(window):
            fraction = min(fraction * 1.1, 0.2)
        elif window and statistic < min(window):
            fraction = max(fraction * 0.9, 0.02)
        window = [*window, statistic][-gate.settings.window :]
        gate.select(scores)
        usual.select(scores)
        assert gate.fraction == pytest.approx(fraction)
        apart += usual.fraction != pytest.approx(fraction)
    assert apart > 10, "the mean over all samples moves it otherwise"


def test_reset_after_iterations():
    reference = Reference(ReferenceSettings(reset_iterations=16))
    reference.iterations, reference.updates = 15, 10**6
    assert reference.why_due(1e9) is None
    reference.iterations = 16
    assert reference.why_due(float("nan")) == "16 iterations"
    again = Reference(ReferenceSettings(reset_iterations=16))
    again.load_state_dict(reference.state_dict())
    assert (again.iterations, again.updates) == (16, 10**6)
