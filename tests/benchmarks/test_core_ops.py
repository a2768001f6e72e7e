"""The kernels' benchmark: its counts, the released scripts restated, and its path for a GPU."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import bench_kernels as bench
from core_ops import cases, host, measure, problems, released, report, shapes, targets
from core_ops.cases import Case
from core_ops.counting import Counter
from core_ops.machine import Machine
from gardo.flow import flux_sigmas, transitions
from gardo_kernels import random_normal
from gardo_kernels._examples import op_modules

CPU = torch.device("cpu")


def counts(count):
    return count.launches, count.bytes, count.allocated, count.syncs


# ---- counting ------------------------------------------------------------------------------------


def test_a_known_sequence_is_counted_exactly():
    x, y = torch.randn(6, 8), torch.randn(8)
    with Counter() as count:
        z = x.view(8, 6).t()[:, :4] * 2.0  # [6, 4]: views are nothing
        empty = torch.empty(10)
        w = x + y.expand(6, 8)  # what is broadcast is read once
        w.mul_(x)
    out, whole, row = 4 * 24, 4 * 48, 4 * 8
    assert count.launches == 3
    assert count.bytes == 2 * out + (2 * whole + row) + 3 * whole
    assert count.allocated == out + 40 + whole
    assert count.syncs == 0 and z.numel() == 24 and empty.numel() == 10


def test_what_the_host_waits_for_is_counted():
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    for ask, syncs, launches in (
        (lambda: x[1].item(), 1, 0),
        (lambda: bool((x > 1).any()), 1, 2),
        (lambda: x.nonzero(), 1, 1),
        (lambda: x[mask], 1, 1),
        (lambda: x[[0, 2]], 0, 1),
        (lambda: torch.where(mask, x, 0.0).sum(), 0, 2),
    ):
        with Counter() as count:
            ask()
        assert (count.syncs, count.launches) == (syncs, launches)


def test_backward_passes_are_counted_and_a_second_counter_starts_anew():
    x = torch.ones(5, requires_grad=True)
    for _ in range(2):
        with Counter() as count:
            (x * x).sum().backward()
            x.grad = None
        # x x, sum; the upstream one, two products with x (expand is a view) and their sum
        assert count.launches == 2 + 1 + 2 + 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter runs")
def test_a_triton_kernel_is_one_launch_with_its_tensors():
    ids = torch.arange(3)
    with Counter() as count:
        random_normal(5, ids, 0, (100,), backend="triton")
    # the seed's tensor [1] and the ids [3] are int64, the normals [3, 100] fp32
    assert (count.triton_launches, count.bytes) == (1, 8 + 3 * 8 + 300 * 4)
    with Counter() as count:
        random_normal(5, ids, 0, (100,), backend="torch")
    assert count.triton_launches == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter runs")
@pytest.mark.parametrize(("op", "launches"), [
    ("policy_loss", 2), ("nft_loss", 2), ("awm_loss", 2), ("sde_step", 1), ("nearest_cosine", 2),
])  # fmt: skip
def test_launches_of_our_kernels(op, launches):
    dtype = torch.float32 if op == "nearest_cosine" else torch.bfloat16
    problem = shapes.PROBLEMS[op](Case(op, (3, 64, 16), dtype), CPU)
    with Counter() as count:
        problem.as_on_gpu()["triton"]()
    assert count.triton_launches == launches and count.syncs == 0
    # every tensor of the case at least once; on top come values of a row or of a block
    assert count.bytes >= problem.least_bytes
    with Counter() as theirs:
        problem.ways()["released"]()
    assert theirs.launches > 5 * count.launches and theirs.syncs > 0


@pytest.mark.parametrize("op", shapes.OPS)
def test_the_hosts_time_is_that_of_both_ways_without_a_launch(op):
    case = shapes.PROBLEMS[op].counted_case(op, quick=True)
    call = shapes.PROBLEMS[op](case, CPU).ways()["triton"]
    with host.without_launches(), Counter() as count:
        call()
    assert count.triton_launches == count.syncs == 0
    plain, custom = host.host_costs([case], Machine(), reps=2)
    assert (plain["way"], custom["way"]) == ("eager", "custom op")
    assert all(0 < row["p10_us"] <= row["median_us"] <= row["p90_us"] for row in (plain, custom))


def test_a_problem_is_found_by_its_file(tmp_path, monkeypatch):
    (tmp_path / "twice.py").write_text("""
from core_ops.cases import Problem


class Twice(Problem):
    gates = ()
""")
    monkeypatch.setattr(problems, "__path__", [*problems.__path__, str(tmp_path)])
    found = problems.find_problems()
    assert list(found) == sorted([*shapes.OPS, "twice"]) and found["twice"].gates == ()
    assert set(shapes.OPS) <= set(op_modules())


# ---- the released scripts, restated --------------------------------------------------------------


def worst(ours, exact):
    return float((ours.detach().double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("op", ["policy_loss", "nft_loss", "awm_loss"])
@pytest.mark.parametrize("gate", [0.0, 0.4, 1.0])
def test_the_restated_losses_are_ours(op, gate):
    """What is compared in time is the same function: fp32 against our reference in fp64."""
    problem = shapes.PROBLEMS[op](Case(op, (5, 64, 16), torch.float32, gate), CPU)
    exact, theirs = problem.exact(), problem.ways()["released"]()
    # each log-probability is a mean of terms of size 1 to 10, rounded a few times to 2^-24 of them
    assert abs(theirs["loss"].item() - exact["loss"].item()) < 1e-5
    if "log_ratio" in exact:
        off = (theirs["log_ratio"].double() - exact["log_ratio"]).abs().max()
        assert float(off) < 5e-6 < float(exact["log_ratio"].abs().max())
    # x' - mean cancels numbers ten times its size
    assert worst(theirs["gradient"], exact["gradient"]) < 1e-5


def test_the_restated_gate_matters():
    """The comparison above would see nothing if the reference weighed nothing."""
    case = Case("policy_loss", (5, 64, 16), torch.float32)
    some, every = (
        shapes.PROBLEMS["policy_loss"](Case(case.op, case.shape, case.dtype, gate), CPU).ways()[
            "released"
        ]()["gradient"]
        for gate in (0.4, 1.0)
    )
    assert worst(some, every.double()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_restated_step_is_ours(dtype):
    case = Case("sde_step", (4, 64, 16), dtype)
    problem = shapes.PROBLEMS["sde_step"](case, CPU)
    exact = problem.exact()
    for name, call in problem.ways(checked=True).items():
        assert worst(call()["x"], exact["x"]) < 2e-6, name  # normals of the kernel: to 5e-6


def test_the_restated_log_probability_is_the_tables():
    problem = shapes.PROBLEMS["sde_step"](Case("sde_step", (4, 64, 16), torch.float32), CPU)
    _, log_prob_R, _, _ = released.sde_step(
        problem.schedule, problem.v, problem.timestep_R, problem.x, noise=problem.noise
    )
    table = transitions(flux_sigmas(cases.STEPS, 1024), "flow", cases.NOISE_LEVEL)
    h_R, std_R, term_R = (table.rows(problem.step_R, n) for n in ("h", "std", "log_std_term"))
    square_R = (std_R[:, None, None] * problem.noise).square().mean((1, 2))
    torch.testing.assert_close(log_prob_R, term_R - h_R * square_R, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["plain", "unequal"])
def test_all_nearest_neighbours_agree(layout):
    case = Case("nearest_cosine", (3, 6, 32), torch.float32, layout=layout)
    problem = shapes.PROBLEMS["nearest_cosine"](case, CPU)
    exact = problem.exact()["nearest"]
    ways = problem.ways()
    for name in ("released", "eager"):
        # 1 - cos of fp32 products: a few 2^-24, absolute
        torch.testing.assert_close(ways[name]()["nearest"].double(), exact, rtol=0, atol=1e-6)


# ---- the path for a GPU --------------------------------------------------------------------------


class Rehearsal(Machine):
    """The CPU where a GPU would be: graphs are plain calls, compiling stops before code."""

    is_gpu = True

    def compiled(self, call):
        torch._dynamo.reset()
        return torch.compile(call, backend="aot_eager", dynamic=False)

    def graph(self, call):
        return call


def test_every_competitor_is_measured():
    rows = measure.measure(Case("policy_loss", (2, 40, 16)), Rehearsal(), reps=3)
    assert [row["way"] for row in rows] == list(measure.WAYS)
    assert not [row["failure"] for row in rows if row["failure"]]
    for row in rows:
        assert tuple(row) == measure.COLUMNS
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"] and row["reps"] == 3
        assert row["way"] == "copy" or row["repeatable"] is True
    verdict = targets.verdicts(rows)
    by_text = {v["target"]: v["verdict"] for v in verdict}
    assert by_text["sde_step with its noise, 1024 px B=64: % of copy"] == "not measured"
    assert by_text["core ops, launch-bound shapes: triton against released, times"] == "missed"


@pytest.mark.parametrize("op", shapes.OPS)
def test_the_torch_way_compiles_as_one_graph(op):
    case = Case(op, (2, 40, 16), torch.float32)
    problem = shapes.PROBLEMS[op](case, CPU)
    torch._dynamo.reset()
    compiled = torch.compile(problem.torch_call, backend="aot_eager", fullgraph=True)
    ways, exact = problem.ways(compiled, checked=True), problem.exact()
    for name, value in ways["compiled"]().items():
        assert worst(value, exact[name]) <= problem.tolerance("compiled", name)


def test_layouts_are_what_they_say():
    part = shapes.PROBLEMS["policy_loss"](Case("policy_loss", (2, 8, 4), layout="slice"), CPU)
    assert not part.v.is_contiguous() and part.v.shape == (2, 8, 4) and part.v.is_leaf
    tiny = shapes.PROBLEMS["policy_loss"](
        Case("policy_loss", (3, 64, 64), torch.float32, layout="tiny"), CPU
    )
    size = tiny.exact()["log_ratio"].abs()
    assert float(size.min()) > 1e-9 and float(size.max()) < 1e-5


def test_what_fails_is_a_row_and_what_is_wrong_is_not_timed(monkeypatch):
    class Broken(shapes.PROBLEMS["policy_loss"]):
        def ways(self, compiled=None, checked=False):
            ways = super().ways(compiled, checked)
            right = ways[self.wrong]
            return {
                **ways,
                "released": lambda: 1 / 0,
                self.wrong: lambda: {k: 1.5 * t for k, t in right().items()},
            }

    monkeypatch.setitem(shapes.PROBLEMS, "policy_loss", Broken)
    case = Case("policy_loss", (2, 40, 16))
    only = ("released", "eager", "triton", "copy")
    for wrong, timed in (("eager", ["triton", "copy"]), ("triton", [])):
        Broken.wrong = wrong
        rows = {r["way"]: r for r in measure.measure(case, Machine(), only=only, reps=3)}
        assert rows["released"]["failure"] == "ZeroDivisionError: division by zero"
        assert rows[wrong]["failure"].startswith("ParityError: parity: loss")
        assert [way for way, row in rows.items() if row["median_us"] != ""] == timed


def test_a_spent_budget_is_said():
    ((row,),) = bench.timed([Case("sde_step", (2, 8, 4))], Machine(), -1.0, quick=True)
    assert row["failure"] == "left out: the budget of -1 s was spent" and row["op"] == "sde_step"


def test_what_was_measured_is_not_measured_again(tmp_path):
    """The first call has time for one case; the second takes its rows from the file."""
    cases = [Case("sde_step", (2, 8, 4)), Case("sde_step", (3, 8, 4))]
    (first,) = bench.timed(cases[:1], Machine(), 60.0, quick=True)
    (left,) = bench.timed(cases[1:], Machine(), -1.0, quick=True)
    file = tmp_path / "kernels_gpu.csv"
    report.write(file, first + left)
    kept, measured = bench.timed(cases, Machine(), 60.0, quick=True, before=report.read(file))
    assert kept == [{name: str(value) for name, value in row.items()} for row in first]
    assert {row["way"] for row in measured} == {"released", "eager", "copy"}
    assert all(row["median_us"] for row in measured)


# ---- targets and reports -------------------------------------------------------------------------


def row(way, median_us, shape="3x1024x64", **more):
    blank = dict.fromkeys(measure.COLUMNS, "")
    names = {"op": "sde_step", "shape": shape, "dtype": "bfloat16", "gate": 0.1, "layout": "plain",
             "elements": 1000, "least_bytes": 12000}  # fmt: skip
    return {**blank, **names, "way": way, "median_us": median_us, **more}


def test_targets_read_rows_as_they_are_meant():
    rows = [row("released", 100.0), row("triton", 5.0), row("triton_graph", 8.5),
            row("released", 24.0, "9x1024x64"),
            row("triton", 4.0, "9x1024x64", syncs=2)]  # fmt: skip
    found = {v["target"]: (v["measured"], v["verdict"]) for v in targets.verdicts(rows)}
    speed = "core ops, launch-bound shapes: triton against {}, times"
    assert found[speed.format("released")] == ("11", "met")  # geometric mean of 20 and 6
    assert found[speed.format("compiled")] == ("", "not measured")
    assert found["sde_step, 512 px B=3, CUDA graph: us"] == ("8.5", "missed")
    assert found["core ops: host syncs of a call, at most"] == ("2", "missed")


def test_targets_of_a_csv_are_those_of_the_run(tmp_path):
    ours = row("triton", 5.0, repeatable=True, syncs=0, gbps=2.4)
    rows = [row("released", 100.0), ours]
    report.write(tmp_path / "x.csv", rows)
    again = report.read(tmp_path / "x.csv")
    assert targets.verdicts(again) == targets.verdicts(rows)
    report.draw_speed(again, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 0
    assert "| 100.0 | 5.0 |" in report.speed_table(again)


def test_a_gpu_run_has_the_cases_that_targets_speak_of():
    planned = shapes.gpu_cases(shapes.OPS, quick=False)
    assert len(set(planned)) == len(planned)
    for target in targets.TARGETS:
        rows = [{**c.names(), "least_bytes": 10 * c.elements} for c in planned]
        for op in target.ops:
            assert any(targets.matches(target, r) for r in rows if r["op"] == op), (target, op)


def test_command_line(monkeypatch, capsys):
    command = ["bench_kernels", "--op", "policy_loss", "--quick", "--json", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    found = json.loads(capsys.readouterr().out)
    assert {r["way"] for r in found["cpu"]} == {"released", "eager", "copy"}
    assert all(r["op"] == "policy_loss" and r["median_us"] > 0 for r in found["cpu"])
    ours = next(r for r in found["counts"] if r["way"] == "triton")
    assert ours["triton_launches"] == 2 and found["targets"]


def test_what_no_clock_measures_alone(monkeypatch, capsys):
    command = ["bench_kernels", "--op", "gelu", "--quick", "--json", "--untimed"]
    monkeypatch.setattr(sys, "argv", command)
    assert bench.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert {name for name, rows in found.items() if rows} == {"counts", "targets"}
