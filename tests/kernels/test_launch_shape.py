"""The table of launch shapes: what is looked up, what the file holds, what a shape changes."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gardo_kernels import _launch_shape, _row_loss, policy_loss
from gardo_kernels._examples import On, op_modules
from gardo_kernels._launch_shape import (
    FILE,
    LaunchShape,
    capability,
    launch_shape,
    measured_shapes,
    read_shapes,
    size_class,
    trying,
    write_shapes,
)
from tests.kernels.launches import recorded
from tests.kernels.row_losses import DEVICE

HERE = torch.device(DEVICE)


@pytest.mark.parametrize(
    ("rows", "elements", "up_to"),
    [(1, 1, 1), (1, 2, 4), (1, 4, 4), (1, 5, 16), (3, 65536, 4**9), (1, 65536, 4**8),
     (64, 262144, 4**12), (2**31, 2**31, 4**31)],
)  # fmt: skip
def test_sizes_are_rounded_up_to_a_power_of_four(rows, elements, up_to):
    assert size_class(rows, elements) == up_to


def test_the_file_is_what_it_says_and_every_shape_is_of_an_op():
    table = json.loads(FILE.read_text(encoding="utf-8"))
    shapes = read_shapes(table)
    assert shapes == measured_shapes()
    assert not (shapes and "nothing yet" in table["measured"])
    assert {op for op, *_ in shapes} <= {*op_modules(), "gram_tiles"}


def test_what_is_written_is_read_again():
    shapes = {
        ("policy_loss", "9.0", 4**9): LaunchShape(2048, 8192, 64, 8, 2),
        ("sde_step", "10.0", 4**12): LaunchShape(block=512, warps=2),
    }
    text = write_shapes(shapes, "one GPU")
    assert read_shapes(json.loads(text)) == shapes and json.loads(text)["measured"] == "one GPU"
    assert text.count("\n") == 7
    assert write_shapes({}, "nothing") == '{\n "measured": "nothing",\n "shapes": []\n}\n'


@pytest.mark.parametrize("field", ["op", "up_to", "warps"])
def test_a_row_that_lacks_a_field_is_refused(field):
    table = json.loads(write_shapes({("sde_step", "9.0", 4): LaunchShape()}, "here"))
    del table["shapes"][0][field]
    with pytest.raises(KeyError, match=field):
        read_shapes(table)
    table = {"shapes": [{"op": "x", "capability": "9.0", "up_to": 4, "wraps": 3}]}
    with pytest.raises(KeyError, match="block, chunk, rows, stages, warps"):
        read_shapes(table)


def test_the_table_is_asked_by_op_capability_and_size(monkeypatch):
    other, default = LaunchShape(block=256, warps=2), LaunchShape(block=64)
    with trying(("op", capability(HERE), 4**5), other):
        assert launch_shape("op", 4, 256, HERE) == launch_shape("op", 2, 150, HERE) == other
        for op, rows, elements in (("po", 4, 256), ("op", 4, 257), ("op", 1, 256)):
            assert launch_shape(op, rows, elements, HERE) == LaunchShape()
            assert launch_shape(op, rows, elements, HERE, default) == default
        monkeypatch.setattr(_launch_shape, "capability", lambda device: "9.9")
        assert launch_shape("op", 4, 256, HERE) == LaunchShape()
    assert launch_shape("op", 4, 256, HERE) == LaunchShape()


def test_a_gpu_is_asked_for_its_capability_once(monkeypatch):
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: asked.append(index) or (9, index)
    )
    _launch_shape._capability.cache_clear()
    try:
        found = [capability(torch.device("cuda", i)) for i in (0, 3, 0, 3)]
    finally:
        _launch_shape._capability.cache_clear()
    assert found == ["9.0", "9.3", "9.0", "9.3"] and asked == [0, 3]


GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("rows", "elements", "chunk", "step"),
    [(1, 100, 1024, 1024), (3, 65536, 1024, 1024), (8, 65536, 1024, 2048), (9, 65536, 4096, 2048),
     (64, 262144, 4096, 2048)],
)  # fmt: skip
def test_programs_are_made_smaller_where_multiprocessors_would_idle(
    monkeypatch, rows, elements, chunk, step
):
    """On 132 of them: 8 rows of 16 chunks are 128 programs; on a CPU nothing idles."""
    monkeypatch.setattr(_launch_shape, "_multiprocessors", lambda index: 132)
    of_step = import_module("gardo_kernels.sde_step").default_shape
    assert _row_loss.default_shape(rows, elements, GPU).chunk == chunk
    assert of_step(rows, elements, GPU).block == step
    assert of_step(rows, elements, GPU, guided=True).block == 1024
    assert _row_loss.default_shape(rows, elements, torch.device("cpu")).chunk == 4096


def test_a_chunk_of_one_block_gives_the_same_numbers():
    module, where = op_modules()["policy_loss"], On("triton", HERE)
    expected = [results for _, results in module.examples(where)]
    key = ("policy_loss", capability(HERE), size_class(where.rows, where.elements))
    with trying(key, _row_loss.UNCHUNKED):
        with recorded() as launches:
            next(module.examples(where))
        found = [results for _, results in module.examples(where)]
    assert launches[0].arguments["CHUNK"] == launches[0].arguments["BLOCK"] == 1024
    assert launches[0].grid == (2 * where.rows,)
    for before, after in zip(expected, found, strict=True):
        for x, y in zip(before, after, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)


WHOLE_ROWS = ("adaln_modulate", "residual_adaln")  # a program's block is what holds a row
OTHER = LaunchShape(block=256, chunk=512, rows=2, warps=2, stages=1)


@pytest.mark.parametrize("name", op_modules())
def test_every_op_takes_the_tables_shape(name):
    """And gives its numbers by it: the example again, in another layout of programs."""
    module, where = op_modules()[name], On("triton", HERE)
    shape = OTHER._replace(chunk=16, rows=4, block=32) if name == "nearest_cosine" else OTHER
    expected = [results for _, results in module.examples(where)]
    key = (name, capability(HERE), size_class(where.rows, where.elements))
    with trying(key, shape):
        with recorded() as launches:
            next(module.examples(where))
        found = [results for _, results in module.examples(where)]
    taken = [launch.arguments for launch in launches]
    if name not in WHOLE_ROWS:
        assert shape.block in [of.get("BLOCK") for of in taken]
    assert shape.warps in [of["num_warps"] for of in taken]
    for before, after in zip(expected, found, strict=True):
        for x, y in zip(before, after, strict=True):
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_fake_tensors_need_no_shape(monkeypatch):
    """The choice is made where a kernel is launched, which a tracing compiler does not do."""
    monkeypatch.setattr(_row_loss, "launch_shape", None)
    monkeypatch.setattr(import_module("gardo_kernels.sde_step"), "launch_shape", None)
    with FakeTensorMode():
        x, rows = torch.empty(2, 40, device=DEVICE), torch.empty(2, device=DEVICE)
        loss = policy_loss(x, x, x, advantage=rows, h=rows, B=rows, backend="triton").loss
        step = torch.ops.gardo.sde_step(
            x, x, None, None, torch.empty(3, 6, device=DEVICE), rows.long(), None, None, 1.0,
            torch.bfloat16, True, False, True,
        )  # fmt: skip
    assert loss.shape == () and step[0].shape == step[3].shape == (2, 40)
    assert step[4].shape == (0,) and step[5].shape == (2,)
