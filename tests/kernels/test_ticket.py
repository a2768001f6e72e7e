"""The ticket by which the last program of a loss knows itself, and the counter it is drawn from."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from gardo_kernels import _launch, _row_loss, policy_loss
from gardo_kernels._examples import On, op_modules
from gardo_kernels._launch import ticket
from gardo_kernels._launch_shape import LaunchShape, capability, size_class, trying
from tests.kernels.policy_problem import CLIP, of_kernels
from tests.kernels.row_losses import DEVICE, on_device

LOSSES = pytest.mark.parametrize("name", ["awm_loss", "nft_loss", "policy_loss"])
HERE = On("triton", torch.device(DEVICE), rows=3, elements=100)
INTERPRETED = pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's order of programs")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(_row_loss, "TILE", 8)


def results_of(name: str, on: On = HERE) -> list[torch.Tensor]:
    """Of the op's examples, in 21 programs, of which the last takes several turns."""
    shape = LaunchShape(block=16, chunk=16, rows=2)
    key = (name, capability(on.device), size_class(on.rows, on.elements))
    with trying(key, shape):
        return [result for _, results in op_modules()[name].examples(on) for result in results]


def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


@INTERPRETED
@LOSSES
@pytest.mark.parametrize("stride", [-1, 10])
def test_the_order_of_programs_is_in_no_bit(name, stride, monkeypatch):
    """Backwards, and by leaps: another program is then the last."""
    expected, plain = results_of(name), InterpreterBuilder.set_grid_idx

    def elsewhere(builder, x, y, z):
        plain(builder, stride * x % builder.grid_dim[0], y, z)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", elsewhere)
    assert same(results_of(name), expected)


def test_one_counter_serves_call_after_call_and_is_left_at_0(monkeypatch):
    """Of all losses, in grids of several sizes, as on a stream."""
    small = On("triton", HERE.device, rows=2, elements=40)
    calls = [(name, on) for on in (small, HERE) for name in ("awm_loss", "nft_loss", "policy_loss")]
    expected = [results_of(*call) for call in calls]
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(_row_loss, "ticket", lambda device: counter)
    for call, results in zip(calls, expected, strict=True):
        assert same(results_of(*call), results)
        assert counter.tolist() == [0]


@INTERPRETED
@LOSSES
def test_a_call_after_one_that_failed_is_right(name, monkeypatch):
    expected, plain = results_of(name), InterpreterBuilder.set_grid_idx

    def failing(builder, x, y, z):
        if x == 7:
            raise KeyboardInterrupt
        plain(builder, x, y, z)

    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "set_grid_idx", failing)
        with pytest.raises(KeyboardInterrupt):
            results_of(name)
    assert same(results_of(name), expected)


# ---- whose the counter is ------------------------------------------------------------------------

GPU = torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    """What a GPU says of its stream, on any machine; its tensors lie here."""
    says = SimpleNamespace(stream=0, capturing=False, made=[], waited=0)

    def zeros(*size, dtype, device):
        assert device in (GPU, GPU.index)
        says.made.append(size)
        return plain(*size, dtype=dtype)

    def stream():
        def synchronize():
            says.waited += 1

        return SimpleNamespace(cuda_stream=says.stream, synchronize=synchronize)

    plain = torch.zeros
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: GPU.index)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: says.capturing)
    monkeypatch.setattr(_launch, "TICKETS", 4)
    caches = (_launch._ticket_of_stream, _launch._unused_tickets)
    for cache in caches:
        cache.cache_clear()
    yield says
    for cache in caches:
        cache.cache_clear()


def places(count: int) -> list[int]:
    return [ticket(GPU).data_ptr() for _ in range(count)]


def test_a_stream_has_one_counter_and_no_other_has_it(gpu):
    first = places(3)
    gpu.stream = 77
    second = places(2)
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]
    gpu.stream = 0
    assert places(1) == first[:1]
    assert gpu.made == [(4, 4)] and gpu.waited == 1  # once, and other streams find it at 0
    assert ticket(GPU).dtype == torch.int32 and not any(place % 16 for place in first + second)


def test_every_launch_of_a_graph_has_its_own_counter(gpu):
    eager = places(1)
    gpu.capturing = True
    captured = [ticket(GPU) for _ in range(5)]
    assert len({x.data_ptr() for x in captured} | set(eager)) == 6
    assert gpu.made == [(4, 4), (1,), (1,)]  # past the last of them, a memset in the graph
    gpu.capturing, gpu.stream = False, 5
    assert places(1)[0] not in [x.data_ptr() for x in captured] and gpu.made[3:] == [(4, 4)]


def test_what_a_graph_allocates_is_not_kept(gpu):
    gpu.capturing = True
    captured = [ticket(GPU) for _ in range(2)]
    gpu.capturing = False
    assert gpu.made == [(1,), (1,)] and places(1)[0] not in [x.data_ptr() for x in captured]


@pytest.mark.gpu
def test_streams_and_a_graph_at_the_same_time_give_the_same_bits():
    (v, v_old, u), options = of_kernels(rows=16, dtype=torch.float32, shape=(64, 256))
    inputs = on_device(v, v_old, u)
    rows = {name: x.to(DEVICE) for name, x in options.items()}

    def call():
        return list(vars(policy_loss(*inputs, **rows, **CLIP, backend="triton")).values())

    expected, graph, found = call(), torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        captured = [call(), call()]
    first, second, third = (torch.cuda.Stream() for _ in range(3))
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(first):
            graph.replay()
        for stream in (second, third):
            with torch.cuda.stream(stream):
                found.append(call())
    torch.cuda.synchronize()
    assert all(same(some, expected) for some in found + captured)
