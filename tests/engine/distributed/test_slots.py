"""Copies of the weights and the local engine's gradient step."""

import pytest
import torch
from torch import nn

from gardo.distributed.local import LocalEngine
from gardo.distributed.optimizers import OptimizerSettings

# A large eps keeps Adam's step from being a sign: it then depends on the size of the gradient.
OPTIMIZER = OptimizerSettings(lr=0.1, eps=1.0)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def engine_for(model, *, accumulation=1, max_grad_norm=1e9, optimizer=OPTIMIZER):
    return LocalEngine(
        dict(model.named_parameters()),
        optimizer=optimizer,
        accumulation=accumulation,
        max_grad_norm=max_grad_norm,
        device=torch.device("cpu"),
    )


def weights(model):
    """As slots hold them: flat, one a parameter."""
    return [p.detach().flatten().clone() for p in model.parameters()]


def fill(model, value):
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def equal_bits(actual, expected):
    pairs = zip(actual, expected, strict=True)
    return all(
        torch.equal(a.detach().flatten().view(torch.int32), b.view(torch.int32)) for a, b in pairs
    )


def batches(seed=1, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)
    return x * scale, y


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def test_a_slot_is_used_and_the_live_weights_come_back_to_the_bit():
    model = network()
    slots = engine_for(model).make_slots(("old", "reference"))
    start = weights(model)
    with torch.no_grad():
        first = next(iter(model.parameters()))
        first.view(-1)[:4] = torch.tensor([-0.0, 1e-45, torch.nan, -torch.inf])
    live = weights(model)
    x, _ = batches()
    with slots.use("old"):
        assert slots.exchanged == "old"
        assert equal_bits(model.parameters(), start)
        assert model(x).isfinite().all()
        assert torch.is_grad_enabled(), "the slot decides about weights only"
    assert slots.exchanged is None
    assert equal_bits(model.parameters(), live)
    assert not model(x).isfinite().all()
    assert equal_bits(slots.pieces("old"), start)
    assert equal_bits(slots.pieces("reference"), start)


def test_an_error_inside_brings_the_live_weights_back():
    model = network()
    slots = engine_for(model).make_slots(("old",))
    fill(model, 0.25)
    live = weights(model)
    with pytest.raises(ZeroDivisionError), slots.use("old"):
        _ = 1 / 0
    assert equal_bits(model.parameters(), live)
    with slots.use("old"):
        pass


def test_slots_do_not_nest():
    slots = engine_for(network()).make_slots(("old", "reference"))
    for inner in ("reference", "old", "train"):
        with slots.use("old"):
            with pytest.raises(RuntimeError, match="'old' is in use"), slots.use(inner):
                pass
            assert slots.exchanged == "old"


def test_the_live_weights_are_the_slot_train():
    model = network()
    slots = engine_for(model).make_slots(("old",))
    fill(model, 3.0)
    with slots.use("train"):
        assert slots.exchanged is None
        assert all((p == 3).all() for p in model.parameters())
    with pytest.raises(ValueError, match="train"):
        engine_for(model).make_slots(("train",))


def test_unknown_slots_are_named():
    slots = engine_for(network()).make_slots(("old",))
    with pytest.raises(KeyError, match=r"'reference'.*the slots are old"):
        slots.copy("train", to="reference")
    with pytest.raises(KeyError), slots.use("reference"):
        pass
    assert slots.names == ("old",)


def test_copies_are_independent():
    model = network()
    slots = engine_for(model).make_slots(("old", "reference"))
    start = weights(model)
    fill(model, 0.5)
    slots.copy("train", to="reference")
    fill(model, 0.75)
    assert all((p == 0.5).all() for p in slots.pieces("reference"))
    assert equal_bits(slots.pieces("old"), start)
    slots.copy("reference", to="old")
    slots.decay("reference", 0.0)
    assert all((p == 0.5).all() for p in slots.pieces("old"))
    assert all((p == 0.75).all() for p in slots.pieces("reference"))
    assert all((p == 0.75).all() for p in model.parameters())


@pytest.mark.parametrize("rate", [0.0, 0.003, 0.5, 0.9, 1.0])
def test_decay_is_a_moving_average(rate):
    model = network()
    slots = engine_for(model).make_slots(("old",))
    before = [p.clone() for p in slots.pieces("old")]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(-2).add_(1)
    live = weights(model)
    slots.decay("old", rate)
    for slot, old, new in zip(slots.pieces("old"), before, live, strict=True):
        expected = rate * old.double() + (1 - rate) * new.double()
        torch.testing.assert_close(slot.double(), expected, rtol=1e-6, atol=1e-6)
    assert equal_bits(model.parameters(), live)
    if rate == 0:
        assert equal_bits(slots.pieces("old"), live)
    if rate == 1:
        assert equal_bits(slots.pieces("old"), before)


def test_no_step_while_exchanged():
    model = network()
    engine = engine_for(model, accumulation=2)
    slots = engine.make_slots(("old",))
    live = weights(model)
    engine.backward(loss_of(model, *batches()), last=False)
    assert not engine.step()
    engine.backward(loss_of(model, *batches()), last=True)
    with slots.use("old"), pytest.raises(RuntimeError, match="'old' is in use"):
        engine.step()
    assert equal_bits(model.parameters(), live)
    assert engine.step()
    assert not equal_bits(model.parameters(), live)


def test_accumulation_equals_one_big_batch():
    whole, pieces = network(), network()
    one, four = engine_for(whole), engine_for(pieces, accumulation=4)
    for seed in range(3):
        x, y = batches(seed)
        one.backward(loss_of(whole, x, y), last=True)
        assert one.step()
        ended = []
        for n, (part_x, part_y) in enumerate(zip(x.split(2), y.split(2), strict=True)):
            four.backward(loss_of(pieces, part_x, part_y), last=n == 3)
            ended.append(four.step())
        assert ended == [False, False, False, True]
        assert four.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
        torch.testing.assert_close(weights(pieces), weights(whole), rtol=1e-5, atol=1e-7)
    assert not equal_bits(weights(whole), weights(network()))


@pytest.mark.parametrize("max_grad_norm", [0.05, 1e9])
def test_step_is_torch_clipping_and_adamw(max_grad_norm):
    ours, theirs = network(), network()
    optimizer = OptimizerSettings(
        lr=0.05, eps=0.5, weight_decay=0.1, betas=(0.8, 0.9)
    )  # all unlike torch's defaults
    engine = engine_for(ours, max_grad_norm=max_grad_norm, optimizer=optimizer)
    adamw = torch.optim.AdamW(
        theirs.parameters(), lr=0.05, eps=0.5, weight_decay=0.1, betas=(0.8, 0.9)
    )
    for seed in range(3):
        x, y = batches(seed, scale=1 + seed)
        engine.backward(loss_of(ours, x, y), last=True)
        assert engine.step()
        adamw.zero_grad()
        loss_of(theirs, x, y).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
        adamw.step()
        assert engine.grad_norm == pytest.approx(norm.item(), rel=1e-6), "the norm before clipping"
        assert engine.grad_norm > 0.05, "nothing was clipped"
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-6, atol=1e-7)
    assert all(p.grad is None or not p.grad.any() for p in ours.parameters())
