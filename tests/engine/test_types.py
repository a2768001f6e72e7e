"""Records of tensors: changed together, indexed where their tensors are; metrics."""

import pytest
import torch

from gardo.types import Scores, select, together

INTEGERS = torch.tensor([2**53 - 1, -(2**53) + 1, 0, 7])
FLOATS = torch.tensor([0.1, float("nan"), float("-inf"), 1e-45])
SCORES = Scores(
    sample_B=INTEGERS,
    group_B=INTEGERS.flip(0),
    proxy_B=FLOATS,
    valid_B=torch.tensor([True, False, False, True]),
    rewards={"a": FLOATS.flip(0), "b": FLOATS.double() / 3},
    proxies={"a": 1.0},
    features_BD=torch.arange(12.0).view(4, 3).to(torch.bfloat16) / 7,
)


def columns(scores):
    return [
        scores.sample_B, scores.group_B, scores.proxy_B, scores.valid_B, *scores.rewards.values(),
        scores.features_BD,
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [3, 1], [2, 2, 0, 1, 3]])
def test_what_changes_together_stays_what_it_is(rows):
    """In one piece; every dtype comes back to the bit, and only rows are told apart."""
    seen = []

    def change(whole):
        seen.append(whole.shape)
        return whole[rows]

    changed = together(SCORES, change)
    assert seen == [(4, 9)]
    for old, new in zip(columns(SCORES), columns(changed), strict=True):
        assert new.dtype == old.dtype
        torch.testing.assert_close(new, old[rows], rtol=0, atol=0, equal_nan=True)
    assert changed.proxies == SCORES.proxies and changed.kl_B is None


def test_rows_are_indexed_where_they_are():
    """A host's index into a record of which some is on another device."""
    scores = Scores(INTEGERS, INTEGERS, FLOATS.to("meta"), FLOATS > 0)
    chosen = select(scores, torch.tensor([3, 0]))
    assert chosen.sample_B.tolist() == [7, 2**53 - 1]
    assert chosen.proxy_B.device.type == "meta" and len(chosen.proxy_B) == 2
