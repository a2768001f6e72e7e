"""The measurements of a full-size Flux, on a tiny one: what they write, and what they count."""

from __future__ import annotations

import csv

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from campaign import flux_full, flux_model, ratio_noise, table
from campaign.flux_model import SMALL
from campaign.table import Unavailable
from core_ops.machine import Machine

CPU = torch.device("cpu")
SCRIPTS = {"flux_full": flux_full, "ratio_noise": ratio_noise}


def rows_in(file):
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def is_compiled(case):
    return any("compiled" in str(value) for value in vars(case).values())


@pytest.fixture(scope="module", params=SCRIPTS)
def measured(request, tmp_path_factory):
    """A script that has run, its folder; compiled once, as every other compilation is alike."""
    module, folder = SCRIPTS[request.param], tmp_path_factory.mktemp(request.param)
    every = module.cases

    def cases(shape):
        plain = [case for case in every(shape) if not is_compiled(case)]
        return [next(case for case in every(shape) if is_compiled(case)), *plain]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "cases", cases)
        patch.setattr(flux_model, "this_machine", lambda kind: Machine())
        assert module.main(["--out", str(folder), "--small"]) == 0
        yield module, folder / f"{request.param}.csv"


def test_every_case_has_its_rows(measured):
    module, file = measured
    rows = rows_in(file)
    assert list(rows[0]) == [*module.COLUMNS, "status", "note", *table.FACTS]
    assert {r["status"] for r in rows} == {"done", "unavailable"}
    assert all(r["note"] for r in rows if r["status"] == "unavailable")
    written = table.Table(file, module.COLUMNS)
    for case in module.cases(SMALL):
        found = written.of(case)
        assert found, case
        if found[0]["status"] == "done" and getattr(case, "work", "") not in ("weights", "profile"):
            if module is flux_full:
                assert all(float(r[n]) > 0 for r in found for n in ("ms", "executed_tflop_s"))
            else:
                assert all(0 <= float(r["mean"]) <= float(r["max"]) < 1 for r in found)


def test_shares_and_steps_are_whole(measured):
    module, file = measured
    if module is flux_full:
        profile = [r for r in rows_in(file) if r["work"] == "profile"]
        for block in ("double", "single"):
            shares = {r["kind"]: float(r["share_percent"]) for r in profile if r["block"] == block}
            assert tuple(shares) == flux_full.KINDS
            assert sum(shares.values()) == pytest.approx(100, abs=0.1)
            assert min(shares.values()) > 0
    else:
        done = [r for r in rows_in(file) if r["status"] == "done"]
        assert [r["step"] for r in done[:5]] == ["0", "1", "2", "3", "all"]
        strengths = [float(r["strength"]) for r in done[:4]]
        assert strengths == sorted(strengths)


def test_a_restart_measures_what_is_missing(measured, monkeypatch):
    module, file = measured
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:40])  # cut while writing its last row
    asked = []
    measure = module.Bench.measure
    monkeypatch.setattr(
        module.Bench, "measure", lambda self, case: asked.append(case) or measure(self, case)
    )
    assert module.main(["--out", str(file.parent), "--small", "--seconds", "0"]) == 4  # unfinished
    assert not asked
    assert sum(r["status"] == "left out" for r in rows_in(file)) <= 1
    assert module.main(["--out", str(file.parent), "--small"]) == 0
    assert len(asked) <= 1  # of several rows a case keeps the others
    assert "left out" not in {r["status"] for r in rows_in(file)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_gpu_it_says_so(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert SCRIPTS[name].main(["--out", str(tmp_path)]) == 3
    assert capsys.readouterr().out == "needs an NVIDIA GPU\n"


# ---- what is counted -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy():
    policy = flux_model.build(SMALL, CPU, torch.float32)
    flux_model.add_lora(policy, SMALL)
    flux_model.set_lora_b(policy, "random")
    return policy


def set_up(policy, checkpointing="none"):
    flux_model.set_up(
        policy, path="eager", attention="_native_math", checkpointing=checkpointing,
        compiler="eager",
    )  # fmt: skip  # attention as plain matmuls: the counter does not know the CPU's fused one


@pytest.mark.parametrize("lora", [True, False])
def test_forward_flops(policy, lora):
    set_up(policy)
    rows = flux_model.rows_of(policy, 1, 8)
    if not lora:
        policy.transformer.disable_adapters()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            rows.velocity(policy, torch.arange(3))
    finally:
        policy.transformer.enable_adapters()
    count = flux_model.flops(policy.transformer, policy.latent_shape[0], 8, lora)
    assert counter.get_total_flops() == 3 * count.forward


def test_flops_of_flux_dev():
    """FLUX.1-dev has 11.9 billion parameters, and needs 15.8 TFLOP for 1024 + 128 tokens."""
    with torch.device("meta"):
        transformer = flux_model.FluxTransformer2DModel(**flux_model.FULL.transformer)
    assert sum(p.numel() for p in transformer.parameters()) == 11_901_408_320
    assert flux_model.flops(transformer, 1024, 128).forward == pytest.approx(15.8e12, rel=0.01)


# ---- the ratio -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    return ratio_noise.Bench(SMALL, Machine(), torch.float32)


@pytest.mark.parametrize("lora_b", ["zero", "random"])
def test_equal_passes_have_ratio_1(bench, lora_b):
    case = ratio_noise.Case(2, 2, 4, "none", lora_b=lora_b)
    found = bench.measure(case)
    assert [row["max"] for row in found] == [0.0] * 5
    assert {row["velocity_error"] for row in found} == {0.0}


def test_other_weights_have_not(bench):
    """The error is that of the formula: h B^2 (2 mean(u d) - mean(d^2))."""
    old, new = (bench.velocities(ratio_noise.Case(2, 2, 4, lora_b=b).sides(4)[0])
                for b in ("zero", "random"))  # fmt: skip
    rows = flux_model.rows_of(bench.policy, 4, 4)
    d, u = (new - old).double().flatten(1), rows.u_RX.double().flatten(1)
    log_ratio = rows.h_R * rows.B_R**2 * (2 * (u * d).mean(1) - d.square().mean(1))
    total = ratio_noise.statistics(rows, old, new)[-1]
    assert total["rows"] == 16 and total["max"] > 1e-5
    assert total["max"] == pytest.approx(float(log_ratio.expm1().abs().max()), rel=1e-3)


def test_rows_do_not_depend_on_how_they_are_batched(bench):
    """Each row's velocity lands in its own place, in whatever order it was made."""
    case = ratio_noise.Case(3, 1, 4)
    a, b = (bench.velocities(side) for side in case.sides(4))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(a, a.roll(1, 0), atol=1e-2)


def test_failures_are_rows():
    def unavailable():
        raise Unavailable("not here")

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB\nmore")

    def wrong():
        raise ValueError("first\nsecond")

    found = [table.attempt(call)[0] for call in (unavailable, full, wrong)]
    assert [row["status"] for row in found] == ["unavailable", "out of memory", "failed"]
    assert [row["note"] for row in found] == [
        "not here", "OutOfMemoryError: CUDA out of memory. Tried 9 GiB", "ValueError: first",
    ]  # fmt: skip
