"""Which pictures of an iteration are kept, and that every rank hands in its own."""

from __future__ import annotations

import torch
from torch import Tensor

from gardo.distributed.group import Group
from gardo.kept_samples import chosen, thumbnails
from gardo.types import Credit, Rollout, Scores

PROXY = [0.1, 0.9, 0.5, 0.7, float("nan"), 0.3, 0.8, 0.8]
U = [0.0, 0.6, -0.7, 0.2, 0.9, 0.1, 0.4, 0.3]


def scores(proxy: list[float] = PROXY, lacking: tuple[int, ...] = (4,)) -> Scores:
    count = len(proxy)
    valid_B = torch.tensor([row not in lacking for row in range(count)])
    return Scores(torch.arange(count), torch.arange(count) // 4, torch.tensor(proxy), valid_B)


def credit(*gated: int) -> Credit:
    return Credit(torch.zeros(8), torch.tensor([row in gated for row in range(8)]))


def kinds(shown: dict[int, list[str]]) -> dict[str, list[int]]:
    names = dict.fromkeys(name for names in shown.values() for name in names)
    return {name: [row for row in shown if name in shown[row]] for name in names}


def test_gated_are_the_furthest_apart_and_trusted_the_best_of_the_others() -> None:
    shown = chosen(scores(), credit(1, 2, 3, 4), torch.tensor(U), 2)
    assert kinds(shown) == {
        "gated": [2, 1],  # either sign of the gate; 4 has no value
        "trusted": [6, 7],  # equal ones by their number
        "best": [1, 6],
        "worst": [0, 5],
    }


def test_where_all_or_none_are_gated_only_the_best_and_the_worst_are_kept() -> None:
    for gate in (credit(), credit(*range(8))):
        assert kinds(chosen(scores(), gate, torch.tensor(U), 1)) == {"best": [1], "worst": [0]}
    assert kinds(chosen(scores(), credit(1), None, 1)) == {"best": [1], "worst": [0]}


def test_there_are_as_many_as_there_are() -> None:
    few = scores(lacking=(0, 1, 2, 3, 4, 5))
    assert kinds(chosen(few, credit(6), torch.tensor(U), 4)) == {
        "gated": [6], "trusted": [7], "best": [6, 7], "worst": [6, 7],
    }  # fmt: skip
    assert chosen(scores(lacking=tuple(range(8))), credit(), None, 4) == {}


class Both(Group):
    """This rank beside another, whose tensor is known."""

    def __init__(self, other: Tensor) -> None:
        super().__init__(torch.device("cpu"), world=2)
        self.other = other

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([tensor, self.other])


def rollout(first: int, images: Tensor) -> Rollout:
    """Of a rank whose samples begin at `first`; only what thumbnails look at."""
    none = torch.zeros(0)
    sample_B = torch.arange(first, first + len(images))
    return Rollout(
        sample_B=sample_B, group_B=sample_B, prompt_B=sample_B, prompts=(), conditioning={},
        final_BX=none, images_B3HW=images, step_T=none, state_BTX=none, u_BTX=none,
        velocity_BTX=none, transitions=None, seed=0, seed_1=none, step=0,
    )  # fmt: skip


def test_every_rank_hands_in_its_own_thumbnails() -> None:
    images = torch.rand(6, 3, 32, 16, generator=torch.Generator().manual_seed(1))
    images[0, 0, 0, 0] = float("nan")
    ids, alone = [5, 0, 3], Group(torch.device("cpu"))
    whole = thumbnails(rollout(0, images), ids, 16, alone)
    assert whole.shape == (3, 3, 16, 8) and whole.dtype == torch.uint8
    high = thumbnails(rollout(3, images[3:]), ids, 16, alone)
    low = thumbnails(rollout(0, images[:3]), ids, 16, Both(high[None]))
    assert torch.equal(low, whole) and not torch.equal(high, whole)
    expected = images[5].unflatten(1, (16, 2)).unflatten(3, (8, 2)).mean((2, 4))
    assert (whole[0] - 255 * expected).abs().max() <= 0.51
    full = thumbnails(rollout(0, images), [1], 64, alone)  # never enlarged
    assert torch.equal(full[0], (images[1] * 255).round().to(torch.uint8))
