"""The transformer block's ops: kernels against the reference in fp64, and against diffusers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.flop_counter import FlopCounterMode

from gardo_kernels import _block_op, _layer_norm
from gardo_kernels._examples import On, op_modules
from gardo_kernels._layer_norm import default_shape
from gardo_kernels.adaln_modulate import adaln_modulate
from gardo_kernels.gated_residual import gated_residual
from gardo_kernels.gelu import gelu
from gardo_kernels.qk_norm_rope import qk_norm_rope
from gardo_kernels.residual_adaln import residual_adaln
from tests import ROOT
from tests.kernels.block_ops import OPS, answer, exact, given, in_tuple
from tests.kernels.launches import recorded
from tests.kernels.row_losses import DEVICE

# numpy's, of NaN and of exp(150), which is infinite in fp32
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
CASES = pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, op in OPS.items() for shape in op.shapes]
)
TWO = pytest.mark.parametrize("shape", OPS["residual_adaln"].shapes)
NAMES = pytest.mark.parametrize("name", OPS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What is stored is rounded once: to half a last place, and the interpreter cuts instead.
STORED = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
# fp32 arithmetic on at most 4096 numbers of order 10, and sums of at most 1000 of order 100.
SUMMED = 2e-6


def check(mine, right, stored, summed=SUMMED):
    assert mine.keys() == right.keys()
    for key, value in right.items():
        assert mine[key].shape == value.shape
        size = float(value.abs().max())
        torch.testing.assert_close(
            mine[key].double(), value, rtol=stored, atol=summed * max(size, 1.0)
        )


@CASES
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_backends_are_the_formula(name, shape, dtype):
    inputs = given(name, shape, dtype)
    for backend in ("triton", "torch"):
        mine = answer(name, inputs, backend=backend)
        assert all(x.dtype == dtype for x in mine.values())
        check(mine, exact(name, inputs, mine), STORED[dtype])


@CASES
def test_what_diffusers_computes_is_the_formula(name, shape):
    inputs = given(name, shape)
    check(answer(name, inputs, OPS[name].eager), exact(name, inputs), 0.0)


@CASES
def test_bf16_is_as_near_diffusers_as_its_roundings_are(name, shape):
    """Half a last place, 2^-9, for ours (a whole one where the interpreter cuts), and for each of
    eager's: after the norm, 1 + scale, the product, the sum, and as many in the gradient."""
    inputs = given(name, shape, torch.bfloat16)
    eager = answer(name, inputs, OPS[name].eager)
    mine = answer(name, inputs, backend="triton")
    for key, value in exact(name, inputs).items():
        off = (mine[key].double() - eager[key].double()).norm()
        assert off <= (2.0**-7 + 4 * 2.0**-9) * value.norm() + 1e-5, key


@NAMES
def test_gradcheck(name):
    shape = {"gelu": (2, 3, 4, 2), "qk_norm_rope": (2, 3, 2, 4)}.get(name, (2, 3, 4))
    inputs = given(name, shape, torch.float64)
    inputs = {key: x.double().requires_grad_(key in OPS[name].trained) for key, x in inputs.items()}

    def call(*values):
        return OPS[name].call(**dict(zip(inputs, values, strict=True)), backend="torch")

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def op_of(name):
    module = op_modules()[name]
    return next(x for x in vars(module).values() if isinstance(x, _block_op.BlockOp))


@NAMES
def test_opcheck(name):
    inputs = given(name, OPS[name].shapes[0])
    trained = OPS[name].trained
    values = {key: x.detach().requires_grad_(key in trained) for key, x in inputs.items()}
    order = {"gated_residual": ("y", "gate", "x"), "gelu": ("x", "before")}.get(name, tuple(values))
    constants = () if name in ("gated_residual", "gelu") else (1e-6,)
    arguments = (*(values.get(key) for key in order), *constants)
    torch.library.opcheck(getattr(torch.ops.gardo, name).default, arguments)


@NAMES
def test_a_compiler_sees_one_graph(name):
    """Forward and backward; the interpreter's kernels stay one opaque op each."""
    inputs = given(name, OPS[name].shapes[0])
    targets = []

    def keep(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(OPS[name].call, fullgraph=True, backend=backend)
    mine = answer(name, inputs, compiled, backend="triton")
    plain = answer(name, inputs, backend="triton")
    assert f"gardo.{name}.default" in targets and f"gardo.{name}_grad.default" in targets
    assert all(torch.equal(mine[key], plain[key]) for key in plain)


OPENED = """
import json, sys
from unittest import mock
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._library.triton import get_triton_kernels_for_op
from gardo_kernels import _launch
from tests.kernels.block_ops import OPS, in_tuple
found = {}
def keep(name):
    def compiler(graph, _):
        found.setdefault(name, []).append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph)
    return compiler
with mock.patch.object(_launch, "kernels_run_on", lambda device: True), FakeTensorMode():
    for name, op in OPS.items():
        taken = {k: x.float().requires_grad_(k in op.trained)
                 for k, x in op.inputs(*op.shapes[0]).items()}
        call = lambda *values: op.call(**dict(zip(taken, values)), backend="triton")
        backend = aot_autograd(fw_compiler=keep(name), bw_compiler=keep(name))
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        sum(out.sum() for out in in_tuple(compiled(*taken.values()))).backward()
in_key = {f"{name}{end}": len(get_triton_kernels_for_op(f"gardo::{name}{end}"))
          for name in OPS for end in ("", "_grad")}
json.dump([found, in_key], sys.stdout)
"""


def test_a_compiler_opens_the_ops_into_their_kernels():
    """Where kernels are compiled: a process of its own, on fake tensors, which launch nothing."""
    path = os.pathsep.join(str(ROOT / folder) for folder in ("engine", "kernels", "."))
    done = subprocess.run(
        [sys.executable, "-c", OPENED], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    graphs, kernels_in_key_of_cache = json.loads(done.stdout)
    assert set(graphs) == set(OPS) and set(kernels_in_key_of_cache.values()) == {1}
    for forward, backward in graphs.values():
        for targets in (forward, backward):
            assert sum("triton_kernel_wrapper" in target for target in targets) == 1
            assert not any(target.startswith("gardo.") for target in targets)


@TWO
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_two_ops_in_one_give_the_bits_of_the_two(shape, dtype, backend, monkeypatch):
    """Laid out alike, whatever a GPU's table has for the one or the other."""
    monkeypatch.setattr(_layer_norm, "launch_shape", lambda *_: default_shape(shape[-1]))
    inputs = given("residual_adaln", shape, dtype)
    x, y, gate, scale, shift = inputs.values()
    z, m = residual_adaln(**inputs, backend=backend)
    assert torch.equal(z, gated_residual(x, y, gate, backend=backend))
    assert torch.equal(m, adaln_modulate(z, scale, shift, backend=backend))


@TWO
@pytest.mark.parametrize("looking_on", [nullcontext, partial(FlopCounterMode, display=False)])
@pytest.mark.parametrize(("used", "leaves"), [("z", "x y gate"), ("m", "x y gate scale shift")])
def test_the_gradients_of_one_result_of_two(shape, looking_on, used, leaves):
    inputs = given("residual_adaln", shape)
    asked = {"trained": leaves.split(), "used": (used,)}
    with looking_on():
        mine = answer("residual_adaln", inputs, backend="triton", **asked)
    check(mine, exact("residual_adaln", inputs, **asked), 0.0)


@CASES
def test_equal_bits_again(name, shape):
    inputs = given(name, shape, torch.bfloat16)
    first, second = (answer(name, inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@NAMES
def test_all_that_is_returned_is_written(name, monkeypatch):
    """Poisoned outputs: what is allocated comes full of NaN."""
    for owner, function in ((torch, "empty_like"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, function)
        monkeypatch.setattr(owner, function, lambda *a, p=plain, **k: p(*a, **k).fill_(torch.nan))
    for shape in OPS[name].shapes:
        found = answer(name, given(name, shape), backend="triton")
        assert not any(x.isnan().any() for x in found.values())


@NAMES
def test_what_is_strided_is_read_as_it_is(name):
    """Tokens of a longer sequence, as the blocks split text from image; the upstream too."""
    inputs = given(name, OPS[name].shapes[1 if name == "qk_norm_rope" else 0])
    wide = {
        key: torch.cat([x, x], 1)[:, x.shape[1] :] if x.ndim > 2 else x for key, x in inputs.items()
    }
    assert not wide["x"].is_contiguous()

    def spread(**taken):
        results = in_tuple(OPS[name].call(**taken))
        return tuple(torch.cat([y, y], 1)[:, : y.shape[1]] for y in results)

    plain = answer(name, inputs, backend="triton")
    mine = answer(name, wide, spread, backend="triton")
    assert all(torch.equal(mine[key], plain[key]) for key in plain)


@NAMES
def test_nan_goes_where_the_formula_has_it(name):
    inputs = given(name, OPS[name].shapes[-2])
    for spoiled in inputs:
        named = {key: x.clone() for key, x in inputs.items()}
        named[spoiled].view(-1)[named[spoiled].numel() // 2] = torch.nan
        mine, right = answer(name, named, backend="triton"), exact(name, named)
        assert any(mine[out].isnan().any() for out in OPS[name].results), spoiled
        for key in right:
            assert torch.equal(mine[key].isnan(), right[key].isnan()), (spoiled, key)


# ---- what is not asked for -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adaln_modulate", "gated_residual", "qk_norm_rope"])
def test_sums_over_tokens_are_made_where_they_are_asked_for(name):
    inputs = given(name, OPS[name].shapes[0])
    op = OPS[name]
    for trained in (op.trained, op.frozen, op.trained[-1:]):
        with recorded() as launches:
            answer(name, inputs, trained=trained, backend="triton")
        backward = launches[-1].arguments
        summed = op.trained[-1] in trained
        assert (backward["sums_ptr"] is not None) == summed
        assert backward["CHUNK"] == 1 or summed
        streamed = {"gated_residual": "y"}.get(name, "x") in trained
        assert (backward["grad_ptr"] is not None) == streamed


def test_a_residual_alone_launches_nothing_backward_and_keeps_nothing_large():
    inputs = given("gated_residual", (2, 5, 24))
    with recorded() as launches:
        found = answer("gated_residual", inputs, trained=("x",), backend="triton")
    assert len(launches) == 1 and found["x"].shape == (2, 5, 24)
    x, y, gate = inputs.values()
    z = gated_residual(x, y.requires_grad_(), gate, backend="triton")
    kept = [t for t in z.grad_fn.saved_tensors if t is not None]
    assert [t.shape for t in kept] == [gate.shape]


@pytest.mark.parametrize("trained", ["x y gate scale shift", "x y", "y", "gate", "shift"])
def test_what_is_asked_for_of_two_ops_in_one(trained):
    """One launch backward whatever it is; y is read and kept for the gate's sum alone."""
    inputs, wanted = given("residual_adaln", (2, 5, 24)), trained.split()
    with recorded() as launches:
        answer("residual_adaln", inputs, trained=wanted, backend="triton")
    forward, backward = (launch.arguments for launch in launches)
    summed = not {"gate", "scale", "shift"}.isdisjoint(wanted)
    pointers = {"grad_x": "x" in wanted, "grad_y": "y" in wanted, "sums": summed,
                "y": "gate" in wanted, "upstream_z": True, "upstream_m": True}  # fmt: skip
    assert {name: backward[f"{name}_ptr"] is not None for name in pointers} == pointers
    assert backward["CHUNK"] == 1 or summed
    assert backward["z_ptr"].data_ptr() == forward["z_ptr"].data_ptr()  # kept as it is


@pytest.mark.parametrize("used", ["z", "m"])
def test_a_result_that_is_not_used_has_no_gradient_to_read(used):
    asked = {"trained": ("x", "y"), "used": (used,)}
    with recorded() as launches:
        answer("residual_adaln", given("residual_adaln", (2, 5, 24)), backend="triton", **asked)
    backward = launches[-1].arguments
    read = [name for name in ("z", "m") if backward[f"upstream_{name}_ptr"] is not None]
    assert len(launches) == 2 and read == [used]


class Dropped(torch.autograd.Function):
    """Passes on what it is given, and no gradient."""

    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(*_):
        return None


@NAMES
def test_no_gradient_comes_of_none(name):
    inputs = given(name, OPS[name].shapes[0])
    x = inputs["x"].requires_grad_()
    with recorded() as launches:
        results = in_tuple(OPS[name].call(**inputs, backend="triton"))
        sum(Dropped.apply(out).sum() for out in results).backward()
    assert x.grad is None and len(launches) == 1


@pytest.mark.parametrize("name", ["adaln_modulate", "residual_adaln", "gelu", "qk_norm_rope"])
def test_a_gradient_of_the_gradient_is_refused(name):
    inputs = given(name, OPS[name].shapes[0])
    x = inputs.pop("x").requires_grad_()
    upstream = torch.ones((), device=DEVICE, requires_grad=True)
    *_, out = in_tuple(OPS[name].call(x, **inputs, backend="triton"))
    (grad,) = torch.autograd.grad((out * upstream).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_the_block_ops_are_imported_by_who_wants_them():
    """Their registration imports Inductor, where kernels are compiled: a second of every start."""
    code = "import sys, gardo_kernels; print('gardo_kernels._block_op' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "kernels")},
    )  # fmt: skip
    assert done.stdout.split() == ["False"]


# ---- refused -------------------------------------------------------------------------------------


def test_bad_inputs():
    x, rows = torch.ones(2, 3, 4), torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"adaln_modulate: x has shape \(2, 4\); pass"):
        adaln_modulate(rows, rows, rows)
    with pytest.raises(ValueError, match=r"scale has shape \(1, 4\); pass .* \(2, 4\)"):
        adaln_modulate(x, rows[:1], rows)
    with pytest.raises(ValueError, match="shift is on meta but x is on cpu"):
        adaln_modulate(x, rows, rows.to("meta"))
    with pytest.raises(ValueError, match="shift has dtype"):
        adaln_modulate(x, rows, rows.long())
    with pytest.raises(ValueError, match="y has shape"):
        gated_residual(x, x[:, :2], rows)
    with pytest.raises(ValueError, match="gate has shape"):
        gated_residual(x, x, rows[:, None])
    with pytest.raises(ValueError, match="residual_adaln: y has shape"):
        residual_adaln(x, x[:, :2], rows, rows, rows)
    with pytest.raises(ValueError, match="residual_adaln: shift has shape"):
        residual_adaln(x, x, rows, rows, rows[:1])
    with pytest.raises(ValueError, match="before has shape"):
        gelu(x, x[:, :2])
    with pytest.raises(ValueError, match="x has dtype"):
        gelu(x.long())
    heads = torch.ones(2, 3, 2, 5)
    with pytest.raises(ValueError, match="pass cos and sin together"):
        qk_norm_rope(heads, cos=torch.ones(3, 5))
    with pytest.raises(ValueError, match="5 elements a head; pass pairs"):
        qk_norm_rope(heads, cos=torch.ones(3, 5), sin=torch.ones(3, 5))
    with pytest.raises(ValueError, match=r"weight has shape \(4,\)"):
        qk_norm_rope(heads, torch.ones(4))
    with pytest.raises(ValueError, match=r"cos has shape \(2, 4\)"):
        qk_norm_rope(heads[..., :4], cos=torch.ones(2, 4), sin=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"x has shape \(2, 3, 4\)"):
        qk_norm_rope(x)
    with pytest.raises(ValueError, match="the kernels work in fp32"):
        gelu(x.double(), backend="triton")


@pytest.mark.gpu
@NAMES
def test_ten_runs_give_equal_bits_on_a_gpu(name):
    module = op_modules()[name]
    where = On("triton", torch.device(DEVICE), torch.bfloat16, rows=1024, elements=3072)
    runs = [[x for _, results in module.examples(where) for x in results] for _ in range(10)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
