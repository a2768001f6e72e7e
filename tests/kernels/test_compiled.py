"""The machine code of every kernel, compiled here for GPUs that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests import ROOT

# Instructions an element at most: what a memory-bound kernel can afford. Up to 4 of them are the
# division by which a program finds its row, once for eight elements a thread.
BUDGET = {
    "random_bits": 40,
    "random_uniform": 40,
    "random_normal": 64,
    "sde_step_bf16": 64,
    "sde_step_fp32": 56,
    "sde_step_guided_bf16": 92,
    "awm_loss_sums_bf16": 64,
    "awm_loss_sums_fp32": 56,
    "awm_loss_bwd_bf16": 28,
    "awm_loss_bwd_fp32": 24,
    "policy_loss_sums_bf16": 40,
    "policy_loss_sums_fp32": 40,
    "policy_loss_bwd_bf16": 28,
    "policy_loss_bwd_fp32": 24,
    "nft_loss_sums_bf16": 64,
    "nft_loss_sums_fp32": 56,
    "nft_loss_bwd_bf16": 36,
    "nft_loss_bwd_fp32": 28,
    "nearest_cosine_normalise_bf16": 72,
    "nearest_cosine_normalise_fp32": 72,
    "nearest_cosine_chords": 12,  # of each of 64 pairs of rows; 2.7 within the loop
    "nearest_cosine_squares": 1,
    "nearest_cosine_tiles": 3,
}
REGISTERS = {  # where 64 are not enough
    # five running sums of eight elements a thread: 20 warps stay on a multiprocessor
    "nft_loss_sums_bf16": 96,
    "nft_loss_sums_fp32": 96,
    "awm_loss_sums_bf16": 96,
    "awm_loss_sums_fp32": 96,
    "sde_step_guided_bf16": 80,  # four inputs and five outputs: 24 warps stay
    # whole rows in registers, scaled, squared and written: few programs, once an iteration
    "nearest_cosine_normalise_bf16": 112,
    "nearest_cosine_normalise_fp32": 112,
    # tiles of sums in registers; one warp a program, or tensor cores that wait for memory
    "nearest_cosine_chords": 168,
    "nearest_cosine_squares": 168,
    "nearest_cosine_tiles": 168,
}


# one value a row: few programs, far from any limit
FEW = ("policy_loss_rows", "policy_loss_rows_plain", "nft_loss_rows", "awm_loss_rows",
       "nearest_cosine_means")  # fmt: skip
KEPT_BY_SUMS = ("normalise_bf16", "normalise_fp32", "chords", "means", "tiles")


@pytest.fixture(scope="module")
def codes() -> list[dict[str, Any]]:
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_kernel_is_compiled_for_both_architectures(codes: list[dict[str, Any]]) -> None:
    assert {(c["name"], c["architecture"]) for c in codes} == {
        (name, architecture) for name in (*BUDGET, *FEW) for architecture in (90, 100)
    }


@pytest.mark.parametrize("name", (*BUDGET, *FEW))
def test_no_stack_spills_doubles_or_atomics(codes: list[dict[str, Any]], name: str) -> None:
    for code in codes:
        if code["name"] == name:
            assert code["stack"] == code["spills"] == 0, code
            assert code["doubles"] == code["atomics"] == 0, code


def test_no_minimum_drops_nan(codes: list[dict[str, Any]]) -> None:
    """But among distances, where sums beside the minima keep it."""
    drops = {code["name"] for code in codes if code["drops"]}
    assert drops <= {f"nearest_cosine_{name}" for name in KEPT_BY_SUMS}, drops


@pytest.mark.parametrize("name", BUDGET)
def test_what_touches_every_element_is_lean(codes: list[dict[str, Any]], name: str) -> None:
    """Wide accesses; few registers, few instructions."""
    for code in codes:
        if code["name"] == name:
            assert code["wide"] > 0, code
            assert 0 < code["registers"] <= REGISTERS.get(name, 64), code
            assert 0 < code["per_element"] <= BUDGET[name], code
