"""What every base algorithm keeps to."""

import pytest
import torch

from gardo.algorithms.advantage import AdvantageSettings
from gardo.algorithms.awm import AWM, AWMSettings
from gardo.algorithms.base import SamplerSettings, World
from gardo.algorithms.diffusion_nft import DiffusionNFT, DiffusionNFTSettings
from gardo.algorithms.flow_grpo import FlowGRPO, FlowGRPOSettings
from gardo.algorithms.refl import ReFL, ReFLSettings
from gardo.flow import sd3_sigmas
from gardo.types import Metrics
from tests.engine.algorithms.linear_policy import (
    COUNT,
    LinearPolicy,
    build,
    context,
    minibatches,
    roll,
    scores_of,
)


def test_samplers_that_do_not_serve_are_refused():
    def sampler(train_steps):
        return SamplerSettings(steps=5, train_steps=train_steps)

    FlowGRPO.check(FlowGRPOSettings(), sampler(4))
    with pytest.raises(ValueError, match=r"sampler\.train_steps: 5 of 5 steps.*at most 4"):
        FlowGRPO.check(FlowGRPOSettings(), sampler(5))
    DiffusionNFT.check(DiffusionNFTSettings(), sampler(5))
    with pytest.raises(ValueError, match=r"sampler\.train_steps: 6 times of 5 steps; at most 5"):
        DiffusionNFT.check(DiffusionNFTSettings(), sampler(6))
    ReFL.check(ReFLSettings(), sampler(99))  # trains one step, whatever this says


@pytest.mark.parametrize(
    ("plugin", "settings"),
    [
        (FlowGRPO, FlowGRPOSettings(beta=0.1)),
        (DiffusionNFT, DiffusionNFTSettings(beta=0.1)),
        (AWM, AWMSettings(times=(0, 4), beta=0.1)),
        (ReFL, ReFLSettings(weight=1.0)),
    ],
    ids=["flow_grpo", "diffusion_nft", "awm", "refl"],
)
def test_micro_batches_add_up_to_the_update(plugin, settings):
    """Mean gradient and metrics over micro-batches are those of all rows at once."""
    algorithm, policy = build(plugin, settings), LinearPolicy()
    rollout = roll(policy, algorithm)
    credit = algorithm.credit(scores_of(rollout))
    points = algorithm.points(rollout, credit)
    for name in algorithm.teachers(points, credit):
        points = points.with_velocity(name, 0.5 * points.x_RX)
    ctx = context(policy)
    rows = COUNT * algorithm.rows_per_sample(settings, algorithm.world.sampler)
    assert len(points.sample_R) == rows
    gradients, means = [], []
    for micro_batch in (rows, rows // 4):
        policy.zero_grad()
        totals = Metrics()
        for batch in minibatches(points, credit, rollout, micro_batch=micro_batch):  # fmt: skip
            loss, metrics = algorithm.loss(ctx, batch)
            (loss * micro_batch / rows).backward()
            totals.add(metrics)
        gradients.append(policy.net.weight.grad.clone())
        means.append(totals.as_dict())
    assert gradients[0].abs().max() > 1e-6
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-8)
    assert means[1] == pytest.approx(means[0], rel=1e-4, abs=1e-7)


def test_advantage_settings_reach_the_credit():
    rollout = roll(LinearPolicy(), build(ReFL, ReFLSettings()))
    for plugin, settings in ((FlowGRPO, FlowGRPOSettings), (DiffusionNFT, DiffusionNFTSettings)):
        algorithm = build(plugin, settings(advantage=AdvantageSettings(std="none", scale=10.0)))
        advantage = algorithm.credit(scores_of(rollout)).advantage_B
        expected = [-3.5, -0.5, -0.5, 4.5, 0.5, -2.5, 3.5, -1.5]
        assert advantage.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_table_and_the_seed_are_sent_to_a_device_once():
    world = World(sampler=SamplerSettings(steps=4, train_steps=2), sigmas=sd3_sigmas(4), seed=5)
    table, meta = world.transitions("flow"), torch.device("meta")
    assert world.transitions(["flow"] * 4).table_TK.equal(table.table_TK)
    assert world.transitions("flow") is table and world.transitions("ode") is not table
    assert world.transitions("flow", sd3_sigmas(5)).steps == 5
    assert table.to(meta) is table.to("meta") and table.to(meta).table_TK.device == meta
    assert world.seed_on(meta) is world.seed_on(meta) and world.seed_on(meta).device == meta
    assert world.seed_on(torch.device("cpu")).tolist() == [5]
