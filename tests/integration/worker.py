"""Runs many small cases in one process group: launch.py forks it, or the deepspeed launcher starts

    python -m tests.integration.worker FOLDER CASES.json

For every case rank 0 writes FOLDER/NAME.safetensors (noise and images of the first rollout, the
model's output before and after, what the probes saw) and FOLDER/NAME.json (all-gathers by phase),
and leaves the run in FOLDER/RUN.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gardo.config import check
from gardo.distributed.base import leave_process_group
from gardo.distributed.blocks import leaves_of
from gardo.distributed.checkpoint import Checkpoints, CheckpointSettings
from gardo.phases import publish
from gardo.policies import compiling
from gardo.rollout import noise_id
from gardo.session import Session, open_session
from gardo.streams import Stream
from gardo.train import train
from gardo_kernels import random_normal
from tests.integration.cases import Case, loads
from tests.integration.faults import FAULTS, AllGathers, Cut, CutShort
from tests.integration.probes import PROBES, FirstImages, PhaseGathers, velocity
from tests.integration.recipes import recipe
from tests.interpreter import look_once


def save_again(session: Session, folder: Path) -> None:
    """What the session has loaded, as a checkpoint in `folder`."""
    again = Checkpoints(folder, session.engine, CheckpointSettings())
    assert again.save(session.first_step, session.state()) is None
    again.close()


def first_noise(session: Session) -> torch.Tensor:
    """Of all ranks' samples of the first rollout."""
    plan, engine = session.geometry, session.engine
    sample_B = torch.arange(plan.first, plan.first + plan.samples, device=engine.device)
    shape = session.policy.latent_shape
    seed = session.recipe.run.seed
    noise = random_normal(seed, noise_id(0, sample_B), Stream.INITIAL, shape)
    return engine.all_gather(noise)


def modules(session: Session) -> dict[str, int]:
    """How many blocks the model has, and units of gathering outside them: leaf modules, and what
    has weights of its own."""
    transformer, blocks = session.policy.transformer, session.policy.blocks()
    leaves = leaves_of(transformer, blocks)
    inside = {id(m) for leaf in leaves for m in leaf.modules()}
    others = [m for m in transformer.modules() if id(m) not in inside]
    weighty = sum(1 for m in others if list(m.parameters(recurse=False)))
    return {"blocks": len(blocks), "outside": len(leaves) - len(blocks) + weighty}


def look(session: Session, case: Case, phases: PhaseGathers) -> tuple[dict[str, Any], Any]:
    """Trains, then lets every probe look: tensors, and facts for JSON."""
    panel = FirstImages(session.panel.rewards)
    session.panel = panel
    session.progress = phases  # type: ignore[assignment]
    seen = {
        "start": velocity(session),
        "sigmas": session.algorithm.world.sigmas,
        "noise": first_noise(session),
    }
    train(session)
    publish(session)
    if panel.images is not None:
        seen["images"] = session.engine.all_gather(panel.images)
    facts = {
        "first_step": session.first_step,
        "phases": list(phases.seen),
        "gather_note": session.engine.gather_note,
    }
    seen["live"] = velocity(session)
    for name in sorted(case.probes, key=list(PROBES).index):
        seen |= PROBES[name](session)
    return seen, facts | modules(session)


def run(case: Case, folder: Path, gathers: AllGathers) -> None:
    fault = FAULTS[case.fault]
    compiling.BACKEND = "aot_eager" if case.has("compiled") else "inductor"
    with fault.opening(gathers):
        session = open_session(
            check(recipe(case, folder), case.name), quiet=True, resume=case.resume or case.reshard
        )
    with suppress(Cut), session:
        if case.reshard:
            save_again(session, folder / case.name / "checkpoints")
            return
        fault.opened(session)
        if case.cut is not None and not case.resume:
            session.engine = CutShort(session.engine, after=case.cut)  # type: ignore[assignment]
        seen, facts = look(session, case, PhaseGathers(session.progress, gathers))
        assert case.cut is None or case.resume, f"{case}: came to its end"
        if session.log:
            save_file(seen, folder / f"{case.name}.safetensors")
            (folder / f"{case.name}.json").write_text(json.dumps(facts))
        return
    session.engine.close()  # which a run that dies does not do; the next case wants it


def run_cases(folder: Path, cases: Sequence[Case]) -> None:
    look_once()
    with AllGathers() as gathers:
        for case in cases:
            began, used = time.monotonic(), time.process_time()
            run(case, folder, gathers)
            took, used = time.monotonic() - began, time.process_time() - used
            print(f"{case.name}  {took:.1f} s, {used:.1f} s of its core", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--local_rank")
    options = parser.parse_args()
    run_cases(options.folder, loads(options.cases.read_text()))
    leave_process_group()


if __name__ == "__main__":
    main()
