"""DeepSpeed's universal checkpoint layout, for who wants to go on in another program.

    OUT/latest_universal                        the tag
    OUT/TAG/zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt
    OUT/TAG/zero/optimizer_state.pt
    OUT/TAG/{mp_rank_00,zero_pp_rank_0_mp_rank_00}_model_states.pt

DeepSpeed reads nothing but torch's own files there, which are pickles. This is the one place that
writes them, and nothing here reads them: a resume uses our own checkpoints. An engine loads them
with `"checkpoint": {"load_universal": true}` in its JSON and `engine.load_checkpoint(OUT)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gardo.distributed.saved import Saved, Unusable

NAMES = {"fp32": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def write_universal(saved: Saved, shapes: Mapping[str, Sequence[int]], out: Path) -> Path:
    """Writes the trained parameters (name: shape) of a checkpoint with their moments; returns `out`

    Unusable where the moments are quantised. Slots and the algorithm's state are not in the layout.
    """
    if saved.manifest["quantised"]:
        raise Unusable(f"{saved.folder}: DeepSpeed's layout has no place for 8-bit moments")
    tag = f"step{saved.step}"
    zero = out / tag / "zero"
    step = torch.tensor(float(saved.manifest["updates"]))
    for name, shape in shapes.items():
        folder = zero / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, kind in NAMES.items():
            torch.save({"param": saved.whole(kind, name, shape).float()}, folder / f"{file}.pt")
        torch.save(step, folder / "step.pt")
    groups: list[dict[str, Any]] = [{"params": []}]
    optimizer = {"state": {0: {"step": step}}, "param_groups": groups}
    torch.save(
        {
            "optimizer_state_dict": optimizer,
            "param_groups": groups,
            "ds_version": version("deepspeed"),
        },
        zero / "optimizer_state.pt",
    )
    states = {
        "module": {},
        "lr_scheduler": None,
        "global_steps": saved.manifest["updates"],
        "skipped_steps": 0,
        "dp_world_size": saved.manifest["world"],
        "mp_world_size": 1,
    }
    for prefix in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):  # stages 1 and 2, and 3
        torch.save(states, out / tag / f"{prefix}_model_states.pt")
    (out / "latest_universal").write_text(tag, encoding="utf-8")
    return out
