"""Intervals cover what they claim, pairs are paired, entropy is the textbook's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, spearmanr

from gardo.evaluation.statistics import (
    bootstrap_mean,
    entropy,
    paired_change,
    prompt_means,
    rank_correlation,
    rank_correlation_change,
    win_rate,
)


@pytest.mark.parametrize(
    ("units", "least", "most"),
    [(2, 0.92, 0.98), (3, 0.92, 0.98), (8, 0.92, 0.99), (36, 0.915, 0.985)],
)
def test_interval_covers_the_true_mean_as_often_as_it_says(
    units: int, least: float, most: float
) -> None:
    generator = torch.Generator().manual_seed(units)
    trials = 300  # a coverage of 0.95 has a standard error of 0.013
    covered = 0
    for trial in range(trials):
        values = 3 + 2 * torch.randn(units, generator=generator)
        interval = bootstrap_mean(values, seed=trial, resamples=500)
        covered += interval.low <= 3 <= interval.high
    assert least <= covered / trials <= most


def test_level_sets_the_coverage() -> None:
    generator = torch.Generator().manual_seed(1)
    draws = [torch.rand(30, generator=generator) for _ in range(200)]
    intervals = [bootstrap_mean(values, resamples=500, level=0.5) for values in draws]
    covered = sum(one.low <= 0.5 <= one.high for one in intervals) / len(intervals)
    assert 0.4 < covered < 0.6


def test_mean_of_many_units_agrees_with_the_normal_interval() -> None:
    values = torch.randn(4000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std().item() / math.sqrt(4000)
    assert interval.mean == pytest.approx(values.mean().item(), abs=1e-12)
    assert interval.low == pytest.approx(interval.mean - half, abs=0.05 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.05 * half)


def test_same_seed_same_interval_other_seed_another() -> None:
    values = torch.arange(20.0)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    before = torch.get_rng_state()
    bootstrap_mean(values)
    assert torch.equal(before, torch.get_rng_state()), "the caller's generator was used"


def test_equal_values_have_no_width() -> None:
    interval = bootstrap_mean(torch.full((7,), 0.25))
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_missing_units_are_dropped() -> None:
    values = torch.tensor([1.0, math.nan, 3.0, 8.0])
    assert bootstrap_mean(values) == bootstrap_mean(torch.tensor([1.0, 3.0, 8.0]))


def test_one_unit_has_a_mean_and_no_interval_and_none_has_neither() -> None:
    one = bootstrap_mean(torch.tensor([2.0, math.nan]))
    assert one.mean == 2 and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(bootstrap_mean(torch.tensor([])).mean)


def test_change_is_paired() -> None:
    before = torch.linspace(0, 100, 12)  # prompts differ far more than the change
    change = paired_change(before, before + 0.5)
    assert change.mean == pytest.approx(0.5) and change.low > 0.49 and change.high < 0.51
    assert paired_change(before + 0.5, before).high < 0


def test_a_unit_missing_on_one_side_is_dropped_from_both() -> None:
    before = torch.tensor([1.0, math.nan, 2.0, 100.0])
    after = torch.tensor([2.0, 50.0, 4.0, math.nan])
    assert paired_change(before, after).mean == 1.5


def test_refuses_what_it_cannot_mean() -> None:
    with pytest.raises(ValueError, match="one value for each unit"):
        bootstrap_mean(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="same units"):
        paired_change(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="level"):
        bootstrap_mean(torch.zeros(3), level=1.0)


def test_entropy_of_small_cases() -> None:
    assert entropy(torch.tensor([4, 4, 4])) == 0
    assert math.copysign(1, entropy(torch.tensor([4]))) == 1
    assert entropy(torch.tensor([0, 1, 0, 1])) == pytest.approx(math.log(2))
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy(torch.tensor([-1, -1, -1, 7])) == pytest.approx(expected)
    assert math.isnan(entropy(torch.tensor([], dtype=torch.int64)))
    with pytest.raises(TypeError, match="integers"):
        entropy(torch.tensor([0.5]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-3, 6), min_size=1, max_size=60))
def test_entropy_lies_between_0_and_log_of_the_labels_and_ignores_order(labels: list[int]) -> None:
    value = entropy(torch.tensor(labels))
    assert 0 <= value <= math.log(len(set(labels))) + 1e-12
    renamed = torch.tensor([10 - label for label in reversed(labels)])
    assert entropy(renamed) == pytest.approx(value, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=5, max_size=30))
def test_interval_contains_the_mean_and_stays_inside_the_data(values: list[float]) -> None:
    interval = bootstrap_mean(torch.tensor(values, dtype=torch.float64), resamples=500)
    assert min(values) - 1e-9 <= interval.low <= interval.mean + 1e-9
    assert interval.mean - 1e-9 <= interval.high <= max(values) + 1e-9


def test_rank_correlation_is_the_textbooks() -> None:
    """scipy's, with ties too; whatever keeps the order of either side changes nothing."""
    generator = torch.Generator().manual_seed(4)
    first = torch.randint(0, 6, (40,), generator=generator).double()
    second = first + 2 * torch.randn(40, generator=generator)
    found = rank_correlation(first, second)
    assert found.mean == pytest.approx(spearmanr(first, second).statistic, abs=1e-12)
    assert found.low < found.mean < found.high
    assert rank_correlation(first.exp(), second * 7 - 3) == found
    assert rank_correlation(first, -second).mean == pytest.approx(-found.mean, abs=1e-12)
    assert rank_correlation(first, first).mean == pytest.approx(1)


def test_its_interval_covers_the_true_correlation() -> None:
    """Of a bivariate normal with correlation r, Spearman's is 6 / pi asin(r / 2)."""
    generator = torch.Generator().manual_seed(5)
    truth, trials, covered = 6 / math.pi * math.asin(0.25), 100, 0
    for trial in range(trials):
        common, own, other = torch.randn(3, 30, generator=generator)
        interval = rank_correlation(common + own, common + other, seed=trial, resamples=200)
        covered += interval.low <= truth <= interval.high
    assert 0.87 <= covered / trials < 1  # the standard error of a coverage of 0.95 is 0.022


def test_a_change_of_rank_correlation_draws_the_same_units() -> None:
    generator = torch.Generator().manual_seed(6)
    first, second, noise = torch.randn(3, 60, generator=generator, dtype=torch.float64)
    same = rank_correlation_change((first, second), (first.exp(), second))
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    before, after = (first, first + 0.3 * noise), (first, second)
    change = rank_correlation_change(before, after)
    difference = rank_correlation(*after).mean - rank_correlation(*before).mean
    assert change.mean == pytest.approx(difference) and change.high < -0.3


def test_no_rank_correlation_without_ranks() -> None:
    values = torch.arange(10.0)
    flat = rank_correlation(values, torch.ones(10))
    assert all(map(math.isnan, (flat.mean, flat.low, flat.high)))
    few = rank_correlation(values[:4], values[:4])
    assert few.mean == pytest.approx(1) and math.isnan(few.low) and math.isnan(few.high)
    missing = values.clone()
    missing[3:] = math.nan
    assert math.isnan(rank_correlation(values, missing).low)  # three units are left


def test_win_rate_counts_prompts_and_halves_of_ties() -> None:
    before = torch.tensor([1.0, 1.0, 1.0, math.nan, 1.0])
    after = torch.tensor([2.0, 2.0, 1.0, 9.0, 0.0])
    found = win_rate(before, after)
    assert found.mean == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert 0 <= found.low <= found.mean <= found.high <= 1


@pytest.mark.parametrize(("wins", "units"), [(5, 5), (19, 20), (0, 54), (10, 36)])
def test_the_interval_of_a_win_rate_is_wilsons(wins: int, units: int) -> None:
    won = torch.arange(units) < wins
    found = win_rate(torch.zeros(units), won.double() * 2 - 1)
    expected = binomtest(wins, units).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_prompts_mean_is_of_the_images_that_have_a_value() -> None:
    values = torch.tensor([1.0, 3.0, math.nan, 5.0, math.nan, math.nan])
    means = prompt_means(values, 2)
    assert means[:2].tolist() == [2, 5] and math.isnan(means[2])
