"""Trains many small cases in one process group and writes what was seen: worker.py OUT CASE ...

Launched by the tests, alone or through the deepspeed launcher. A case is ALGORITHM-WEIGHTS-ENGINE,
such as gardo-lora-zero. For each, rank 0 writes OUT/CASE.safetensors (noise and images of the first
rollout, as all ranks drew them; evaluation images of the trained weights) and leaves
OUT/CASE/metrics.jsonl.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from gardo.config import check
from gardo.distributed.base import leave_process_group
from gardo.rewards.base import Panel
from gardo.rollout import INITIAL, noise_id
from gardo.session import open_session
from gardo.train import train
from gardo_kernels import random_normal

ROOT = Path(__file__).parents[2]

BASES = {
    "flow_grpo": {"name": "flow_grpo", "clip_range": 1.0e-3, "beta": 1.0, "kl": "gaussian"},
    "diffusion_nft": {"name": "diffusion_nft", "beta": 0.04, "decay": {"slope": 0.1}},
    "refl": {"name": "refl", "weight": 1.0, "margin": 0.0, "late": 0.5},
}
MECHANISMS = {
    "gate": {"fraction": 0.25, "limits": [0.1, 0.5], "warmup": 2},
    "diversity": {"features": "dinov3"},
    "reference": {"reset_updates": 4},
}
ALGORITHMS = {
    **BASES,
    "gardo": {"name": "gardo", "base": BASES["flow_grpo"], **MECHANISMS},
    "gardo_nft": {"name": "gardo", "base": BASES["diffusion_nft"], **MECHANISMS},
}
WEIGHTS = {
    "lora": ({"kind": "lora", "rank": 4, "alpha": 8}, 2e-3),
    "full": ({"kind": "full"}, 3e-4),
}


def recipe(case: str, folder: Path, steps: int = 5) -> dict:
    """A small recipe with a continuous proxy: a counted one could flip on a pixel's last bit."""
    algorithm, weights, engine = case.split("-")
    kind, lr = WEIGHTS[weights]
    return {
        "model": {
            "family": "flux", "path": "builtin:flux", "size": [32, 32], "text_tokens": 8,
        },
        "train": {
            "weights": kind,
            "optimizer": {"lr": lr},
            "updates_per_step": 2,
            "micro_batch": 2 if algorithm == "refl" else 4,
        },
        "data": {
            "prompts": str(ROOT / "recipes/tiny_prompts.txt"),
            "prompts_per_step": 4,
            "images_per_prompt": 4,
        },
        "sampler": {"steps": 4, "train_steps": 2, "noise_level": 0.7},
        "algorithm": ALGORITHMS[algorithm],
        "rewards": {
            "tiny_shape": {"role": "proxy"},
            "tiny_purity": {"role": "auxiliary"},
            "dinov3": {"role": "features", "path": "builtin:dinov3", "size": 32},
        },
        "evaluate": {
            "every": 100, "prompt_count": 4, "images_per_prompt": 1, "steps": 2, "batch": 2,
        },
        "distributed": {"engine": engine, "threads": 1},
        "run": {"name": case, "steps": steps, "seed": 7, "folder": str(folder)},
        "rollout": {"batch": 4},
    }  # fmt: skip


class FirstImages(Panel):
    """A panel that keeps the first images it sees."""

    images: torch.Tensor | None = None

    def __call__(self, images_B3HW, prompts, **more):  # type: ignore[no-untyped-def]
        if self.images is None:
            self.images = images_B3HW
        return super().__call__(images_B3HW, prompts, **more)


def run(case: str, out: Path) -> None:
    session = open_session(check(recipe(case, out), case), quiet=True)
    session.panel = FirstImages(session.panel.rewards)
    plan, engine = session.geometry, session.engine
    sample_B = torch.arange(plan.first, plan.first + plan.samples, device=engine.device)
    noise = random_normal(7, noise_id(0, sample_B), INITIAL, session.policy.latent_shape)
    train(session)
    assert session.panel.images is not None
    images = engine.all_gather(session.panel.images)
    evaluation, _ = session.evaluator.batch(torch.arange(4, device=engine.device))
    noise = engine.all_gather(noise)
    if session.log:
        session.log.close()
        seen = {"noise": noise, "images": images, "evaluation": evaluation}
        save_file(seen, out / f"{case}.safetensors")
    engine.close()


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    for name in arguments[1:]:
        run(name, Path(arguments[0]))
    leave_process_group()
