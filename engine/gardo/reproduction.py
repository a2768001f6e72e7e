"""What a run that ended itself leaves behind of its last iteration.

    bad-updates/step-000012/
        report.json         why, the checkpoint to go on from, versions
        rank-00000.json     every micro-batch: its loss, the samples and denoise steps of its rows;
                            every sample of the rank: its prompt and its rewards

Noise is a function of seed and coordinates, and a resumed run has the same bits: the checkpoint and
the recipe show the iteration again.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gardo.rollout import Part
from gardo.types import Points, Rollout, Scores

LIBRARIES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "triton")


def write_rank(
    folder: Path,
    rank: int,
    *,
    losses: Sequence[Tensor],
    work: Sequence[Part],
    points: Points,
    rollout: Rollout,
    scores: Scores,
) -> None:
    """This rank's file: `losses` of the micro-batches of `work`; `scores` are of all ranks."""
    here = dict(zip(rollout.sample_B.tolist(), rollout.prompts, strict=True))
    samples = [
        {
            "sample": sample,
            "prompt": str(here[sample]),
            "rewards": {name: str(float(value_B[i])) for name, value_B in scores.rewards.items()},
        }
        for i, sample in enumerate(scores.sample_B.tolist())
        if sample in here
    ]
    micro_batches = [
        {
            "loss": str(float(loss)),
            "samples": rollout.sample_B[points.sample_R[part.rows]].tolist(),
            "steps": points.step_R[part.rows].tolist(),
        }
        for loss, part in zip(losses, work, strict=True)
    ]
    _write(folder / f"rank-{rank:05d}.json", {"micro_batches": micro_batches, "samples": samples})


def write_report(folder: Path, *, why: str, step: int, world: int, checkpoint: int | None) -> None:
    """What concerns all ranks; `step` is the iteration, counted from 1."""
    loaded = {name: sys.modules[name] for name in LIBRARIES if name in sys.modules}
    versions = {name: str(module.__version__) for name, module in loaded.items()}
    report = {
        "why": why,
        "iteration": step,
        "ranks": world,
        "checkpoint": checkpoint,
        "versions": {"python": platform.python_version(), **versions},
    }
    _write(folder / "report.json", report)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
