"""A run that is cut goes on as if nothing had happened; its checkpoints fit any number of ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gardo.distributed.saved import Saved, committed
from tests.integration.cases import Case
from tests.integration.checks import facts, logged, seen
from tests.integration.launch import launch

EVALUATION = ("evaluation",)


def saving(algorithm: str, weights: str, engine: str, *options: str) -> Case:
    """A case that saves after every iteration."""
    return Case(algorithm, weights, engine, (*options, "saving"), probes=EVALUATION)


EIGHT_BIT = saving("gardo", "lora", "stage3", "eight_bit", "offload")
CASES = [
    saving("gardo", "lora", "stage3", "ema"),
    saving("flow_grpo", "full", "stage3", "tight", "each", "full", "bf16"),
    saving("diffusion_nft", "full", "stage1", "ema"),
    saving("refl", "full", "stage0").plus("behind"),
    EIGHT_BIT,
    saving("gardo_awm", "lora", "stage3").plus("folded"),
]
MORE = [
    saving("gardo_nft", "lora", "stage2", "bf16_masters"),
    saving("gardo", "full", "stage3", "offload_all", "host"),
    saving("flow_grpo", "lora", "stage1", "bf16"),
    saving("gardo_flash", "lora", "stage3"),
    saving("gardo", "lora", "stage2", "eight_bit", "bf16_masters"),
    saving("flow_grpo", "full", "stage3", "deepspeed_cpu", "offload"),
    saving("gardo", "lora", "stage1", "deepspeed_cpu", "offload", "bf16_masters"),
    saving("kl_in_reward", "lora", "stage3"),
    saving("gardo", "lora", "stage3", "tight", "compiled", "folded"),
    saving("gardo", "full", "stage2", "compiled"),
]
MIDDLE = 5  # gradient steps: between the two updates of the last of three iterations
ALL = [
    saving("flow_grpo", "lora", "stage3"),
    saving("diffusion_nft", "lora", "stage3"),
    saving("gardo", "full", "stage3"),
    saving("refl", "lora", "stage3"),
]
ANYWHERE = range(1, 6)  # the first save is after 2 gradient steps: cut before it, the run starts


def cut_and_resume(cases: Sequence[Case], cuts: Sequence[int], folder: Path) -> Path:
    """Every case uncut, and cut and resumed by other processes."""
    cut = [case.but(cut=number) for case in cases for number in cuts]
    launch(2, folder, [*cases, *cut])
    launch(2, folder, [case.but(resume=True) for case in cut])
    return folder


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_and_resume(CASES, [MIDDLE], tmp_path_factory.mktemp("middle"))


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_and_resume(MORE, [MIDDLE], tmp_path_factory.mktemp("more"))


@pytest.fixture(scope="module")
def anywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_and_resume(ALL, ANYWHERE, tmp_path_factory.mktemp("anywhere"))


def pictures(run: Path) -> dict[str, bytes]:
    """What the run has kept of them, samples/train.jsonl too."""
    return {path.name: path.read_bytes() for path in (run / "samples").iterdir()}


def same_bits(folder: Path, case: Case, cut: int) -> None:
    resumed = case.but(cut=cut, resume=True)
    runs = folder / case.run, folder / resumed.run
    ours, theirs = (Saved(committed(run / "checkpoints")[0]) for run in runs)
    assert ours.step == theirs.step == case.steps
    digests = [{f["name"]: f["sha256"] for f in s.manifest["files"]} for s in (ours, theirs)]
    assert digests[0] == digests[1]
    assert ours.manifest["state"] == theirs.manifest["state"]
    assert ours.manifest["updates"] == theirs.manifest["updates"] == 2 * case.steps
    assert logged(runs[0]) == logged(runs[1])
    assert pictures(runs[0]) == pictures(runs[1])
    whole = (cut - 1) // 2  # iterations of 2 gradient steps, saved before the cut
    started = facts(folder, resumed)["first_step"]
    # written in the background, the last of them may not have been committed yet
    assert started == whole or (case.has("behind") and started == whole - 1)
    left, right = seen(folder, case), seen(folder, resumed)
    for name in ("evaluation", "live"):
        assert torch.equal(left[name], right[name])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_cut_run_goes_on_to_the_same_bits(middle: Path, case: Case) -> None:
    same_bits(middle, case, MIDDLE)


@pytest.mark.full
@pytest.mark.parametrize("case", MORE, ids=str)
def test_a_cut_run_goes_on_to_the_same_bits_all(more: Path, case: Case) -> None:
    same_bits(more, case, MIDDLE)


@pytest.mark.full
@pytest.mark.parametrize("cut", ANYWHERE)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_run_cut_anywhere_goes_on_to_the_same_bits(anywhere: Path, case: Case, cut: int) -> None:
    same_bits(anywhere, case, cut)


def test_the_last_checkpoints_are_kept(middle: Path) -> None:
    def kept(case: Case) -> list[str]:
        return [p.name for p in committed(middle / case.run / "checkpoints")]

    assert kept(CASES[0]) == ["step-000003"]
    # and the one that was resumed from
    assert kept(CASES[0].but(cut=MIDDLE)) == ["step-000003", "step-000002"]


CHAIN = [
    saving("gardo_nft", "lora", "stage3").but(steps=1, probes=()),
    saving("flow_grpo", "full", "stage3").but(steps=1, probes=()),
]
RANKS = [("stage3", 1), ("stage3", 2), ("stage3", 4), ("stage3", 1)]
STAGES = [("stage3", 1), ("stage1", 2), ("stage0", 2), ("stage2", 2), ("local", 0), ("stage3", 2)]


def state(run: Path) -> dict[str, Any]:
    """Everything a checkpoint holds: parameters put together from their pieces, and the rest."""
    saved = Saved(committed(run / "checkpoints")[0])
    assert saved.damage() is None
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for file in saved.manifest["files"]:
        for key, tensor in load_file(saved.folder / file["name"]).items():
            name, _, start = key.partition("@")
            pieces.setdefault(f"{file['kind']}/{name}", {})[int(start)] = tensor
    whole: dict[str, Any] = {
        name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()
    }
    return {**whole, "state": saved.manifest["state"], "updates": saved.manifest["updates"]}


def equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name]
        for name, value in left.items()
    )


def pass_on(tmp_path: Path, chain: Sequence[tuple[str, int]]) -> None:
    """Trains on the first of the chain; every next one loads what the one before it saved."""
    launch(chain[0][1], tmp_path, CHAIN)
    before = {case: tmp_path / case.run for case in CHAIN}
    trained = {case: state(run) for case, run in before.items()}
    kinds = {key.partition("/")[0] for key in trained[CHAIN[0]] if "/" in key}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "slot.old", "slot.reference"}
    for number, (engine, ranks) in enumerate(chain[1:]):
        folder = tmp_path / str(number)
        loading = {case: case.but(engine=engine, reshard=True) for case in CHAIN}
        for case, other in loading.items():
            shutil.copytree(before[case], folder / other.run)
        launch(ranks, folder, list(loading.values()))
        for case, other in loading.items():
            loaded = folder / other.name
            newest = committed(loaded / "checkpoints")[0]
            assert json.loads((newest / "manifest.json").read_text())["world"] == max(ranks, 1)
            assert equal(state(loaded), trained[case]), (engine, ranks, case)
            before[case] = loaded


def test_any_number_of_ranks_loads_the_same_bits(tmp_path: Path) -> None:
    pass_on(tmp_path, RANKS)


@pytest.mark.full
def test_any_stage_loads_the_same_bits(tmp_path: Path) -> None:
    pass_on(tmp_path, STAGES)


UNIVERSAL = [
    saving("gardo", "lora", "stage3").but(steps=1, probes=("universal",)),
    saving("flow_grpo", "full", "stage2").but(steps=1, probes=("universal",)),
]


def test_deepspeed_loads_the_universal_layout(tmp_path: Path) -> None:
    """Its own loader, in a fresh engine: masters, moments and step count, bit for bit."""
    launch(2, tmp_path, UNIVERSAL)
    for case in UNIVERSAL:
        found = {n: float(v) for n, v in seen(tmp_path, case).items() if "universal" in n}
        names = ("fp32", "exp_avg", "exp_avg_sq", "step", "moved")
        assert found == {f"universal.{name}": 1.0 for name in names}, case


def test_8_bit_moments_are_refused_by_another_number_of_ranks(middle: Path, tmp_path: Path) -> None:
    shutil.copytree(middle / EIGHT_BIT.run, tmp_path / EIGHT_BIT.run)
    with pytest.raises(AssertionError, match="8-bit moments of 2 ranks can only be resumed"):
        launch(1, tmp_path, [EIGHT_BIT.but(reshard=True)])
