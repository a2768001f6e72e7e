"""Pref-GRPO's reward (arXiv 2508.20751): how often an image beats the others of its prompt.

    rewards:
      beauty: {kind: preference, role: proxy, judge: {kind: pickscore}}
    algorithm: {name: flow_grpo, advantage: {std: group}}

Pref-GRPO is Flow-GRPO on this reward; GARDO, DiffusionNFT and the others take it as well. Its
reason: the scores of a group often hardly differ, and dividing by their spread makes advantages of
noise. A judge that sees two images side by side looks for the difference itself.

The judge is any reward. One that compares two images (it has `compare`) is asked about pairs. One
that scores single images scores each once; the higher score wins, and scores that differ by no more
than `tie_margin` tie, so that noise does not win.

    value_i = mean over the opponents j of p_ij        p_ij: 1 for a win, 0.5 for a tie, 0
    p_ij    = (c_ij + 1 - c_ji) / 2                    c_ij: the judge's answer, i shown first

Asking in both orders cancels what the judge owes to the order. A pair with a failed answer does not
count; an image without any valid pair is masked. (The release asks in one order and counts a failed
answer as a tie.)

For a judge that is slow, `opponents: k` has each image meet k others instead of all: the group is
put on a ring in an order drawn anew at every step, and neighbours meet. `method: bradley_terry`
then says more than the win rate: beating a strong image counts for more than beating a weak one.

Each rank judges its own images, shown first, against their opponents: k or G - 1 calls an image.
What crosses ranks, and only in groups that span them, is the images in 8 bits (a score, where the
judge scores single images). A judge of pairs always sees 8 bits: on one rank it says the same.

In an evaluation there is nobody to beat: the mean win rate of a group is always 0.5. So the judge's
own scores are reported there, and nothing where it only compares.

Shapes: B images of this rank, A of all ranks, in P groups of G; K opponents of each; N pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from pydantic import Field

import gardo_kernels
from gardo import plugins
from gardo.rewards.base import About, Gathering, Held, Reward, RewardSettings, provides, within
from gardo.rewards.bradley_terry import predicted_win_rate
from gardo.streams import Stream
from gardo.types import Prompt

if TYPE_CHECKING:
    from torch import Tensor


class PreferenceSettings(RewardSettings):
    kind: Literal["preference"] = "preference"
    role: Literal["proxy", "auxiliary", "held_out"]
    judge: Any = Field(
        description="the reward that compares two images or scores each, with its own fields"
    )
    opponents: int | None = Field(
        None, ge=1, description="others of its group that an image meets; all if left out"
    )
    both_orders: bool = Field(True, description="ask about each pair again with the order reversed")
    method: Literal["win_rate", "bradley_terry"] = Field(
        "win_rate",
        description="share of wins, or strengths fitted to them (Bradley-Terry)",
    )
    prior: float = Field(
        3.0, gt=0, le=10, description="bradley_terry: standard deviation of the strengths"
    )
    tie_margin: float = Field(
        0.0, ge=0, description="a judge of single images: scores this near are a tie"
    )
    batch: int = Field(16, ge=1, description="a judge of pairs: pairs a call")


class Judge(Protocol):
    """Says who wins, from what it has seen of each image."""

    def see(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """[B, ...]: all that a comparison needs of each image; this travels between ranks."""

    def compare(
        self, seen: Tensor, first_N: Tensor, second_N: Tensor, prompts: Sequence[Prompt]
    ) -> Tensor:
        """fp32 [N] in [0, 1], how sure it is of the first; NaN where it failed.

        `first_N` and `second_N` are rows of `seen`.
        """


class PairJudge:
    """A reward that compares two images."""

    def __init__(self, reward: Reward, batch: int) -> None:
        self.reward, self.batch = reward, batch

    def see(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """In 8 bits, which know no NaN: a row below says whether the picture was finite."""
        good_B = images_B3HW.isfinite().flatten(1).all(1)
        bytes_B3HW = (images_B3HW.nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
        row = good_B.to(torch.uint8)[:, None, None, None].expand_as(bytes_B3HW[:, :, :1])
        return torch.cat([bytes_B3HW, row], dim=2)

    def compare(
        self, seen: Tensor, first_N: Tensor, second_N: Tensor, prompts: Sequence[Prompt]
    ) -> Tensor:
        seen, good_B = seen[:, :, :-1], seen[:, 0, -1, 0] > 0
        answers = [torch.empty(0, device=seen.device)]
        together = max(self.batch, self.reward.at_once)
        for part in torch.arange(len(prompts), device=seen.device).split(together):
            if not len(part):  # a rank may have nothing to ask
                continue
            texts = [prompts[i] for i in part.tolist()]
            first, second = seen[first_N[part]].float() / 255, seen[second_N[part]].float() / 255
            answers.append(self.reward.compare(first, second, texts).float())
        answer_N = torch.cat(answers)
        answer_N = answer_N.where(good_B[first_N] & good_B[second_N], torch.nan)
        return within(answer_N, (0.0, 1.0))


class ScoreJudge:
    """A reward that scores single images: the higher score wins."""

    def __init__(self, reward: Reward, tie_margin: float) -> None:
        self.reward, self.tie_margin = reward, tie_margin

    def see(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        value_B = self.reward.score(images_B3HW, prompts).float()
        value_B = within(value_B, self.reward.limits)
        return torch.where(value_B.isfinite(), value_B, torch.nan)

    def compare(
        self, seen: Tensor, first_N: Tensor, second_N: Tensor, prompts: Sequence[Prompt]
    ) -> Tensor:
        ahead_N = seen[first_N] - seen[second_N]
        margin = self.tie_margin
        answer_N = ((ahead_N > margin).float() - (ahead_N < -margin).float() + 1) / 2
        return torch.where(ahead_N.isnan(), torch.nan, answer_N)


class Tournament:
    """Who meets whom: each group on a ring in random order, near neighbours meet.

    Every image has exactly `opponents` of them (all others: the whole ring), and every pair is
    equally likely to meet.
    """

    def __init__(self, place: Gathering, opponents: int | None, *, both_orders: bool) -> None:
        self.gather, device = place.gather, place.sample_B.device
        sample_A, group_A = self.gather(place.sample_B), self.gather(place.group_B)
        draw_A = gardo_kernels.random_uniform(
            place.seed, (place.step << 32) + sample_A, Stream.OPPONENTS, 1, backend="torch"
        )[:, 0]
        order = sample_A.argsort()
        order = order[draw_A[order].argsort(stable=True)]
        order = order[group_A[order].argsort(stable=True)]
        self.ring_PG = order.view(len(group_A.unique()), -1)  # rows of the gathered batch
        P, G = self.ring_PG.shape
        self.row_A = torch.empty_like(order)
        self.row_A[order] = torch.arange(P * G, device=device) // G
        self.spot_A = torch.empty_like(order)
        self.spot_A[order] = torch.arange(P * G, device=device) % G
        start = (sample_A == place.sample_B[0]).nonzero()[0]
        self.own_B = start + torch.arange(len(place.sample_B), device=device)
        self.both_orders = both_orders
        self.offset_K = ring_offsets(G, opponents or G - 1, both_orders=both_orders).to(device)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Of this rank's images, each shown first: rows of the opponents [B, K]; who is asked."""
        G = self.ring_PG.shape[1]
        spot_B1 = self.spot_A[self.own_B][:, None]
        opponent_BK = self.ring_PG[self.row_A[self.own_B][:, None], (spot_B1 + self.offset_K) % G]
        asked_BK = torch.ones_like(opponent_BK, dtype=torch.bool)
        if not self.both_orders:  # two that face each other across the ring: one of them asks
            asked_BK = (2 * self.offset_K != G) | (spot_B1 < self.offset_K)
        return opponent_BK, asked_BK

    def share(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """What opponents on other ranks look like: (rows seen here, where each of all A is).

        Only rows of groups that span ranks travel. -1 for what no pair here needs.
        """
        B, device = len(seen), seen.device
        owner_PG = self.ring_PG // B  # the gathered batch is in rank order
        split_P = owner_PG.amin(1) != owner_PG.amax(1)
        split_A = torch.zeros_like(self.row_A, dtype=torch.bool)
        split_A[self.ring_PG[split_P].flatten()] = True
        split_WB = split_A.view(-1, B)
        most = int(split_WB.sum(1).max())  # the same number on every rank
        where_A = torch.full_like(self.row_A, -1)
        if most:
            sent = split_A[self.own_B].nonzero().flatten()
            padded = torch.cat([sent, sent.new_zeros(most - len(sent))])
            seen = torch.cat([seen, self.gather(seen[padded])])
            rank_W1 = torch.arange(len(split_WB), device=device)[:, None]
            place_A = (B + rank_W1 * most + split_WB.cumsum(1) - 1).flatten()
            where_A = torch.where(split_A, place_A, where_A)
        where_A[self.own_B] = torch.arange(B, device=device)
        return seen, where_A

    def preferences(self, answer_BK: Tensor) -> Tensor:
        """p_ij of all ranks' pairs from this rank's answers, fp64 [P, G, G]; NaN where none."""
        answer_AK = self.gather(answer_BK).double()
        P, G = self.ring_PG.shape
        table = answer_AK.new_full((P, G, G), torch.nan)
        spot_A1 = self.spot_A[:, None]
        table[self.row_A[:, None], spot_A1, (spot_A1 + self.offset_K) % G] = answer_AK
        reverse = 1 - table.mT
        if self.both_orders:
            return (table + reverse) / 2
        return torch.where(table.isnan(), reverse, table)

    def own(self, value_PG: Tensor) -> Tensor:
        """[B]: the values of this rank's images."""
        return value_PG[self.row_A[self.own_B], self.spot_A[self.own_B]]


def ring_offsets(group: int, opponents: int, *, both_orders: bool) -> Tensor:
    """How far on the ring the opponents are that an image is shown first against."""
    near = list(range(1, opponents // 2 + 1))
    behind = [-n for n in near] if both_orders else []
    across = [group // 2] if opponents % 2 else []
    return torch.tensor([*near, *behind, *across])


def win_rate(preference_PGG: Tensor, valid_PGG: Tensor, prior: float) -> Tensor:
    """The mean preference over the valid pairs, fp64 [P, G]; 0 where there is none."""
    wins_PG = torch.where(valid_PGG, preference_PGG, 0.0).sum(-1)
    return wins_PG / valid_PGG.sum(-1).clamp(min=1)


METHODS = {"win_rate": win_rate, "bradley_terry": predicted_win_rate}


class Preference(Reward):
    Settings = PreferenceSettings
    limits = (0.0, 1.0)
    about = About(
        "share of the group that it beats, by a judge", "0 to 1", "its judge's", "in full"
    )

    def __init__(
        self, settings: PreferenceSettings, device: torch.device, judge: Reward | None = None
    ) -> None:
        """`judge`, where it is not to be loaded here."""
        super().__init__(settings, device)
        plugin = plugins.resolve("gardo.rewards", settings.judge.kind)
        try:
            self.reward: Reward = judge or plugin(settings.judge, device)
        except (OSError, ValueError) as error:
            raise settings.judge.error_at("judge", error) from error
        self.judge: Judge = (
            PairJudge(self.reward, settings.batch)
            if provides(plugin, "compare")
            else ScoreJudge(self.reward, settings.tie_margin)
        )
        self.scores_alone = provides(plugin, "score")

    @property
    def in_tf32(self) -> bool | None:
        return self.reward.in_tf32

    @property
    def trouble(self) -> str:
        return self.reward.trouble

    @property
    def exchange(self) -> str:
        return self.reward.exchange

    def costs(self) -> dict[str, float] | None:
        return self.reward.costs()

    def meet(self, prompt: Prompt, size: tuple[int, int]) -> None:
        try:
            self.reward.meet(prompt, size)
        except ValueError as error:
            raise self.settings.judge.error_at("judge", error) from None

    def close(self) -> None:
        self.reward.close()

    @classmethod
    def holds(cls, settings: PreferenceSettings) -> list[Held] | None:
        judge: Any = settings.judge
        if judge.where != "here":
            return []
        found: list[Held] | None = plugins.resolve("gardo.rewards", judge.kind).holds(judge)
        return found

    @classmethod
    def check(cls, settings: PreferenceSettings, images_per_prompt: int) -> None:
        kind, others = settings.judge.kind, images_per_prompt - 1
        plugin = plugins.resolve("gardo.rewards", kind)
        pairwise = provides(plugin, "compare")
        if "judge" in plugin.Settings.model_fields:
            raise ValueError(f"judge.kind: {kind} judges groups; name the judge of images itself")
        if plugin.gives_features:
            raise ValueError(f"judge.kind: {kind} gives features; name a reward that scores images")
        if not pairwise and not provides(plugin, "score"):
            raise ValueError(
                f"judge.kind: {kind} has neither `compare` nor `score`; write one of them "
                "(gardo/rewards/base.py says what they return)"
            )
        if pairwise and settings.tie_margin:
            raise ValueError(
                f"tie_margin: {settings.tie_margin}: {kind} compares images and says itself what a "
                "tie is; leave it out"
            )
        if not others:
            raise ValueError(
                "kind: preference compares the images of a prompt, but data.images_per_prompt is "
                "1; use at least 2"
            )
        opponents = settings.opponents or others
        if opponents > others:
            raise ValueError(
                f"opponents: {opponents}: a group of {images_per_prompt} has {others} others; use "
                f"at most {others}, or leave it out"
            )
        if opponents % 2 and images_per_prompt % 2:
            raise ValueError(
                f"opponents: {opponents}: not every one of {images_per_prompt} images can meet "
                f"{opponents} others; use {opponents + 1}"
            )

    def score(self, images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The judge's own scores, for evaluations."""
        return self.reward.score(images_B3HW, prompts)

    def score_together(
        self, images_B3HW: Tensor, prompts: Sequence[Prompt], place: Gathering
    ) -> Tensor:
        settings = self.settings
        games = Tournament(place, settings.opponents, both_orders=settings.both_orders)
        seen, where_A = games.share(self.judge.see(images_B3HW, prompts))
        opponent_BK, asked_BK = games.pairs()
        first_N, slot_N = asked_BK.nonzero(as_tuple=True)
        second_N = where_A[opponent_BK[first_N, slot_N]]
        texts = [prompts[i] for i in first_N.tolist()]
        answer_BK = torch.full_like(opponent_BK, torch.nan, dtype=torch.float32)
        answer_BK[first_N, slot_N] = self.judge.compare(seen, first_N, second_N, texts)
        preference_PGG = games.preferences(answer_BK)
        valid_PGG = ~preference_PGG.isnan()
        value_PG = METHODS[settings.method](preference_PGG, valid_PGG, settings.prior)
        value_PG = torch.where(valid_PGG.any(-1), value_PG, torch.nan)
        return games.own(value_PG).float()


PLUGIN = Preference
