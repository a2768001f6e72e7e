"""One process, one ZeRO-3 rank and two ZeRO-3 ranks train alike: same noise, images, losses."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gardo.report.metrics_log import read_metrics

WORKER = Path(__file__).parent / "worker.py"
ROOT = WORKER.parents[2]
FAIR = ["gardo-lora", "flow_grpo-full", "diffusion_nft-lora", "refl-lora"]
ALL = [f"{a}-{w}" for a in ("flow_grpo", "diffusion_nft", "gardo", "gardo_nft", "refl")
       for w in ("lora", "full")]  # fmt: skip
WORLDS = {"one_rank": 1, "two_ranks": 2}
COMPARED = ("policy_loss", "kl", "gate_share", "ratio", "grad_norm", "reward_x0", "clip_fraction")


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def launch(ranks: int, *arguments: str) -> None:
    """Runs the worker, through the deepspeed launcher unless `ranks` is 0."""
    launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
    port = 29600 + os.getpid() % 300
    command = [sys.executable, str(WORKER)]
    if ranks:
        command = [sys.executable, launcher, "--num_gpus", str(ranks), "--master_port", str(port),
                   str(WORKER)]  # fmt: skip
    done = subprocess.run(
        [*command, *arguments], env=environment(), capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def run_everywhere(cases: list[str], folder: Path) -> dict[str, Path]:
    """Every case in one process, on one ZeRO-3 rank and on two; one launch runs all of them."""
    folders = {"local": folder / "local", **{name: folder / name for name in WORLDS}}
    for path in folders.values():
        path.mkdir()
    launch(0, str(folders["local"]), *(f"{c}-local" for c in cases))
    for name, ranks in WORLDS.items():
        launch(ranks, str(folders[name]), *(f"{c}-zero" for c in cases))
    return folders


@pytest.fixture(scope="module")
def fair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_everywhere(FAIR, tmp_path_factory.mktemp("fair"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return run_everywhere(ALL, tmp_path_factory.mktemp("all"))


def compare(folders: dict[str, Path], case: str, world: str) -> None:
    mine = load_file(folders["local"] / f"{case}-local.safetensors")
    theirs = load_file(folders[world] / f"{case}-zero.safetensors")
    assert torch.equal(mine["noise"], theirs["noise"])
    torch.testing.assert_close(mine["images"], theirs["images"], rtol=0, atol=1e-5)
    ours = read_metrics(folders["local"] / f"{case}-local" / "metrics.jsonl")
    others = read_metrics(folders[world] / f"{case}-zero" / "metrics.jsonl")
    steps = [r for r in ours if r["kind"] == "step"]
    other_steps = [r for r in others if r["kind"] == "step"]
    assert len(steps) == len(other_steps) == 5
    for one, two in zip(steps, other_steps, strict=True):
        assert one["events"] == two["events"]
        for name, value in one["metrics"].items():
            if name == "loss" or name in COMPARED:
                # the policy terms of a group sum to about 0: their scale is the advantage, about 1
                floor = 1e-6 if name in ("loss", "policy_loss") else 1e-9
                assert math.isclose(value, two["metrics"][name], rel_tol=1e-4, abs_tol=floor) or (
                    math.isnan(value) and math.isnan(two["metrics"][name])
                ), (case, world, one["step"], name, value, two["metrics"][name])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", FAIR)
def test_zero3_trains_like_one_process(fair: dict[str, Path], case: str, world: str) -> None:
    compare(fair, case, world)


@pytest.mark.full
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", ALL)
def test_zero3_trains_like_one_process_all(full: dict[str, Path], case: str, world: str) -> None:
    compare(full, case, world)


REPLAY = """
import sys
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from gardo_kernels import random_normal

model, lora, seen, prompts = sys.argv[1:]
torch.set_num_threads(1)
pipeline = FluxPipeline.from_pretrained(model, dtype=torch.float32)
pipeline.load_lora_weights(lora)
images = pipeline(
    open(prompts).read().split("\\n")[:4],
    latents=random_normal(7, torch.arange(4), 1 << 25, (64, 16)),
    height=32, width=32, num_inference_steps=2, guidance_scale=3.5, max_sequence_length=8,
    output_type="pt",
).images
wanted = load_file(seen)["evaluation"]
assert torch.equal(images, wanted), (images - wanted).abs().max()
"""


@pytest.mark.parametrize("world", ["local", "two_ranks"])
def test_exported_lora_gives_the_same_images_bit_for_bit(fair: dict[str, Path], world: str) -> None:
    """FluxPipeline.load_lora_weights in a new process against what the run itself evaluated."""
    case = "gardo-lora-local" if world == "local" else "gardo-lora-zero"
    run = fair[world] / case
    files = [ROOT / "engine/gardo/tiny/weights/flux", run / "export",
             fair[world] / f"{case}.safetensors", ROOT / "recipes/tiny_prompts.txt"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", REPLAY, *map(str, files)],
        env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_training_moves_the_metrics(fair: dict[str, Path]) -> None:
    """The comparison above would pass on runs that do nothing: these do something."""
    steps = [
        r
        for r in read_metrics(fair["local"] / "gardo-lora-local" / "metrics.jsonl")
        if r["kind"] == "step"
    ]
    assert any("reference reset" in e for r in steps for e in r["events"])
    assert all(r["metrics"]["kl"] > 0 for r in steps)
    assert all(0 < r["metrics"]["gate_share"] < 1 for r in steps)
    assert all(r["metrics"]["ratio_error"] < 1e-4 for r in steps)
