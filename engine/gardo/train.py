"""The training loop: sample, score, credit, teach, train. What the deepspeed launcher starts.

It reads top to bottom for every algorithm and never asks which one it is; phases.py has the phases.
"""

from __future__ import annotations

import argparse
import sys

import torch

from gardo.bad_updates import Made, RunStopped
from gardo.config import load
from gardo.distributed.base import leave_process_group
from gardo.ending import Stopped, Watchdog, die_with_launcher, leave
from gardo.evaluation.evaluate import due
from gardo.kept_samples import keep_samples
from gardo.machine import ranks
from gardo.meeting import refuse
from gardo.phases import (
    average,
    checkpoint,
    commit_checkpoint,
    credited,
    divided,
    evaluate,
    finish,
    heed,
    held_to_contract,
    log_step,
    publish,
    sampled,
    scored,
    skipped_because,
    stop_where_bad,
    stopped,
    taught,
    unusable,
    update_ended,
)
from gardo.recipe_errors import RankError, RecipeError
from gardo.run_lock import RunLock
from gardo.session import Session, open_session
from gardo.types import select


def train(s: Session) -> None:
    """Runs the session's remaining steps; leaves checkpoints and a log in its folder."""
    algorithm, engine, slots, phase = s.algorithm, s.engine, s.engine.slots, s.progress.phase
    steps, every = s.recipe.run.steps, s.recipe.evaluate.every
    if s.evaluated < s.first_step and due(s.first_step, steps, every):  # the run may have been cut
        evaluate(s, s.first_step)
    for step in range(s.first_step, steps):
        with phase("sample"):
            rollout = sampled(s, step)
        heed(s)
        commit_checkpoint(s)  # the one being written, if it is written by now
        with phase("reward"):
            scores = scored(s, rollout)
            everyone = credited(s, scores, step)
            credit = select(everyone, rollout.sample_B)
        with phase("teachers"):
            points = algorithm.points(rollout, credit)
            work = divided(s, points, credit, rollout)
            points = taught(s, points, rollout, algorithm.teachers(points, credit))
            batches = held_to_contract(s, points, credit, rollout, work)
        with phase("train"):
            made = Made(unusable(s, scores))
            for batch in batches:
                loss, metrics = algorithm.loss(s.ctx, batch)
                made.add(loss, metrics)
                engine.backward(loss * torch.nan if made.void else loss, last=batch.last)
                with phase("optimizer"):
                    stepped = engine.step()
                if stepped and update_ended(s, made):
                    algorithm.after_update(slots)
                    average(s)
            totals = engine.reduce(made.totals)
            events = algorithm.after_step(slots, totals) if made.norms else []
        events = [*events, *skipped_because(made)]
        keep_samples(s, step + 1, rollout, scores, everyone)
        log_step(s, step + 1, scores, everyone, work, totals, made, events)
        stop_where_bad(s, step + 1, scores, rollout, points, work, made)
        if due(step + 1, steps, every):
            evaluate(s, step + 1)
        checkpoint(s, step + 1)
    finish(s)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, 1 for a run that ended itself, or 2 for a recipe that cannot be used; of a run
    that was asked to end, 0 where it can be gone on with, else 128 + the signal's number.

    `--local_rank` is what the deepspeed launcher passes.
    """
    parser = argparse.ArgumentParser("gardo.train", description="Train a recipe.")
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--profile", action="store_true", help="a trace of one step")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.local_rank is not None:
        die_with_launcher()
    try:
        recipe = load(options.recipe, options.sets)
        with RunLock(recipe.run_folder) as lock:
            session = open_session(
                recipe,
                source=options.recipe,
                resume=options.resume,
                profile=options.profile,
                lock=lock,
            )
            return _carry_out(session)
    except RecipeError as error:
        # the others of the machine say the same
        if ranks()[1] == 0 or isinstance(error, RankError):
            print(error, file=sys.stderr, flush=True)
        refuse(error)
        return 2


def _carry_out(s: Session) -> int:
    """Trains to the end, or until the run is asked to end or ends itself; the exit code."""
    clock, folder = s.progress.phases, s.recipe.run_folder
    stacks = folder / f"hung-rank-{s.engine.rank}.txt"
    code = None
    with s, s.stop, Watchdog(clock, s.recipe.run.watchdog, stacks, s.engine.rank):
        try:
            train(s)
        except Stopped as asked:
            code = stopped(s, asked)
        except RunStopped as error:  # by every rank alike
            if s.engine.rank == 0:
                print(error, file=sys.stderr)
            code = 1
    leave_process_group()
    return int(not publish(s)) if code is None else code


if __name__ == "__main__":
    leave(main())
