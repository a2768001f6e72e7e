"""Numbers that are not finite: in a gradient, in a loss, in a reward, in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gardo.distributed.saved import MANIFEST, Saved, committed, self_digest, sha256
from gardo.report.metrics_log import step_records
from gardo.selftest.case import Case, must
from gardo.selftest.trial import Trial, bits

BASES: dict[str, dict[str, Any]] = {
    "flow_grpo": {"name": "flow_grpo", "clip_range": 1.0e-3, "beta": 0.1},
    "ddpo": {"name": "ddpo"},
    "diffusion_nft": {"name": "diffusion_nft", "beta": 0.04},
    "refl": {"name": "refl", "weight": 1.0},
}
ODD = "gardo.selftest.faults:Odd"


def flawed(base: str, *at: int, **how: Any) -> dict[str, Any]:
    """The algorithm, with a flaw in some iterations."""
    return {"name": "gardo.selftest.faults:Flawed", "base": BASES[base], "at": list(at), **how}


def masters(run: Path, step: int) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the weights, flat, by name."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for file in sorted(folder.glob("master-*.safetensors")):
        for key, value in load_file(file).items():
            name, _, start = key.rpartition("@")
            pieces.setdefault(name, {})[int(start)] = value
    return {name: torch.cat([of[at] for at in sorted(of)]) for name, of in pieces.items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(v, right[n]) for n, v in left.items())


def left_out(trial: Trial, changes: dict[str, Any], *, ranks: int = 0) -> None:
    """The second of three iterations is flawed: it moves no weight, and the third one does."""
    recipe = trial.recipe(checkpoint={"keep": 3, "every": 1, "background": False}, **changes)
    ended = trial.train(recipe, ranks=ranks)
    must(ended.code == 0, ended.said)
    first, second, third = (masters(trial.run(), step) for step in (1, 2, 3))
    must(equal(first, second), "the weights moved in the flawed iteration")
    must(not equal(second, third), "the weights did not move in the iteration after it")
    must(all(v.isfinite().all() for v in third.values()), "weights are not finite")
    skipped = [record["metrics"].get("skipped_updates", 0) for record in step_records(trial.run())]
    must(skipped == [0, 1, 0], f"counted as {skipped}")
    must("updates left out" in ended.said, ended.said)


def one(base: str, flaw: str) -> Callable[[Trial], None]:
    def check(trial: Trial) -> None:
        left_out(trial, {"algorithm": flawed(base, 2, flaw=flaw)})

    return check


def on_one_rank(stage: int) -> Callable[[Trial], None]:
    def check(trial: Trial) -> None:
        distributed = {"engine": "zero", "stage": stage}
        algorithm = flawed("flow_grpo", 2, flaw="loss", rank=1)
        left_out(trial, {"algorithm": algorithm, "distributed": distributed}, ranks=2)
        alone = trial.recipe("alone.yaml", algorithm=flawed("flow_grpo", 2), run={"name": "alone"})
        ended = trial.train(alone)
        must(ended.code == 0, ended.said)
        theirs = masters(trial.run("alone"), 3)
        for name, value in masters(trial.run(), 3).items():
            close = torch.allclose(value, theirs[name], rtol=1e-3, atol=1e-6)
            must(close, f"{name} is not what one process makes of it")

    return check


def in_a_row(trial: Trial) -> None:
    algorithm = flawed("flow_grpo", 2, 3, 4)
    ended = trial.train(trial.recipe(algorithm=algorithm, run={"steps": 6}))
    must(ended.code == 1 and "3 updates in a row could not be made" in ended.said, ended.said)
    folder = trial.run() / "bad-updates" / "step-000004"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    must(report["checkpoint"] == 3, report)
    seen = json.loads((folder / "rank-00000.json").read_text(encoding="utf-8"))
    must(len(seen["samples"]) == 8 and len(seen["micro_batches"]) == 2, seen)
    mended = trial.recipe("mended.yaml", algorithm=flawed("flow_grpo", 2), run={"steps": 6})
    again = trial.train(mended, "--resume")
    must(again.code == 0 and "resumed after step 3" in again.said, again.said)
    must(all(v.isfinite().all() for v in masters(trial.run(), 6).values()), "not finite")


def without_rewards(trial: Trial) -> None:
    left_out(trial, {"rewards": {"odd": {"kind": ODD, "role": "proxy", "nan_at": [3]}}})


def rewards_gone(trial: Trial) -> None:
    rewards = {"odd": {"kind": ODD, "role": "proxy", "nan_from": 3}}
    ended = trial.train(trial.recipe(rewards=rewards, run={"steps": 9}))
    must(ended.code == 1 and "3 updates in a row could not be made" in ended.said, ended.said)
    must("8 of 8 images have no value" in ended.said, ended.said)
    must("--resume goes on after step 4" in ended.said, ended.said)
    last, before = masters(trial.run(), 4), masters(trial.run(), 3)
    must(bool(last) and equal(last, before), "the weights moved")


def spoil(folder: Path) -> None:
    """Puts a NaN into a checkpoint, as a release before this one would have saved it."""
    file = next(folder.glob("master-*.safetensors"))
    tensors = load_file(file)
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, file)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    for entry in manifest["files"]:
        if entry["name"] == file.name:
            entry["sha256"] = sha256(file)
    manifest["sha256"] = self_digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def passed_over(trial: Trial) -> None:
    recipe = trial.recipe()
    must(trial.train(recipe).code == 0, "the run itself failed")
    before, newest = bits(trial.run()), committed(trial.run() / "checkpoints")[0]
    spoil(newest)
    must(Saved(newest).damage() is None, "the spoiled checkpoint does not verify")
    exported = trial.type("export", str(trial.run()))
    must(exported.code == 2 and "is not finite" in exported.said, exported.said)
    ended = trial.train(recipe, "--resume")
    must(ended.code == 0 and "checkpoint passed over" in ended.said, ended.said)
    must("resumed after step 2" in ended.said, ended.said)
    must(bits(trial.run()) == before, "the resumed run ended in other bits")


NO_UPDATE = "the update is left out on every rank, counted and logged; training goes on, all finite"
CASES = [
    *(
        Case(
            f"nan-{flaw}-{base.replace('_', '-')}", f"{base}: one {flaw} is NaN", NO_UPDATE,
            one(base, flaw), quick=(base, flaw) in (("ddpo", "gradient"), ("flow_grpo", "loss")),
        )
        for base in BASES
        for flaw in ("gradient", "loss")
    ),
    Case("nan-ratio", "flow_grpo: the policy's ratio is NaN before the first update", NO_UPDATE,
         one("flow_grpo", "ratio")),
    *(
        Case(
            f"nan-one-rank-stage-{stage}", f"a loss is NaN on one of two ranks, ZeRO stage {stage}",
            NO_UPDATE, on_one_rank(stage), quick=stage == 3,
        )
        for stage in range(4)
    ),
    Case("nan-in-a-row", "three gradients in a row are NaN",
         "exit 1 with a message; bad-updates/ shows the last iteration; --resume goes on from "
         "finite weights", in_a_row),
    Case("no-rewards-once", "no image of an iteration gets a reward", NO_UPDATE, without_rewards),
    Case("no-rewards", "rewards stop to come",
         "an event, then exit 1 with a message after three iterations; no weight moves",
         rewards_gone),
    Case("nan-checkpoint", "the newest checkpoint holds a NaN",
         "--resume passes over it, says so and ends in the bits of the undisturbed run; export "
         "refuses it", passed_over),
]  # fmt: skip
