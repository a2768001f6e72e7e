"""Win rates against counting by hand: ties, masks, groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gardo_kernels import win_rate


def count(y, mask, group):
    """The definition, pair by pair."""
    out = []
    for i in range(len(y)):
        others = [j for j in range(len(y)) if mask[j] and group[j] == group[i]]
        wins = sum(y[i] > y[j] for j in others)
        out.append(wins / len(others) if mask[i] else 0.0)
    return torch.tensor(out)


def test_by_hand():
    rates = win_rate(torch.tensor([0.3, 1.0, 1.0, -2.0]))
    assert rates.dtype == torch.float32
    torch.testing.assert_close(rates, torch.tensor([0.25, 0.5, 0.5, 0.0]))


def test_equal_scores_win_nothing():
    assert torch.equal(win_rate(torch.ones(7)), torch.zeros(7))


def test_without_ties_the_mean_is_the_same_for_every_reward():
    # hence the mean of win-rate differences is 0 and cannot steer the gate
    y = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert win_rate(y).mean().item() == pytest.approx(99 / 200, rel=1e-6)


SAMPLE = st.tuples(
    st.sampled_from([-1.5, -0.0, 0.0, 0.25, 1.0, 1.0 + 1e-12, 3e38]),
    st.booleans(),
    st.integers(-2, 2),
)


@settings(deadline=None, max_examples=60)
@given(samples=st.lists(SAMPLE, min_size=1, max_size=14))
def test_matches_the_count(samples):
    y, mask, group = (list(column) for column in zip(*samples, strict=True))
    whole = [0] * len(y)
    everyone = [True] * len(y)
    y_B = torch.tensor(y, dtype=torch.float64)
    mask_B, group_B = torch.tensor(mask), torch.tensor(group)
    torch.testing.assert_close(win_rate(y_B), count(y, everyone, whole))
    torch.testing.assert_close(win_rate(y_B, mask_B), count(y, mask, whole))
    torch.testing.assert_close(win_rate(y_B, group_B=group_B), count(y, everyone, group))
    both = win_rate(y_B, mask_B, group_B=group_B)
    torch.testing.assert_close(both, count(y, mask, group))
    back = win_rate(y_B.flip(0), mask_B.flip(0), group_B=group_B.flip(0))
    assert torch.equal(back.flip(0), both)


def test_what_a_masked_score_holds_does_not_matter():
    mask_B = torch.tensor([True, False, True, True])
    for value in (torch.nan, torch.inf, -torch.inf, 0.0):
        y_B = torch.tensor([1.0, value, 3.0, torch.inf])
        torch.testing.assert_close(win_rate(y_B, mask_B), torch.tensor([0.0, 0.0, 1 / 3, 2 / 3]))
    assert torch.equal(win_rate(torch.ones(3), torch.zeros(3, dtype=torch.bool)), torch.zeros(3))


def test_a_valid_nan_spoils_its_population_alone():
    nan, inf = torch.nan, torch.inf
    y_B = torch.tensor([1.0, nan, 3.0, 0.5, 0.25, inf])
    assert win_rate(y_B).isnan().all()
    group_B = torch.tensor([4, 4, 4, -1, -1, -1])
    expected = torch.tensor([nan, nan, nan, 1 / 3, 0.0, 2 / 3])
    torch.testing.assert_close(win_rate(y_B, group_B=group_B), expected, equal_nan=True)
    mask_B = torch.tensor([True, True, False, True, True, True])  # masked out, it has 0 as ever
    expected[2] = 0
    rates = win_rate(y_B, mask_B, group_B=group_B)
    torch.testing.assert_close(rates, expected, equal_nan=True)
    mask_B = torch.tensor([True, False, True, True, True, True])
    torch.testing.assert_close(
        win_rate(y_B, mask_B, group_B=group_B), torch.tensor([0, 0, 0.5, 1 / 3, 0, 2 / 3])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_any_real_dtype(dtype):
    y_B = torch.tensor([0, 1, 1, 0]).to(dtype)
    torch.testing.assert_close(win_rate(y_B), torch.tensor([0.0, 0.5, 0.5, 0.0]))


def test_bad_inputs():
    y_B = torch.randn(4)
    with pytest.raises(ValueError, match="y_B has shape"):
        win_rate(y_B[:0])
    with pytest.raises(ValueError, match="y_B has shape"):
        win_rate(y_B[None])
    with pytest.raises(ValueError, match=r"mask_B has shape \(3,\)"):
        win_rate(y_B, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask_B has dtype"):
        win_rate(y_B, torch.ones(4))
    with pytest.raises(ValueError, match="group_B has shape"):
        win_rate(y_B, group_B=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="group_B has dtype"):
        win_rate(y_B, group_B=torch.zeros(4))
    with pytest.raises(ValueError, match="group_B is on meta"):
        win_rate(y_B, group_B=torch.zeros(4, dtype=torch.int64, device="meta"))
