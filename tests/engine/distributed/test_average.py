"""The average of the weights against its formula."""

from __future__ import annotations

import pytest
import torch

from gardo.distributed.average import AVERAGE, Average, AverageSettings
from tests.engine.distributed.test_slots import batches, engine_for, loss_of, network, weights


@pytest.mark.parametrize("decay", [0.9, 0.15])
def test_every_few_steps_it_follows_the_weights(decay):
    """Slowly at last, faster at first: d = min(decay, (1 + n) / (10 + n))."""
    model = network()
    engine = engine_for(model)
    slots = engine.make_slots((AVERAGE,))
    average, (x, y) = Average(AverageSettings(decay=decay, every=3)), batches()
    expected = weights(model)
    for n in range(1, 11):
        engine.backward(loss_of(model, x, y), last=True)
        assert engine.step()
        average.after_update(slots)
        if n == 6:  # a resume in between changes nothing
            state = average.state_dict()
            average = Average(average.settings)
            average.load_state_dict(state)
        if n % 3 == 0:
            rate = min(decay, (1 + n) / (10 + n))
            live = weights(model)
            expected = [rate * e + (1 - rate) * w for e, w in zip(expected, live, strict=True)]
        for slot, wanted in zip(slots.pieces(AVERAGE), expected, strict=True):
            torch.testing.assert_close(slot, wanted, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(expected[0], weights(model)[0], atol=1e-3)
