"""The training loop: sample, score, credit, teach, train. What the deepspeed launcher starts.

It reads top to bottom for every algorithm and never asks which one it is; phases.py has the phases.
"""

from __future__ import annotations

import argparse
import sys

from gardo.config import load
from gardo.distributed.base import leave_process_group
from gardo.evaluation.evaluate import due
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
    held_to_contract,
    log_step,
    publish,
    sampled,
    scored,
    taught,
)
from gardo.recipe_errors import RankError, RecipeError
from gardo.session import Session, open_session
from gardo.types import Metrics, select


def train(s: Session) -> None:
    """Runs the session's remaining steps; leaves checkpoints and a log in its folder."""
    algorithm, engine, slots, phase = s.algorithm, s.engine, s.engine.slots, s.progress.phase
    if s.first_step == 0:
        evaluate(s, 0)
    for step in range(s.first_step, s.recipe.run.steps):
        with phase("sample"):
            rollout = sampled(s, step)
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
            totals, norms = Metrics(), []
            for batch in batches:
                loss, metrics = algorithm.loss(s.ctx, batch)
                totals.add(metrics)
                engine.backward(loss, last=batch.last)
                with phase("optimizer"):
                    stepped = engine.step()
                if stepped:
                    norms.append(engine.grad_norm)
                    algorithm.after_update(slots)
                    average(s)
            totals = engine.reduce(totals)
            events = algorithm.after_step(slots, totals)
        log_step(s, step + 1, scores, everyone, work, totals, norms, events)
        if due(step + 1, s.recipe.run.steps, s.recipe.evaluate.every):
            evaluate(s, step + 1)
        checkpoint(s, step + 1)
    finish(s)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 for a recipe that cannot be used.

    `--local_rank` is what the deepspeed launcher passes.
    """
    parser = argparse.ArgumentParser("gardo.train", description="Train a recipe.")
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--profile", action="store_true", help="a trace of one step")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        recipe = load(options.recipe, options.sets)
        session = open_session(
            recipe, source=options.recipe, resume=options.resume, profile=options.profile
        )
    except RecipeError as error:
        # the others of the machine say the same
        if ranks()[1] == 0 or isinstance(error, RankError):
            print(error, file=sys.stderr, flush=True)
        refuse(error)
        return 2
    with session:
        train(session)
    leave_process_group()
    publish(session)
    return 0


if __name__ == "__main__":
    sys.exit(main())
