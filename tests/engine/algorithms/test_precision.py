"""Losses of a bf16 model: its velocities are rounded, the arithmetic on them is fp32."""

import dataclasses
import re
import sys

import pytest
import torch

from gardo import plugins
from gardo.algorithms.mix_grpo import Progressive
from tests import ROOT
from tests.engine.algorithms.linear_policy import LinearPolicy, build, roll, scores_of, whole

PAGE = (ROOT / "docs/algorithms.md").read_text()
ALGORITHMS = {  # settings, sampler
    "flow_grpo": ({"beta": 0.5, "clip_range": 0.9}, {}),
    "flow_grpo_fast": ({"beta": 0.5, "clip_range": 0.9}, {"steps": 6, "train_steps": 2}),
    "mix_grpo": ({"window": Progressive(iterations=1), "clip_range": 0.9}, {"steps": 6}),
    "dance_grpo": ({"clip_range": 0.9}, {"steps": 8, "sde": "dance"}),
    "grpo_guard": ({"beta": 0.5, "clip_range": 0.9}, {}),
    "ddpo": ({"beta": 0.5}, {}),
    "diffusion_nft": ({"beta": 0.5}, {}),
    "awm": ({"beta": 0.5, "clip_range": 5.0}, {"steps": 8}),
    "refl": ({"weight": 1.0}, {}),
    "weighted:Weighted": ({"name": "weighted:Weighted"}, {}),  # of docs/algorithms.md
}


class Told:
    """A context with these velocities, whose reward is some smooth function of them."""

    def __init__(self, velocity_RX):
        self.velocity_RX = velocity_RX

    def velocity(self, batch):
        return self.velocity_RX

    def decode(self, latents):
        return latents.tanh()

    def score(self, images, batch):
        return images.flatten(1).mean(1)


@pytest.fixture
def weighted(tmp_path, monkeypatch):
    """The documented algorithm, importable."""
    (tmp_path / "weighted.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("weighted", None)


def test_every_algorithm_is_here():
    ours = {name for name in ALGORITHMS if ":" not in name}
    assert ours | {"gardo"} == set(plugins.names("gardo.algorithms"))  # gardo's loss is its base's


@pytest.mark.parametrize("name", ALGORITHMS)
def test_arithmetic_is_fp32(name, weighted):
    own, sampler = ALGORITHMS[name]
    plugin = plugins.resolve("gardo.algorithms", name)
    algorithm = build(plugin, plugin.Settings(**own), **sampler)
    rollout = roll(LinearPolicy(), algorithm)
    credit = algorithm.credit(scores_of(rollout))
    points = algorithm.points(rollout, credit)
    draw = torch.Generator().manual_seed(5)

    def some():
        return torch.randn(points.x_RX.shape, generator=draw)

    velocities = {**points.velocities, "reference": some(), "old": some(), "ema": some()}
    trained = points.velocities.get("rollout", some()) + some()
    seen = []
    for dtype in (torch.bfloat16, torch.float32):  # the same values, rounded to bf16
        told = {n: v.bfloat16().to(dtype) for n, v in velocities.items()}
        batch = whole(dataclasses.replace(points, velocities=told), credit, rollout)
        velocity_RX = trained.bfloat16().to(dtype).requires_grad_()
        loss, metrics = algorithm.loss(Told(velocity_RX), batch)
        loss.backward()
        assert loss.dtype == torch.float32
        seen.append((loss.item(), metrics.as_dict(), velocity_RX.grad))
    (loss, metrics, grad), (loss_32, metrics_32, grad_32) = seen
    assert loss == pytest.approx(loss_32, rel=1e-6)
    assert metrics == pytest.approx(metrics_32, rel=1e-6)
    assert grad_32.abs().max() > 1e-6
    assert torch.equal(grad, grad_32.bfloat16())
