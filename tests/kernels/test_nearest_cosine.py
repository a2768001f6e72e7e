"""Distances within groups against a plain double loop, and the degenerate rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gardo_kernels import nearest_cosine


def by_hand(e_BD, groups):
    """Nearest and mean distance by a loop over pairs in fp64; zero rows have cosine 0."""
    e = e_BD.double()
    nearest, mean = [], []
    for i, group in enumerate(groups):
        members = [j for j, g in enumerate(groups) if g == group]
        pairs = {
            (j, k): 1.0 - float(e[j] @ e[k] / (e[j].norm() * e[k].norm()).clamp(min=1e-300))
            for j in members
            for k in members
            if j != k
        }
        nearest.append(min((pairs[i, k] for k in members if k != i), default=0.0))
        mean.append(sum(pairs.values()) / len(pairs) if pairs else 0.0)
    return torch.tensor(nearest), torch.tensor(mean)


@settings(deadline=None, max_examples=30)
@given(
    groups=st.lists(st.integers(-3, 3), min_size=1, max_size=10),
    width=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_matches_the_loop_for_groups_of_any_size_and_order(groups, width, seed):
    e_BD = torch.randn(len(groups), width, generator=torch.Generator().manual_seed(seed))
    nearest, mean = nearest_cosine(e_BD, torch.tensor(groups))
    expected_nearest, expected_mean = by_hand(e_BD, groups)
    torch.testing.assert_close(nearest, expected_nearest, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-6)


def test_by_hand():
    e_BD = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, 0.0], [5.0, 0.0]])
    group_B = torch.tensor([7, 7, 7, 9, 9])
    nearest, mean = nearest_cosine(e_BD, group_B)
    half = 1 - 0.5**0.5
    torch.testing.assert_close(nearest, torch.tensor([half, half, half, 2.0, 2.0]))
    pairwise = (1 + 2 * half) / 3
    torch.testing.assert_close(mean, torch.tensor([pairwise] * 3 + [2.0] * 2))
    assert nearest.dtype == mean.dtype == torch.float32


def test_identical_rows_have_distance_exactly_zero():
    row = torch.randn(1, 1024, generator=torch.Generator().manual_seed(3))
    nearest, mean = nearest_cosine(row.expand(24, -1), torch.zeros(24, dtype=torch.int64))
    assert torch.equal(nearest, torch.zeros(24)) and torch.equal(mean, torch.zeros(24))


def test_small_distances_keep_their_digits():
    # 1 - cos in fp32 would leave 6e-8 of rounding on a distance of 5e-7
    direction = torch.zeros(2, 512)
    direction[:, 0] = 1.0
    direction[1, 1] = 1e-3
    nearest, _ = nearest_cosine(direction, torch.zeros(2, dtype=torch.int64))
    expected = 1 - 1 / (1 + 1e-6) ** 0.5
    assert nearest[0].item() == pytest.approx(expected, rel=1e-4)


def test_zero_rows_have_cosine_zero():
    e_BD = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    nearest, mean = nearest_cosine(e_BD, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(nearest, torch.ones(3)) and torch.equal(mean, torch.ones(3))


def test_a_group_of_one_has_no_distance():
    nearest, mean = nearest_cosine(torch.eye(3), torch.tensor([0, 1, 1]))
    for distance in (nearest, mean):
        assert distance[0] == 0
        torch.testing.assert_close(distance[1:], torch.ones(2))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale):
    e_BD = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    group_B = torch.tensor([0, 0, 0, 1, 1, 1])
    for ours, plain in zip(
        nearest_cosine(e_BD * scale, group_B), nearest_cosine(e_BD, group_B), strict=True
    ):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_no_gradient_and_low_precision():
    e_BD = torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    group_B = torch.zeros(4, dtype=torch.int64)
    out = nearest_cosine(e_BD.clone().requires_grad_(), group_B)
    assert not any(x.requires_grad for x in out)
    for ours, wide in zip(out, nearest_cosine(e_BD.float(), group_B), strict=True):
        assert torch.equal(ours, wide)


def test_bad_inputs():
    e_BD, group_B = torch.randn(4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="e_BD has shape"):
        nearest_cosine(e_BD[0], group_B)
    with pytest.raises(ValueError, match="e_BD has shape"):
        nearest_cosine(e_BD[:0], group_B[:0])
    with pytest.raises(ValueError, match=r"group_B has shape \(3,\)"):
        nearest_cosine(e_BD, group_B[:3])
    with pytest.raises(ValueError, match="group_B has dtype"):
        nearest_cosine(e_BD, group_B.float())
    with pytest.raises(ValueError, match="e_BD has dtype"):
        nearest_cosine(e_BD.long(), group_B)
    with pytest.raises(ValueError, match="group_B is on meta"):
        nearest_cosine(e_BD, group_B.to("meta"))
    with pytest.raises(RuntimeError, match="not built in this version"):
        nearest_cosine(e_BD, group_B, backend="triton")
