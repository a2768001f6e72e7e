"""Advantages against published numbers, and what must hold for any rewards."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gardo.algorithms.advantage import AdvantageSettings, group_advantage, group_statistics

STDS = ("none", "global", "group", "group_unbiased")
GOLDEN = torch.tensor([0.1, 0.4, 0.4, 0.9, 0.5, 0.5, 0.5, 0.5])
TWO_GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])


def advantage(reward_B, group_B, valid_B=None, **fields):
    valid_B = torch.ones(len(reward_B), dtype=torch.bool) if valid_B is None else valid_B
    return group_advantage(reward_B, valid_B, group_B, AdvantageSettings(**fields))


def close(actual, expected, tolerance=1e-6):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("std", "first"),
    [
        ("global", [-1.70953681, -0.24421954, -0.24421954, 2.1979759]),
        ("group", [-1.2181195, -0.17401707, -0.17401707, 1.56615364]),
        ("group_unbiased", [-1.05528967, -0.15075567, -0.15075567, 1.35680101]),
        ("none", [-0.35, -0.05, -0.05, 0.45]),
    ],
)
def test_golden_numbers(std, first):
    result = advantage(GOLDEN, TWO_GROUPS, std=std)
    assert result.dtype == torch.float32
    close(result[:4], first)
    assert torch.equal(result[4:], torch.zeros(4))


def test_global_is_the_default():
    assert torch.equal(advantage(GOLDEN, TWO_GROUPS), advantage(GOLDEN, TWO_GROUPS, std="global"))


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("reward", [0.0, 0.3, -17.1, 1e6])
def test_equal_rewards_give_exact_zeros(std, reward):
    rewards = torch.full((7,), reward)  # 0.3 has no exact binary form, 7 is no power of two
    group_B = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    assert torch.equal(advantage(rewards, group_B, std=std), torch.zeros(7))


@pytest.mark.parametrize("std", STDS)
def test_a_group_of_one_has_no_advantage(std):
    result = advantage(torch.tensor([0.0, 1.0, 9.0]), torch.tensor([4, 4, 8]), std=std)
    assert result[2] == 0
    assert result[1] > 0 > result[0]


def test_groups_of_unequal_size_by_hand():
    # Interleaved, numbered with gaps: group 7 holds 0, 1, 5 and group 3 holds 2, 4.
    rewards, group_B = torch.tensor([0.0, 2, 1, 5, 4]), torch.tensor([7, 3, 7, 7, 3])
    deviation = torch.tensor([-2.0, -1, -1, 3, 1])
    close(advantage(rewards, group_B, std="none"), deviation)
    std_B = torch.tensor([14 / 3, 1, 14 / 3, 14 / 3, 1]).sqrt()
    close(advantage(rewards, group_B, std="group"), deviation / (std_B + 1e-4))
    variance = (rewards - 12 / 5).square().mean()  # around the mean of the batch
    close(advantage(rewards, group_B, std="global"), deviation / (variance.sqrt() + 1e-4))


@pytest.mark.parametrize("std", STDS)
def test_invalid_samples_do_not_count(std):
    rewards = torch.tensor([0.1, 0.4, 1e6, 0.4, 0.9, -1e6, 0.5, 0.7])
    group_B = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    valid_B = torch.tensor([1, 1, 0, 1, 1, 0, 1, 1]).bool()
    result = advantage(rewards, group_B, valid_B, std=std)
    assert torch.equal(result[~valid_B], torch.zeros(2))
    assert torch.equal(result[valid_B], advantage(rewards[valid_B], group_B[valid_B], std=std))


@pytest.mark.parametrize("std", STDS)
def test_a_group_without_a_valid_sample_gives_zeros(std):
    valid_B = torch.tensor([1, 1, 0, 0]).bool()
    result = advantage(torch.tensor([0.0, 1, 2, 3]), torch.tensor([0, 0, 1, 1]), valid_B, std=std)
    assert result[1] > 0 > result[0]
    assert torch.equal(result[2:], torch.zeros(2))
    nobody = advantage(torch.ones(2), torch.zeros(2, dtype=torch.int64), valid_B[2:], std=std)
    assert torch.equal(nobody, torch.zeros(2))


@pytest.mark.parametrize("std", STDS)
def test_scale_multiplies(std):
    close(
        advantage(GOLDEN, TWO_GROUPS, std=std, scale=2.5),
        2.5 * advantage(GOLDEN, TWO_GROUPS, std=std),
    )


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"scale": -1.0}, {"std": "batch"}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        AdvantageSettings(**wrong)


samples = st.lists(
    st.tuples(st.integers(-8, 8), st.integers(0, 3), st.booleans()), min_size=1, max_size=12
)


@settings(max_examples=30, deadline=None)
@given(samples, st.sampled_from(STDS), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_advantages(drawn, std, random):
    reward, group, valid = (torch.tensor(column) for column in zip(*drawn, strict=True))
    order = list(range(len(drawn)))
    random.shuffle(order)
    there = torch.tensor(order)
    straight = advantage(reward / 4, group, valid, std=std)
    shuffled = advantage(reward[there] / 4, group[there], valid[there], std=std)
    torch.testing.assert_close(shuffled, straight[there], rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(samples, st.sampled_from(STDS))
def test_groups_sum_to_zero_and_forget_their_level(drawn, std):
    reward, group, valid = (torch.tensor(column) for column in zip(*drawn, strict=True))
    result = advantage(reward / 4, group, valid, std=std)
    sums = torch.zeros(4).index_add(0, group, result)
    torch.testing.assert_close(sums, torch.zeros(4), rtol=0, atol=1e-5)
    if std != "global":  # the batch's std does know the levels
        raised = advantage(reward / 4 + 3 * group, group, valid, std=std)
        torch.testing.assert_close(raised, result, rtol=1e-5, atol=1e-5)


def test_statistics_are_the_groups():
    value = torch.tensor([1.0, 3, 10, 99])
    valid = torch.tensor([1, 1, 1, 0]).bool()
    mean_B, std_B = group_statistics(value, valid, torch.tensor([5, 5, 2, 2]))
    assert mean_B.dtype == std_B.dtype == torch.float64
    assert mean_B.tolist() == [2, 2, 10, 10]
    assert std_B.tolist() == [1, 1, 0, 0]
