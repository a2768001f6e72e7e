"""ZeRO trains like one process: same noise, images, losses, on one rank and on two.

At every stage, LoRA and full, with and without activation checkpointing, however the weights are
gathered, wherever state waits. The covering part runs with every test run, the whole matrix with
--all (coverings.py).
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from gardo.flow import shifted_linear_sigmas
from tests.integration.cases import Case
from tests.integration.checks import (
    check_gathers,
    check_metrics,
    check_slots,
    check_teachers,
    compare,
    facts,
    seen,
    steps_of,
)
from tests.integration.coverings import (
    ALL_ROWS,
    BF16,
    FAILING,
    GATHERED,
    MATRIX,
    PARTS,
    RECOMPUTED,
    STALE,
    WHOLE,
    alone,
)
from tests.integration.launch import Launched, launch, start, wait_for
from tests.integration.replay import equals_evaluation

ONCE, EACH, UNEVEN = GATHERED[0], GATHERED[1], GATHERED[4]
Parts = dict[str, tuple[int, list[Case]]]
Folders = dict[str, Path]


def run_everywhere(parts: Parts, more: dict[str, list[Case]], folder: Path) -> Folders:
    """Every case on its ranks, and in one process; and more cases by folder.

    Two processes at a time: as many as the smallest machines have cores.
    """
    folders = {name: folder / name for name in ("local", *parts)}
    for path in folders.values():
        path.mkdir()
    cases = [case for _, cases in parts.values() for case in cases]
    local = list(dict.fromkeys([*map(alone, cases), *more.get("local", [])]))
    wait_for([start(0, folders["local"], local[part::2]) for part in range(2)])
    for name, (ranks, cases) in parts.items():
        launch(ranks, folders[name], [*cases, *more.get(name, [])])
    return folders


@pytest.fixture(scope="module")
def covering(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    more = {"local": [ALL_ROWS], "two_ranks": [*BF16, STALE]}
    return run_everywhere(PARTS, more, tmp_path_factory.mktemp("covering"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return run_everywhere(WHOLE, {}, tmp_path_factory.mktemp("whole"))


def cases_of(parts: Parts) -> list[tuple[str, Case]]:
    return [(world, case) for world, (_, cases) in parts.items() for case in cases]


def check(folders: Folders, world: str, case: Case) -> None:
    compare(folders["local"], folders[world], case)
    if "slots" in case.probes:
        check_slots(folders[world], case)
    if "teachers" in case.probes:
        check_teachers(folders[world], case)


@pytest.mark.parametrize(("world", "case"), cases_of(PARTS), ids=str)
def test_zero_trains_like_one_process(covering: Folders, world: str, case: Case) -> None:
    check(covering, world, case)


@pytest.mark.full
@pytest.mark.parametrize(("world", "case"), cases_of(WHOLE), ids=str)
def test_zero_trains_like_one_process_all(whole: Folders, world: str, case: Case) -> None:
    check(whole, world, case)


@pytest.mark.parametrize("case", BF16, ids=str)
def test_bf16_slots_and_teachers(covering: Folders, case: Case) -> None:
    folder = covering["two_ranks"]
    check_slots(folder, case)
    check_teachers(folder, case)
    steps = steps_of(folder, case)
    assert len(steps) == case.steps
    assert all(0 < r["metrics"]["grad_norm"] < math.inf for r in steps)


@pytest.mark.parametrize("case", GATHERED, ids=str)
def test_a_block_is_gathered_once_a_pass(covering: Folders, case: Case) -> None:
    check_gathers(covering["two_ranks"], case)


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [c for c in MATRIX if c.algorithm == "gardo" and c.options[:1] == ("tight",) and c.options[1:]],
    ids=str,
)
def test_a_block_is_gathered_once_a_pass_all(whole: Folders, case: Case) -> None:
    check_gathers(whole["two_ranks"], case)


def test_where_gathering_once_fails_every_forward_gathers(covering: Folders) -> None:
    """As when memory runs out in the middle: said, and the run goes on as it would have without."""
    found = facts(covering["two_ranks"], FAILING)
    assert "does not work with deepspeed" in found["gather_note"]
    assert "OutOfMemoryError: of the test's making" in found["gather_note"]
    forward = found["blocks"] + found["outside"]
    assert [n for phase, n in found["phases"] if phase == "sample"] == FAILING.steps * [4 * forward]


def test_the_way_of_gathering_changes_no_bit(covering: Folders) -> None:
    """Training after gathering once goes on exactly as if every pass had gathered."""
    folder = covering["two_ranks"]
    ours, others = steps_of(folder, ONCE), steps_of(folder, EACH)
    assert [r["metrics"] for r in ours] == [r["metrics"] for r in others]
    ours, others = seen(folder, ONCE), seen(folder, EACH)
    assert all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.parametrize(("world", "case"), [("local", alone(ONCE)), ("two_ranks", ONCE)], ids=str)
def test_exported_lora_gives_the_same_images_bit_for_bit(
    covering: Folders, world: str, case: Case
) -> None:
    """FluxPipeline.load_lora_weights in a new process against what the run itself evaluated."""
    folder = covering[world]
    saved = folder / f"{case.name}.safetensors"
    Launched(0, equals_evaluation, folder / case.run / "export", saved).wait()


def test_the_sampler_follows_the_recipes_schedule(covering: Folders) -> None:
    by_algorithm = {case.algorithm: alone(case) for case in PARTS["two_ranks"][1]}
    said = seen(covering["local"], by_algorithm["dance"])
    assert torch.equal(said["sigmas"], shifted_linear_sigmas(4, 3.0))
    usual = seen(covering["local"], alone(ONCE))
    assert not torch.equal(said["sigmas"], usual["sigmas"])


def test_training_moves_the_metrics(covering: Folders) -> None:
    """The comparison above would pass on runs that do nothing: these do something."""
    steps = steps_of(covering["local"], alone(ONCE))
    assert [r["events"] for r in steps] == [[], ["reference reset (4 updates)"], []]
    first, moved, after_reset = (r["metrics"]["kl"] for r in steps)
    assert moved > 2 * max(first, after_reset)  # whose iterations begin at their reference
    assert all(r["metrics"]["gate_share"] == 0.25 for r in steps)
    assert all(r["metrics"]["ratio_error"] < 1e-4 for r in steps)


def test_rows_that_weigh_nothing_may_be_left_out(covering: Folders) -> None:
    """The same losses and weights as with all rows, in one process; fewer rows on two ranks too."""
    folder, fewer = covering["local"], alone(UNEVEN)
    for one, two in zip(steps_of(folder, fewer), steps_of(folder, ALL_ROWS), strict=True):
        assert one["events"] == two["events"]
        assert two["metrics"]["rows_left_out"] == 0
        check_metrics(one, two)
    weights = [seen(folder, case)["live"] for case in (fewer, ALL_ROWS)]
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    left_out = {world: [r["metrics"]["rows_left_out"] for r in steps_of(covering[world], case)]
                for world, case in (("local", fewer), ("two_ranks", UNEVEN))}  # fmt: skip
    assert left_out == {"local": [12, 10, 10], "two_ranks": [8, 4, 4]}  # of 16


def test_wrong_old_velocities_are_computed_again(covering: Folders) -> None:
    """What the first micro-batch's forward pass tells, before anything is trained on it."""
    folder = covering["two_ranks"]
    stale, fresh = steps_of(folder, STALE), steps_of(folder, RECOMPUTED)
    assert len(stale) == len(fresh) == 2
    for one, two in zip(stale, fresh, strict=True):
        (event,) = one["events"]
        assert event.startswith("old velocities recomputed: max |ratio - 1| =")
        assert one["metrics"]["ratio_error"] < 1e-4
        check_metrics(one, two)
