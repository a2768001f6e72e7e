"""What the KL weighs over an update: against the release's micro-batches, and however it is cut."""

import dataclasses
import math
from functools import partial
from itertools import combinations

import pytest
import torch

from gardo.algorithms.awm import AWM, AWMSettings
from gardo.algorithms.ddpo import DDPO, DDPOSettings
from gardo.algorithms.diffusion_nft import DiffusionNFT, DiffusionNFTSettings
from gardo.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from gardo.algorithms.grpo_guard import GRPOGuard, GRPOGuardSettings
from gardo.algorithms.kl import KLSettings, gated_share, weighed
from gardo.algorithms.refl import ReFL, ReFLSettings
from gardo.rollout import update_of
from gardo.types import Credit, Metrics
from tests.engine.algorithms.linear_policy import (
    COUNT,
    SEED,
    STEP,
    LinearPolicy,
    build,
    context,
    minibatches,
    nudge,
    roll,
    scores_of,
)

AWM_SETTINGS = partial(AWMSettings, times=(0, 4))  # of the five steps here
KINDS = (
    (FlowGRPO, FlowGRPOSettings), (DiffusionNFT, DiffusionNFTSettings), (AWM, AWM_SETTINGS)
)  # fmt: skip


def released_kl(kl_B, gate_B, order, micro_batch, *, all_rows=False):
    """The release's KL term of an update: each micro-batch's mean of its gated rows, averaged.

    One without a gated row counts as 0; for NFT (`all_rows`) as the mean of all its rows.
    """
    terms = []
    for part in order.split(micro_batch):
        gated = kl_B[part][gate_B[part]]
        if len(gated):
            terms.append(gated.mean())
        else:
            terms.append(kl_B[part].mean() if all_rows else torch.zeros(()).double())
    return torch.stack(terms).mean()


def weighed_kl(settings, kl_B, gate_B):
    of_gated, of_others = settings.kl_weights(int(gate_B.sum()), len(gate_B))
    return (torch.where(gate_B, of_gated, of_others) * kl_B).mean()


@pytest.mark.parametrize("gated", [0, 1, 3, 6])
@pytest.mark.parametrize("all_rows", [False, True])
def test_released_is_the_mean_over_all_micro_batches_that_there_are(gated, all_rows):
    """Exactly: each of the C(6, 2) micro-batches of 2 of 6 samples is equally likely."""
    kl_B, gate_B = torch.tensor([0.3, 1.0, 0.1, 2.0, 5.0, 0.7]).double(), torch.arange(6) < gated
    settings = {
        False: KLSettings(name="x", kl_reduction="released", kl_micro_batch=2),
        True: DiffusionNFTSettings(kl_reduction="released", kl_micro_batch=2),
    }[all_rows]
    pairs = torch.tensor([*combinations(range(6), 2)])
    terms = [released_kl(kl_B, gate_B, pair, 2, all_rows=all_rows) for pair in pairs]
    torch.testing.assert_close(weighed_kl(settings, kl_B, gate_B), torch.stack(terms).mean())


@pytest.mark.parametrize(("micro_batch", "fraction", "share"), [(9, 0.05, 0.37), (3, 0.1, 0.27)])
def test_released_is_what_the_releases_loop_gives(micro_batch, fraction, share):
    """48 prompts x 24 images in two updates, shuffled (over the ranks too) and cut."""
    generator = torch.Generator().manual_seed(0)
    samples = 576
    kl_B = torch.rand(samples, generator=generator).double()
    gate_B = torch.randperm(samples, generator=generator) < round(fraction * samples)
    settings = KLSettings(name="x", kl_reduction="released", kl_micro_batch=micro_batch)
    drawn = torch.stack([
        released_kl(kl_B, gate_B, torch.randperm(samples, generator=generator), micro_batch)
        for _ in range(400)
    ])  # fmt: skip
    error = drawn.std() / math.sqrt(len(drawn))
    assert abs(weighed_kl(settings, kl_B, gate_B) - drawn.mean()) < 4 * error
    gated = int(gate_B.sum())
    assert gated_share(gated, samples, micro_batch) == pytest.approx(share, abs=0.01)
    # the mean of the gated rows, by contrast, is far from what the release gives
    mean = weighed_kl(KLSettings(name="x", kl_reduction="gated"), kl_B, gate_B)
    assert abs(mean - drawn.mean()) > 100 * error


def test_weights_by_hand():
    def weights(reduction, gated, samples=20, **more):
        return KLSettings(name="x", kl_reduction=reduction, **more).kl_weights(gated, samples)

    assert weights("batch", 4) == (1.0, 0.0)
    assert weights("gated", 4) == (5.0, 0.0)
    assert weights("released", 4, kl_micro_batch=1)[0] == pytest.approx(1.0)  # the sum over all
    assert weights("released", 4, kl_micro_batch=99)[0] == pytest.approx(5.0)  # the mean
    for reduction in ("batch", "gated", "released"):
        assert weights(reduction, 20)[0] == pytest.approx(1.0), "every row gated: the same in all"
        assert weights(reduction, 0) == (1.0, 0.0)


def test_each_update_counts_its_own_gated_samples():
    update_B = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    gate_B = torch.tensor([True, True, False, True, False, False, False, False])
    credit = Credit(advantage_B=torch.zeros(8), gate_B=gate_B)
    settings = KLSettings(name="x", kl_reduction="gated")
    weight_B = weighed(credit, update_B, settings.kl_weights).kl_weight_B
    assert weight_B.tolist() == [4, 2, 0, 2, 0, 0, 0, 0]


def gated_update(plugin, settings, *, updates=1):
    """Credit with two gated samples, points whose reference is the old velocity + 1."""
    algorithm, policy = build(plugin, settings), LinearPolicy()
    rollout = roll(policy, algorithm)
    credit = dataclasses.replace(
        algorithm.credit(scores_of(rollout)), gate_B=torch.arange(COUNT) < 2
    )
    update_B = update_of(rollout.sample_B, updates, seed=SEED, step=STEP)
    credit = weighed(credit, update_B, algorithm.kl_weights)
    points = algorithm.points(rollout, credit)
    for name in ("old", "ema", "reference"):
        points = points.with_velocity(name, points.x_RX + (name == "reference"))
    nudge(policy, 0.1)
    return algorithm, policy, rollout, credit, points


@pytest.mark.parametrize(("plugin", "settings"), KINDS)
@pytest.mark.parametrize("reduction", ["batch", "gated", "released"])
def test_no_cut_into_micro_batches_changes_the_kl(plugin, settings, reduction):
    """Loss, gradient and metrics of an update: one micro-batch, or 3 rows, without a gate in most.

    The KL alone: the loss with beta less the loss without.
    """
    cuts, kls = [], []
    for rows in (24, 3):
        totals, gradients = Metrics(), []
        for beta in (0.7, 0.0):
            more = {"kl_reduction": reduction, "kl_micro_batch": 3, "beta": beta}
            algorithm, policy, rollout, credit, points = gated_update(plugin, settings(**more))
            batches = minibatches(points, credit, rollout, micro_batch=rows)  # fmt: skip
            policy.zero_grad()
            for batch in batches:
                loss, metrics = algorithm.loss(context(policy), batch)
                (loss / len(batches)).backward()
                if beta:
                    totals.add(metrics)
            gradients.append(policy.net.weight.grad.clone())
        cuts.append(gradients[0] - gradients[1])
        kls.append((totals["kl"], totals["kl_loss"], totals["gate_share"]))
    assert cuts[0].abs().max() > 1e-4
    torch.testing.assert_close(cuts[1], cuts[0], rtol=1e-4, atol=1e-6)
    assert kls[1] == pytest.approx(kls[0], rel=1e-5)
    kl, kl_loss, share = kls[0]
    assert share == 2 / 8
    if plugin is not DiffusionNFT or reduction != "released":  # else all rows count
        of_gated = algorithm.settings.kl_weights(2, 8)[0]
        assert kl_loss == pytest.approx(kl * of_gated * 2 / 8, rel=1e-5)


def test_released_nft_asks_the_reference_everywhere():
    algorithm, _, _, credit, points = gated_update(
        DiffusionNFT, DiffusionNFTSettings(kl_reduction="released", kl_micro_batch=3)
    )
    assert algorithm.teachers(points, credit)["reference"].all()
    assert (credit.kl_weight_B > 0).all()
    algorithm, _, _, credit, points = gated_update(
        DiffusionNFT, DiffusionNFTSettings(kl_reduction="gated")
    )
    asked = algorithm.teachers(points, credit)["reference"]
    assert torch.equal(asked, credit.gate_B[points.sample_R])


# ---- rows that weigh nothing ------------------------------------------------------------------


def half_without_credit(rollout, algorithm):
    """The second group's rewards are all alike."""
    reward_B = torch.where(rollout.group_B == 1, 0.5, scores_of(rollout).proxy_B)
    return algorithm.credit(dataclasses.replace(scores_of(rollout), proxy_B=reward_B))


@pytest.mark.parametrize(
    ("plugin", "settings"),
    [
        (FlowGRPO, FlowGRPOSettings(beta=0.5)),
        (FlowGRPO, FlowGRPOSettings()),
        (GRPOGuard, GRPOGuardSettings()),
        (DDPO, DDPOSettings()),
        (AWM, AWM_SETTINGS(ema_beta=0.0)),
    ],
)
def test_rows_that_are_called_weightless_weigh_nothing(plugin, settings):
    algorithm, policy = build(plugin, settings), LinearPolicy()
    rollout = roll(policy, algorithm)
    credit = half_without_credit(rollout, algorithm)
    if algorithm.has_kl:  # one of the samples without an advantage is gated
        credit = dataclasses.replace(credit, gate_B=rollout.sample_B == rollout.sample_B[-1])
    points = algorithm.points(rollout, credit)
    points = points.with_velocity("reference", points.x_RX)
    idle_R = algorithm.weightless(points, credit)
    expected_B = (credit.advantage_B == 0) & ~credit.gate_B
    assert expected_B.any() and not expected_B.all()
    assert torch.equal(idle_R, expected_B[points.sample_R])
    nudge(policy, 0.1)
    gradients, trained = [], []
    for idle in (None, idle_R):
        policy.zero_grad()
        batches = minibatches(points, credit, rollout, micro_batch=3, idle_R=idle)
        for batch in batches:
            loss, _ = algorithm.loss(context(policy), batch)
            (loss / 8).backward()  # 24 rows in threes, whether or not all are there
        gradients.append(policy.net.weight.grad.clone())
        trained.append(torch.cat([batch.points.sample_R for batch in batches]))
        assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
        assert all(batch.share == len(trained[-1]) / 24 for batch in batches)
    assert set(trained[1].tolist()) == set(rollout.sample_B[~expected_B].tolist())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-8)
    assert gradients[0].abs().max() > 1e-5


def test_nft_awm_with_an_ema_and_refl_use_every_row():
    """NFT holds a sample without an advantage to its old velocity, AWM to its EMA."""
    for plugin, settings in (
        (DiffusionNFT, DiffusionNFTSettings(beta=0.0)),
        (AWM, AWM_SETTINGS(beta=0.0, ema_beta=1.0)),
        (ReFL, ReFLSettings()),
    ):
        algorithm, policy = build(plugin, settings), LinearPolicy()
        rollout = roll(policy, algorithm)
        credit = algorithm.credit(scores_of(rollout))
        credit = dataclasses.replace(credit, advantage_B=torch.zeros(COUNT))
        points = algorithm.points(rollout, credit)
        assert algorithm.weightless(points, credit) is None
        points = points.with_velocity("old", points.x_RX).with_velocity("ema", points.x_RX)
        (batch,) = minibatches(points, credit, rollout, micro_batch=99)  # fmt: skip
        loss, _ = algorithm.loss(context(policy), batch)
        loss.backward()
        assert policy.net.weight.grad.abs().max() > 1e-7
