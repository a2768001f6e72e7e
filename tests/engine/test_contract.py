"""What is done when training numerics disagree with sampling's; nothing slips through."""

import itertools
import math
import warnings

import pytest
import torch

from gardo.contract import CAUSES, NoRatio, RatioContract, RatioContractBroken
from gardo.types import Metrics, Points

CLIP = 1e-4
ROWS = torch.zeros(2, dtype=torch.int64)
POINTS = Points(
    sample_R=ROWS, prompt_R=ROWS, step_R=ROWS, sigma_R=torch.ones(2), x_RX=torch.ones(2, 3)
)


class Run:
    """Probes answer with the given errors, one after the other; what was asked is kept."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.asked = []

    def probe(self, points):
        self.asked.append(("probe", "train" in points.velocities))
        return self.errors.pop(0)

    def recompute(self, points):
        self.asked.append(("recompute", "train" in points.velocities))
        return points.with_velocity("train", torch.zeros(2, 3))

    def hold(self, contract):
        return contract.hold(POINTS, self.probe, self.recompute)


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("mode", ["rollout", "auto"])
@pytest.mark.parametrize("error", [0.0, 0.5 * CLIP])
def test_agreement_changes_nothing(quiet, mode, error):
    run, contract = Run(error), RatioContract(mode, CLIP)
    assert run.hold(contract) is POINTS
    assert run.asked == [("probe", False)]
    assert (contract.error, contract.event) == (error, None)


def test_rollout_warns_and_names_the_causes():
    run, contract = Run(0.51 * CLIP), RatioContract("rollout", CLIP)
    with pytest.warns(UserWarning, match=r"5\.10e-05.*likely causes") as caught:
        assert run.hold(contract) is POINTS
    assert CAUSES in str(caught[0].message)
    assert run.asked == [("probe", False)]
    assert contract.error == 0.51 * CLIP
    assert "5.10e-05" in contract.event


@pytest.mark.parametrize("again", [0.0, 0.9 * CLIP, CLIP])
def test_auto_recomputes_and_passes(quiet, again):
    run, contract = Run(0.7 * CLIP, again), RatioContract("auto", CLIP)
    points = run.hold(contract)
    assert "train" in points.velocities
    assert run.asked == [("probe", False), ("recompute", False), ("probe", True)]
    assert contract.error == again
    assert contract.event.startswith("old velocities recomputed") and "7.00e-05" in contract.event


def test_auto_stops_past_the_clip_range_after_a_recompute():
    run, contract = Run(3 * CLIP, 1.01 * CLIP), RatioContract("auto", CLIP)
    with pytest.raises(RatioContractBroken, match=r"1\.01e-04.*clip range 1e-04.*clip_range"):
        run.hold(contract)
    assert run.asked == [("probe", False), ("recompute", False), ("probe", True)]
    assert contract.error == 1.01 * CLIP


@pytest.mark.parametrize("error", [0.0, 0.9 * CLIP])
def test_recompute_mode_recomputes_first_and_once(quiet, error):
    run, contract = Run(error), RatioContract("recompute", CLIP)
    assert "train" in run.hold(contract).velocities
    assert run.asked == [("recompute", False), ("probe", True)]
    assert contract.error == error


def test_recompute_mode_stops_past_the_clip_range():
    run = Run(1.01 * CLIP)
    with pytest.raises(RatioContractBroken):
        run.hold(RatioContract("recompute", CLIP))
    assert run.asked == [("recompute", False), ("probe", True)]


def test_share_is_the_limit(quiet):
    run = Run(0.7 * CLIP)
    assert run.hold(RatioContract("auto", CLIP, share=0.8)) is POINTS
    assert run.asked == [("probe", False)]


def test_an_event_is_of_its_own_iteration(quiet):
    contract = RatioContract("auto", CLIP)
    Run(0.7 * CLIP, 0.0).hold(contract)
    assert contract.event
    Run(0.0).hold(contract)
    assert contract.event is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_number_is_broken(broken):
    for mode, errors in (("auto", (broken, broken)), ("recompute", (broken,))):
        contract = RatioContract(mode, CLIP)
        with pytest.raises(RatioContractBroken):
            Run(*errors).hold(contract)
    contract = RatioContract("rollout", CLIP)
    with pytest.warns(UserWarning, match="nan|inf"):
        Run(broken).hold(contract)
    assert contract.event


def test_nan_survives_the_way_to_the_contract():
    """The probe's maximum over rows, micro-batches and ranks must not lose a NaN."""
    rows = [torch.tensor([1e-6, math.nan, 0.0]), torch.tensor([2e-6])]
    assert not Metrics().maximum("error", rows[0])["error"] <= 1.0
    for order in itertools.permutations(rows):
        by_batch, by_rank = Metrics(), Metrics()
        for values in order:
            by_batch.maximum("error", values)
            by_rank.add(Metrics().maximum("error", values))
        assert not by_batch["error"] <= 1.0
        assert not by_rank["error"] <= 1.0
        # Collectives may order their arguments either way, and MAX with NaN depends on it.
        assert not math.isnan(by_rank.maxima["error"])


def test_without_a_ratio_there_is_nothing_to_hold():
    run, contract = Run(), NoRatio()
    assert run.hold(contract) is POINTS
    assert run.asked == []
    assert math.isnan(contract.error) and contract.event is None
