"""The measurement of quantised bases and of a step on all weights, on a tiny model."""

from __future__ import annotations

import csv
import sys
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from campaign import flux_bases, flux_model, table
from campaign.flux_model import SMALL
from core_ops.machine import Machine

CPU = torch.device("cpu")
ALL = flux_bases.cases(SMALL)
CASES = [case for case in ALL if case.micro_batch <= 1]  # no larger micro-batches


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Of a script that has run."""
    folder = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flux_bases, "cases", lambda shape: CASES)
        patch.setattr(flux_model, "this_machine", lambda kind: Machine())
        assert flux_bases.main(["--out", str(folder), "--small"]) == 0
    with (folder / "flux_bases.csv").open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def of(rows, work, **fields):
    return [r for r in rows if r["work"] == work and fields.items() <= r.items()]


def test_every_case_is_measured_or_says_why(rows):
    assert list(rows[0]) == [*flux_bases.COLUMNS, "status", "note", *table.FACTS]
    assert len(rows) == len(CASES) + 3 * 4 + 2 * 3  # five rows a ratio, four a step that runs
    refused = [r for r in rows if r["status"] != "done"]
    assert [(r["optimizer"], r["status"]) for r in refused] == [("adamw_8bit_paged", "unavailable")]
    assert refused[0]["note"].startswith("train.optimizer.name: adamw_8bit_paged needs an NVIDIA")
    for base in ("bf16", "nf4", "int8"):
        calls = of(rows, "sample", base=base) + of(rows, "train", base=base)
        assert {r["checkpointing"] for r in calls} == {"none", "matmuls", "full"}
        assert all(float(r[n]) > 0 for r in calls for n in ("ms", "executed_tflop_s"))


def test_what_a_base_changes(rows):
    """It rounds the same weights, more in fewer bits; and training sees what rollouts saw."""
    far = {}
    for base in ("bf16", "nf4", "int8"):
        steps = of(rows, "ratio", base=base)
        assert [r["step"] for r in steps] == ["0", "1", "2", "3", "all"]
        far[base] = float(steps[-1]["velocity_from_bf16"])
        assert float(steps[-1]["max_ratio_error"]) < 0.1
        assert float(steps[-1]["velocity_error"]) < 0.01
    assert far["bf16"] == 0.0 < far["int8"] < far["nf4"] < 0.3


def test_a_restart_makes_what_a_base_is_compared_with(rows):
    (case,) = (case for case in CASES if (case.work, case.base) == ("ratio", "int8"))
    again = flux_bases.Bench(SMALL, Machine(), None).measure(case)
    for name in ("velocity_from_bf16", "max_ratio_error"):
        assert [str(r[name]) for r in again] == [r[name] for r in of(rows, "ratio", base="int8")]


def test_a_step_is_the_sum_of_its_parts(rows):
    for optimizer in ("adamw", "adamw_8bit"):
        *parts, whole = of(rows, "step", optimizer=optimizer)
        assert [r["part"] for r in parts] == ["forward", "backward", "update"]
        assert whole["part"] == "all" and {r["reps"] for r in (*parts, whole)} == {"3"}
        least = sum(float(r["least_ms"]) for r in parts)
        assert float(whole["least_ms"]) >= 0.999 * least  # four digits
        assert float(whole["executed_tflop"]) > float(whole["model_tflop"])


def test_the_larger_cases_come_last():
    """The first cases measure every base, and what leaves pages behind is at the end."""
    assert [case.work for case in ALL[:2]] == ["weights", "ratio"]
    assert ALL[0].base == "bf16", "what the others are compared with"
    assert ALL[-1].optimizer == "adamw_8bit_paged"
    assert len(set(ALL)) == len(ALL)
    made = [(case.base, case.lora) for case in ALL]
    assert sum(a != b for a, b in pairwise(made)) <= 6, "weights made anew"


def test_without_bitsandbytes_the_rows_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # Python's way to say: not importable
    bench = flux_bases.Bench(SMALL, Machine(), None)
    for case in (
        flux_bases.Case("weights", 0, 4, base="nf4"),
        flux_bases.Case("ratio", 1, 4, base="int8", rollout_batch=2),
        flux_bases.Case("step", 1, 4, "full", lora=False, optimizer="adamw_8bit"),
    ):
        (row,) = table.attempt(lambda case=case: bench.measure(case))
        assert row["status"] == "unavailable" and "pip install bitsandbytes" in row["note"]
        bench.free()


def test_out_of_memory_names_the_part_of_the_step():
    bench = flux_bases.Bench(SMALL, Machine(), None)

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB\nmore")

    (row,) = table.attempt(lambda: [bench.part("update", full)])
    assert row["status"] == "out of memory"
    assert row["note"] == "OutOfMemoryError: update: CUDA out of memory. Tried 9 GiB"


# ---- what is counted -----------------------------------------------------------------------------


def counter():
    """torch's, which is told what bitsandbytes' products of a base in few bits cost."""
    import bitsandbytes  # noqa: F401  # defines them

    def nf4(x_shape, packed_shape, weight_shape, *more, **named):
        return 2 * torch.Size(x_shape).numel() * weight_shape[0]

    def int8(x_shape, weight_shape, *more, **named):
        return 2 * torch.Size(x_shape).numel() * weight_shape[0]

    ops = torch.ops.bitsandbytes
    known = {ops.gemm_4bit: nf4, ops.int8_scaled_mm: int8}
    return FlopCounterMode(display=False, custom_mapping=known)


@pytest.mark.parametrize("kept", ["bf16", "nf4", "int8", "everything"])
def test_training_flops(kept):
    """As torch's counter sees them, LoRA on each base or all weights trained, in every mode but
    `selective`: attention is plain matmuls here, which it does not keep."""
    whole = kept == "everything"
    policy = flux_model.build(SMALL, CPU, torch.float32, "bf16" if whole else kept)
    if whole:
        policy.train_full()
    else:
        flux_model.add_lora(policy, SMALL)
    rows = flux_model.rows_of(policy, 1, 8)
    count = flux_model.flops(policy.transformer, policy.latent_shape[0], 8, not whole)
    for checkpointing in ("none", "matmuls", "full"):
        flux_model.set_up(
            policy, path="eager", attention="_native_math", checkpointing=checkpointing,
            compiler="eager",
        )  # fmt: skip
        with counter() as counted:
            rows.velocity(policy, torch.arange(2)).square().mean().backward()
        model, executed = (2 * f for f in count.training(checkpointing))
        found = counted.get_total_flops()
        if checkpointing == "none":
            assert found == model
        assert found + 0.5 * 2 * count.attention == executed  # of a flash backward pass
