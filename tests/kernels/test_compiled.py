"""The machine code of every kernel, compiled here for GPUs that are not here.

Kernels are those that the ops' examples launch; one that no table below names has the usual limits.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
from packaging.version import Version

from gardo_kernels._examples import op_modules
from tests import ROOT

# Instructions an element at most: what a memory-bound kernel can afford. Up to 4 of them are the
# division by which a program finds its row, once for eight elements a thread.
USUAL, USUAL_REGISTERS = 64, 64
GATED = pytest.mark.skipif(
    Version(triton.__version__) < Version("3.7"), reason="the limits are of Triton 3.7's code"
)
BUDGET = {
    "philox_random_bits": 40,
    "philox_random_uniform": 40,
    "sde_step_fwd_bf16": 52,
    "sde_step_fwd_fp32": 48,
    "sde_step_fwd_guided_bf16": 92,
    "sde_step_fwd_guided_fp32": 80,
    "awm_loss_fwd_fp32": 60,
    "awm_loss_bwd_bf16": 28,
    "awm_loss_bwd_fp32": 24,
    "policy_loss_fwd_bf16": 44,
    "policy_loss_fwd_fp32": 40,
    "policy_loss_fwd_plain_bf16": 44,
    "policy_loss_fwd_plain_fp32": 40,
    "policy_loss_bwd_bf16": 28,
    "policy_loss_bwd_fp32": 24,
    "nft_loss_fwd_bf16": 68,
    "nft_loss_fwd_fp32": 60,
    "nft_loss_bwd_bf16": 36,
    "nft_loss_bwd_fp32": 28,
    "residual_adaln_bwd_bf16": 68,  # three sums of columns, made and stored around the loop
    # of each of 64 pairs of rows; few turns of a short loop, behind one for the lengths
    "nearest_cosine_chords_bf16": 20,
    "nearest_cosine_chords_fp32": 36,
    "nearest_cosine_gram_squares_one_group": 1,
    "nearest_cosine_gram_tiles_one_group": 3,
}
REGISTERS = {  # where 64 are not enough
    # five running sums of eight elements a thread: 20 warps stay on a multiprocessor, or 24
    "nft_loss_fwd_bf16": 96,
    "nft_loss_fwd_fp32": 96,
    "awm_loss_fwd_bf16": 80,
    "awm_loss_fwd_fp32": 96,
    "sde_step_fwd_bf16": 80,  # sixteen elements a thread, loaded at once: 24 warps stay
    "sde_step_fwd_guided_bf16": 80,  # four inputs and five outputs: 24 warps stay
    # whole rows in registers, squared: few programs, once an iteration
    "nearest_cosine_normalise_one_group_bf16": 80,
    # tiles of sums in registers; of chords, three programs stay on a multiprocessor
    "nearest_cosine_chords_bf16": 168,
    "nearest_cosine_chords_fp32": 168,
    # the sums of columns too, which full fine-tuning asks for
    "adaln_modulate_bwd_bf16": 80,
    "qk_norm_rope_bwd_fp32": 80,
    "residual_adaln_bwd_bf16": 104,  # three of them: of Flux's width one program stays, as of two
    "residual_adaln_bwd_fp32": 112,
    "nearest_cosine_gram_squares_one_group": 168,
    "nearest_cosine_gram_tiles_one_group": 168,
}
OPS = tuple(op_modules())
LOSSES = ("awm_loss", "nft_loss", "policy_loss")
FEW = ("_means",)  # one value a row: few programs, far from any limit
KEPT_BY_SUMS = ("chords", "means", "tiles")  # NaN, beside minima that drop it

Codes = list[dict[str, Any]]


def compile_all(*arguments: str, kernels: Path = ROOT / "kernels") -> Codes:
    path = os.pathsep.join([str(kernels), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def codes() -> Codes:
    return compile_all()


def lean(code: dict[str, Any]) -> bool:
    """What touches every element: wide accesses; few registers, few instructions."""
    name = code["name"]
    return (
        code["wide"] > 0
        and 0 < code["registers"] <= REGISTERS.get(name, USUAL_REGISTERS)
        and 0 < code["per_element"] <= BUDGET.get(name, USUAL)
    )


def clean(code: dict[str, Any]) -> bool:
    """One atomic where the last program of a loss is told, drawn by the thread that stored the sums
    and of an integer, so that its order is in no result; else none."""
    draws = int(code["op"] in LOSSES and "_fwd" in code["name"])
    return (
        code["stack"] == code["spills"] == code["doubles"] == 0
        and code["atomics"] == code["tickets"] == draws
    )


def test_every_kernel_is_compiled_for_both_architectures(codes: Codes) -> None:
    compiled = {(c["name"], c["architecture"]) for c in codes}
    assert {c["op"] for c in codes} == set(OPS)
    assert compiled == {(name, sm) for name, _ in compiled for sm in (90, 100)}
    for table in (BUDGET, REGISTERS):
        assert set(table) <= {name for name, _ in compiled}, "a limit of no kernel"


@GATED
@pytest.mark.parametrize("op", OPS)
def test_no_stack_spills_doubles_or_atomics_but_tickets(codes: Codes, op: str) -> None:
    assert not [code for code in codes if code["op"] == op and not clean(code)]


def test_no_minimum_drops_nan(codes: Codes) -> None:
    """But among distances, where sums beside the minima keep it."""
    drops = {code["name"] for code in codes if code["drops"]}
    kept = {n for n in drops if n.startswith("nearest_") and any(k in n for k in KEPT_BY_SUMS)}
    assert drops == kept


@GATED
@pytest.mark.parametrize("op", OPS)
def test_what_touches_every_element_is_lean(codes: Codes, op: str) -> None:
    touching = [c for c in codes if c["op"] == op and not c["name"].endswith(FEW)]
    assert touching and not [code for code in touching if not lean(code)]


@GATED
@pytest.mark.parametrize("rows", [1, 64])
def test_a_loss_is_as_lean_with_any_rows(rows: int) -> None:
    """By which the tile is laid that its last program loads; the examples have 4."""
    codes = compile_all("--rows", str(rows), *LOSSES)
    assert {code["op"] for code in codes} == set(LOSSES)
    assert not [code for code in codes if not (lean(code) and clean(code))]


# ---- an op is one new file -----------------------------------------------------------------------

TWICE = '''"""y = 2 x."""

import torch
import triton
import triton.language as tl

from gardo_kernels._launch import choose_backend, grid_of_rows, launch
from gardo_kernels._launch_shape import launch_shape


@triton.jit
def _twice_fwd_kernel(x_ptr, y_ptr, elements, BLOCK: tl.constexpr):
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + element, mask=element < elements)
    tl.store(y_ptr + element, 2 * x, mask=element < elements)


def twice(x, backend="auto"):
    if choose_backend("twice", backend, x) == "torch":
        return 2 * x
    y, count = torch.empty_like(x), x.numel()
    shape = launch_shape("twice", 1, count, x.device)
    launch(
        _twice_fwd_kernel, grid_of_rows(1, count, shape.block), shape, x_ptr=x, y_ptr=y,
        elements=count, BLOCK=shape.block,
    )
    return y


def examples(on):
    (x,) = on.samples(1)
    yield "", [twice(x, on.backend)]
'''


@pytest.fixture(scope="module")
def with_one_more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of kernels/ with one file more."""
    folder = tmp_path_factory.mktemp("checkout") / "kernels"
    shutil.copytree(ROOT / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "gardo_kernels" / "twice.py").write_text(TWICE)
    return folder


def test_the_gates_find_a_new_op(with_one_more: Path) -> None:
    codes = compile_all("twice", kernels=with_one_more)
    assert {code["name"] for code in codes} == {"twice_fwd_bf16", "twice_fwd_fp32"}
    assert all(lean(code) and clean(code) for code in codes)


def test_the_doctor_finds_a_new_op(with_one_more: Path) -> None:
    code = """
from gardo.doctor.machine import examine
from gardo_kernels import _examples
found = _examples.op_modules()
_examples.op_modules = lambda: {"twice": found["twice"]}  # of all of them it takes its time
print([f.detail for f in examine("triton") if f.name == "kernel twice"])"""
    path = os.pathsep.join([str(ROOT / "engine"), str(with_one_more)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.stdout == "['triton, off plain torch by 0.0e+00']\n", done.stderr


@pytest.mark.parametrize("name", [f.stem for f in (ROOT / "kernels/gardo_kernels").glob("*.py")])
def test_what_has_kernels_has_examples(name: str) -> None:
    source = (ROOT / "kernels" / "gardo_kernels" / f"{name}.py").read_text(encoding="utf-8")
    assert name.startswith("_") or "@triton.jit" not in source or name in OPS
