"""A run that is cut goes on as if nothing had happened; its checkpoints fit any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gardo.distributed.saved import Saved, committed
from gardo.report.metrics_log import read_metrics
from tests.integration.test_parity import launch, run_of

CASES = [
    "gardo-lora-zero+saving",
    "flow_grpo-full-zero+tight+each+full+bf16+saving",
    "diffusion_nft-full-stage1+saving",
    "refl-full-stage0+saving+behind",
    "gardo-lora-zero+eight_bit+offload+saving",
    "gardo_awm-lora-zero+saving",
]
MORE = ["gardo_nft-lora-stage2+bf16_masters+saving", "gardo-full-zero+offload_all+host+saving",
        "flow_grpo-lora-stage1+bf16+saving", "gardo_flash-lora-zero+saving",
        "kl_in_reward-lora-zero+saving"]  # fmt: skip
MIDDLE = 5  # gradient steps: between the two updates of the third of four iterations
ALL = [f"{a}-{w}-zero+saving" for a, w in (("flow_grpo", "lora"), ("diffusion_nft", "lora"),
       ("gardo", "full"), ("refl", "lora"))]  # fmt: skip
ANYWHERE = range(1, 8)  # the first save is after 2 gradient steps: cut before it, the run starts


def cut_and_resume(cases: list[str], cuts: list[int], folder: Path) -> Path:
    """Every case uncut, and cut and resumed in another launch."""
    pairs = [(case, cut) for case in cases for cut in cuts]
    launch(2, str(folder), *cases, *(f"{case}+cut{cut}" for case, cut in pairs))
    launch(2, str(folder), *(f"{case}+resume{cut}" for case, cut in pairs))
    return folder


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_and_resume(CASES, [MIDDLE], tmp_path_factory.mktemp("middle"))


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_and_resume(ALL, list(ANYWHERE), tmp_path_factory.mktemp("anywhere"))


def logged(run: Path) -> list[dict[str, Any]]:
    """The run's records without what a clock measured."""
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def same_bits(folder: Path, case: str, cut: int) -> None:
    uncut, resumed = folder / run_of(case), folder / run_of(f"{case}+cut{cut}")
    ours, theirs = (Saved(committed(run / "checkpoints")[0]) for run in (uncut, resumed))
    assert ours.step == theirs.step == 4
    digests = [{f["name"]: f["sha256"] for f in s.manifest["files"]} for s in (ours, theirs)]
    assert digests[0] == digests[1]
    assert ours.manifest["state"] == theirs.manifest["state"]
    assert ours.manifest["updates"] == theirs.manifest["updates"] == 8
    assert logged(uncut) == logged(resumed)
    left, right = (load_file(folder / f"{n}.safetensors") for n in (case, f"{case}+resume{cut}"))
    for name in ("evaluation", "live"):
        assert torch.equal(left[name], right[name])


@pytest.mark.parametrize("case", CASES)
def test_a_cut_run_goes_on_to_the_same_bits(middle: Path, case: str) -> None:
    same_bits(middle, case, MIDDLE)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_and_resume(MORE, [MIDDLE], tmp_path_factory.mktemp("more"))


@pytest.mark.full
@pytest.mark.parametrize("case", MORE)
def test_a_cut_run_goes_on_to_the_same_bits_all(more: Path, case: str) -> None:
    same_bits(more, case, MIDDLE)


@pytest.mark.full
@pytest.mark.parametrize("cut", ANYWHERE)
@pytest.mark.parametrize("case", ALL)
def test_a_run_cut_anywhere_goes_on_to_the_same_bits(anywhere: Path, case: str, cut: int) -> None:
    same_bits(anywhere, case, cut)


def test_the_last_checkpoints_are_kept(middle: Path) -> None:
    def kept(case: str) -> list[str]:
        return [p.name for p in committed(middle / run_of(case) / "checkpoints")]

    assert kept(CASES[0]) == ["step-000004", "step-000003"]
    # and the one that was resumed from
    assert kept(f"{CASES[0]}+cut{MIDDLE}") == ["step-000004", "step-000003", "step-000002"]


CHAIN = ["gardo_nft-lora-zero+saving", "flow_grpo-full-zero+saving"]
RANKS = [("zero", 1), ("zero", 2), ("zero", 4), ("zero", 1)]
STAGES = [("zero", 1), ("stage1", 2), ("stage0", 2), ("stage2", 2), ("local", 0), ("zero", 2)]


def state(run: Path) -> dict[str, Any]:
    """Everything a checkpoint holds: parameters put together, and the rest."""
    saved = Saved(committed(run / "checkpoints")[0])
    assert saved.damage() is None
    kinds = sorted({f["kind"] for f in saved.manifest["files"]})
    whole: dict[str, Any] = {
        f"{kind}/{name}": saved.read(kind, name, 0, sum(s.length for s in stored))
        for kind in kinds
        for name, stored in saved._stored(kind).items()
    }
    return {**whole, "state": saved.manifest["state"], "updates": saved.manifest["updates"]}


def equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        for name, value in left.items()
    )


def pass_on(tmp_path: Path, chain: list[tuple[str, int]]) -> None:
    """Trains on the first of the chain; every next one loads what the one before it saved."""
    launch(chain[0][1], str(tmp_path), *CHAIN)
    start = {case: state(tmp_path / run_of(case)) for case in CHAIN}
    assert {"master", "exp_avg", "exp_avg_sq", "slot.old", "slot.reference"} == {
        key.partition("/")[0] for key in start[CHAIN[0]] if "/" in key
    }
    previous = {case: tmp_path / run_of(case) for case in CHAIN}
    for number, (engine, ranks) in enumerate(chain[1:]):
        folder = tmp_path / str(number)
        cases = {case: case.replace("-zero", f"-{engine}") for case in CHAIN}
        for case, name in cases.items():
            run = folder / run_of(name)
            shutil.copytree(previous[case], run)
            recipe = (run / "recipe.yaml").read_text()
            (run / "recipe.yaml").write_text(recipe.replace("-zero", f"-{engine}"))
        launch(ranks, str(folder), *(f"{name}+reshard" for name in cases.values()))
        for case, name in cases.items():
            loaded = folder / f"{run_of(name)}-reshard"
            world = json.loads((committed(loaded / "checkpoints")[0] / "manifest.json").read_text())
            assert world["world"] == max(ranks, 1)
            assert equal(state(loaded), start[case]), (engine, ranks, case)
            shutil.copy(previous[case] / "recipe.yaml", loaded / "recipe.yaml")
            previous[case] = loaded


def test_any_number_of_ranks_loads_the_same_bits(tmp_path: Path) -> None:
    pass_on(tmp_path, RANKS)


@pytest.mark.full
def test_any_stage_loads_the_same_bits(tmp_path: Path) -> None:
    pass_on(tmp_path, STAGES)


def test_deepspeed_loads_the_universal_layout(tmp_path: Path) -> None:
    """Its own loader, in a fresh engine: masters, moments and step count, bit for bit."""
    cases = ["gardo-lora-zero+saving+universal", "flow_grpo-full-stage2+saving+universal"]
    launch(2, str(tmp_path), *cases)
    for case in cases:
        assert float(load_file(tmp_path / f"{case}.safetensors")["universal"]) == 1


def test_8_bit_moments_are_refused_by_another_number_of_ranks(middle: Path, tmp_path: Path) -> None:
    case = "gardo-lora-zero+eight_bit+offload+saving"
    shutil.copytree(middle / run_of(case), tmp_path / run_of(case))
    with pytest.raises(AssertionError, match="8-bit moments of 2 ranks can only be resumed"):
        launch(1, str(tmp_path), f"{case}+reshard")
