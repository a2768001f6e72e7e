"""What is asserted of a case that has run: what its run logged, what its probes saw."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gardo.report.metrics_log import read_metrics
from tests.integration.cases import Case
from tests.integration.coverings import alone
from tests.integration.recipes import recipe

COMPARED = ("loss", "policy_loss", "kl", "gate_share", "ratio", "grad_norm", "reward_x0",
            "clip_fraction", "ema_kl", "kl_in_reward", "kl_loss")  # fmt: skip


MEASURED = ("seconds", "calls", "rows", "images_per_second", "peak_bytes", "compiled_graphs")


def logged(run: Path) -> list[dict[str, Any]]:
    """The run's records without what its phases took: a probe of ours calls the model too."""
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in records]


def steps_of(folder: Path, case: Case) -> list[dict[str, Any]]:
    """The records of the iterations of a case's run."""
    return [r for r in read_metrics(folder / case.run / "metrics.jsonl") if r["kind"] == "step"]


def seen(folder: Path, case: Case) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{case.name}.safetensors")


def facts(folder: Path, case: Case) -> dict[str, Any]:
    return json.loads((folder / f"{case.name}.json").read_text())


def close(one: float, two: float, name: str, floor: float, rel: float) -> bool:
    """Within `rel`; policy terms of a group sum to about 0: their scale is the advantage's, 1."""
    absolute = floor if name in ("loss", "policy_loss") else 1e-9
    both_nan = math.isnan(one) and math.isnan(two)
    return both_nan or math.isclose(one, two, rel_tol=rel, abs_tol=absolute)


def check_metrics(
    one: dict[str, Any], two: dict[str, Any], floor: float = 1e-6, rel: float = 1e-4
) -> None:
    """Two records of the same iteration, trained in different ways."""
    assert one["metrics"].keys() == two["metrics"].keys()
    for name in [n for n in COMPARED if n in one["metrics"]]:
        values = one["metrics"][name], two["metrics"][name]
        assert close(*values, name, floor, rel), (one["step"], name, *values)


def compare(local: Path, other: Path, case: Case, rel: float = 1e-4) -> None:
    """Noise, images and every iteration of a case, with those of one process."""
    mine, theirs = seen(local, alone(case)), seen(other, case)
    assert torch.equal(mine["noise"], theirs["noise"])
    torch.testing.assert_close(mine["images"], theirs["images"], rtol=0, atol=1e-5)
    steps, other_steps = steps_of(local, alone(case)), steps_of(other, case)
    assert len(steps) == len(other_steps) == case.steps
    # a judge of pairs sees 8 bits: a pixel that rounds the other way moves an advantage by about
    # as much
    floor = 1e-5 if case.has("pref") else 1e-6
    for one, two in zip(steps, other_steps, strict=True):
        assert one["events"] == two["events"]
        # the contract: half the clip range, 1e-3 in these cases, and no recomputing was needed
        assert two["metrics"].get("ratio_error", 0.0) <= 5e-4
        assert not any("ratio" in event for event in two["events"])
        check_metrics(one, two, floor, rel)


def slots_of(case: Case) -> set[str]:
    """What the case keeps copies of the weights for."""
    average = {"average"} if case.has("ema") else set()
    if case.algorithm == "refl":
        return average
    means = {"nft": "old", "awm": "ema"}
    own = {means[part] for part in case.algorithm.split("_") if part in means}
    return {"reference", *own, *average}


def check_slots(folder: Path, case: Case) -> None:
    """Bit for bit: a slot that was never reset is the start, own weights come back, copies are."""
    said = seen(folder, case)
    slots = {name.removeprefix("slot.") for name in said if name.startswith("slot.")}
    assert slots == slots_of(case)
    assert not torch.equal(said["live"], said["start"])
    for name in slots:
        assert torch.equal(said[f"after.{name}"], said["live"])
        assert torch.equal(said[f"copied.{name}"], said["live"])
        assert not torch.equal(said[f"slot.{name}"], said["live"])
    if "reference" in slots:  # GARDO resets it
        was_reset = case.algorithm.startswith("gardo")
        assert torch.equal(said["slot.reference"], said["start"]) != was_reset


def check_teachers(folder: Path, case: Case) -> None:
    """All gated samples on one rank, none, all: every rank made the same calls, or it had hung."""
    said = seen(folder, case)
    errors = {n.removeprefix("teacher."): float(v) for n, v in said.items() if "teacher." in n}
    if case.algorithm == "refl":
        assert not errors
        return
    assert errors.keys() == {"all", "none", "one_rank", "one_row"}
    assert errors["all"] == errors["none"] == errors["one_rank"] == 0
    assert errors["one_row"] < 1e-5  # alone in its micro-batch: another batch shape


def check_gathers(folder: Path, case: Case) -> None:
    """Under the tightest limits: per block one gather forward and one backward, no more.

    A forward pass gathers each block, and outside the blocks each leaf module and each module that
    has weights of its own. The backward pass gathers what has a gradient to pass on: all of it
    again, or, under LoRA, the blocks, the last norm and the last projection. Gathering once takes a
    collective for each block and one for the rest, however many passes follow.
    """
    found, made = facts(folder, case), recipe(case, folder)
    blocks, outside = found["blocks"], found["outside"]
    assert (blocks, outside) == (4, 5)
    forward, once = blocks + outside, blocks + 1
    backward = blocks + 2 if case.weights == "lora" else forward
    images = made["data"]["prompts_per_step"] * made["data"]["images_per_prompt"] // 2  # of a rank
    rows = images * made["sampler"]["train_steps"]
    denoised = made["sampler"]["steps"] * images // made["rollout"]["batch"]
    passes = {"sample": denoised, "evaluate": made["evaluate"]["steps"]}
    counts: dict[str, set[int]] = {}
    for phase, count in found["phases"]:
        counts.setdefault(phase, set()).add(count)
    for phase, number in passes.items():
        assert counts[phase] == {number * forward if case.has("each") else once}, phase
    ahead = forward  # of the first micro-batch: it tells whether the ratio holds; its loss takes it
    # then the reference, in two calls, unless it is the sampler
    assert counts["teachers"] == {ahead, ahead + (2 * forward if case.has("each") else once)}
    calls, both = rows // made["train"]["micro_batch"], forward + backward
    left_out = [r["metrics"]["rows_left_out"] for r in steps_of(folder, case)]  # of both ranks
    fewer = [rows // 2 // made["train"]["micro_batch"] for rows in left_out]
    trained = [count for phase, count in found["phases"] if phase == "train"]
    assert trained == [(calls - n) * both - ahead for n in fewer]
    assert counts["reward"] == {0}
