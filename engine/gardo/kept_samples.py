"""Keeps a few of an iteration's pictures: gated beside trusted, the best and the worst by proxy.

What is kept is decided from the scores of all ranks, which every rank has, so all gather equally
many thumbnails; rank 0 writes them. Nothing is drawn and nothing of the training changes.

Shapes: B samples of all ranks, N of them kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gardo.algorithms.uncertainty import uncertainty
from gardo.data import step_prompts
from gardo.distributed.base import Ranks
from gardo.report import kept
from gardo.report.pictures import save_grid
from gardo.session import Session
from gardo.types import Credit, Rollout, Scores, to_device
from gardo_kernels import win_rate


def keep_samples(s: Session, step: int, rollout: Rollout, scores: Scores, credit: Credit) -> None:
    """Keeps pictures of iteration `step`, counted from 1, where they are due; a collective then.

    `scores` and `credit` are of all ranks. What cannot be written is said, and the run goes on.
    """
    settings, recipe = s.recipe.run.keep_samples, s.recipe
    if settings is None or not settings.due(step, recipe.run.steps, recipe.evaluate.every):
        return
    with s.progress.phase("pictures"):
        uncertainty_B = uncertainty(scores, "batch") if scores.auxiliaries else None
        shown = chosen(scores, credit, uncertainty_B, settings.count)
        if not shown:
            return
        ids = [int(scores.sample_B[row]) for row in shown]
        pictures_N3HW = thumbnails(rollout, ids, settings.longest, s.engine)
        if s.engine.rank:
            return
        data, path = recipe.data, kept.picture_of(step)
        prompts = step_prompts(s.prompts, rollout.step, data.prompts_per_step, recipe.run.seed)
        said = [
            {"prompt": str(prompts[int(scores.group_B[row])]), "shown": shown[row], **about}
            for row, about in zip(shown, _about(s, list(shown), scores, credit, uncertainty_B),
                                  strict=True)
        ]  # fmt: skip
        size = [pictures_N3HW.shape[3], pictures_N3HW.shape[2]]
        record = {"step": step, "images": str(path), "size": size, "samples": said}
        try:
            save_grid(
                pictures_N3HW.float() / 255,
                recipe.run_folder / path,
                columns=len(ids),
                scale=1,
                padding=0,
            )
            kept.keep(recipe.run_folder, record)
        except OSError as error:  # a full disk: the run is worth more than its pictures
            s.progress.message(f"pictures of step {step} not kept: {error}")


def chosen(
    scores: Scores, credit: Credit, uncertainty_B: Tensor | None, count: int
) -> dict[int, list[str]]:
    """Rows of the samples that are kept, with what each is shown as.

    best, worst: by proxy. gated: the gated ones whose proxy and auxiliaries are furthest apart;
    trusted: the best by proxy of the others. The latter two only where some are gated and not all.
    """
    valid_B = scores.valid_B & scores.proxy_B.isfinite()
    kinds = {}
    caught_B, free_B = valid_B & credit.gate_B, valid_B & ~credit.gate_B
    if uncertainty_B is not None and caught_B.any() and free_B.any():
        kinds["gated"] = _first(uncertainty_B.abs(), caught_B, scores.sample_B, count)
        kinds["trusted"] = _first(scores.proxy_B, free_B, scores.sample_B, count)
    kinds["best"] = _first(scores.proxy_B, valid_B, scores.sample_B, count)
    kinds["worst"] = _first(-scores.proxy_B, valid_B, scores.sample_B, count)
    shown: dict[int, list[str]] = {}
    for kind, rows in kinds.items():
        for row in rows:
            shown.setdefault(row, []).append(kind)
    return shown


def _first(key_B: Tensor, among_B: Tensor, sample_B: Tensor, count: int) -> list[int]:
    """At most `count` rows of the largest key; of equal ones the lower sample id first."""
    by_sample = sample_B.argsort(stable=True)
    order = by_sample[key_B[by_sample].argsort(descending=True, stable=True)]
    rows: list[int] = order[among_B[order]].tolist()
    return rows[:count]


def thumbnails(rollout: Rollout, ids: Sequence[int], longest: int, ranks: Ranks) -> Tensor:
    """Pictures of these samples from whichever rank has them, uint8 [N, 3, h, w] on the host."""
    images_B3HW = rollout.images_B3HW
    height, width = images_B3HW.shape[2:]
    scale = min(1.0, longest / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    place = {sample: row for row, sample in enumerate(rollout.sample_B.tolist())}
    here = [n for n, sample in enumerate(ids) if sample in place]
    found_N3HW = torch.zeros(len(ids), 3, *size, dtype=torch.uint8, device=images_B3HW.device)
    if here:
        rows = to_device(torch.tensor([place[ids[n]] for n in here]), images_B3HW.device)
        picked = images_B3HW[rows].float().nan_to_num(nan=0.0).clamp(0, 1)
        if scale < 1:
            picked = F.interpolate(picked, size, mode="area")
        into = to_device(torch.tensor(here), images_B3HW.device)
        found_N3HW[into] = (picked * 255).round().to(torch.uint8)
    return ranks.all_gather(found_N3HW[None]).amax(0).cpu()


def _about(
    s: Session, rows: Sequence[int], scores: Scores, credit: Credit, uncertainty_B: Tensor | None
) -> list[dict[str, Any]]:
    """What is told of each sample, as report/kept.py has it."""
    proxy_rank_B = win_rate(scores.proxy_B, scores.valid_B)
    ranks = {name: win_rate(scores.rewards[name], scores.masks[name]) for name in scores.rewards}
    nearest_B = scores.measures.get("nearest")
    return [
        {
            "sample": int(scores.sample_B[row]),
            "proxy": _number(scores.proxy_B[row]),
            "proxy_rank": _number(proxy_rank_B[row]),
            "uncertainty": None if uncertainty_B is None else _number(uncertainty_B[row]),
            "gated": bool(credit.gate_B[row]),
            "advantage": _number(credit.advantage_B[row]),
            "nearest": None if nearest_B is None else _number(nearest_B[row]),
            "rewards": {
                name: {
                    "value": _number(scores.rewards[name][row]) if mask_B[row] else None,
                    "rank": _number(ranks[name][row]) if mask_B[row] else None,
                    "role": s.panel.rewards[name].settings.role,
                }
                for name, mask_B in scores.masks.items()
                if name in ranks
            },
        }
        for row in rows
    ]


def _number(value: Tensor) -> float | None:
    """JSON has no NaN."""
    number = float(value)
    return number if math.isfinite(number) else None
