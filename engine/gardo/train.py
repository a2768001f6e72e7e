"""The training loop: sample, score, credit, teach, train.

What `deepspeed --module gardo.train RECIPE` launches. Reads top to bottom for every algorithm: the
loop never asks which one it is.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from gardo.config import RecipeError, load
from gardo.data import step_prompts
from gardo.distributed.base import gather_record, leave_process_group
from gardo.evaluation.evaluate import due
from gardo.export import export_run, save_final
from gardo.report.html import write_report
from gardo.rollout import batch_of, minibatches, sample, teach
from gardo.session import Session, open_session
from gardo.types import Credit, Metrics, Points, Rollout, Scores, select


def train(s: Session) -> None:
    """Runs the session's remaining steps; leaves weights, export and report in the run's folder."""
    recipe, engine, algorithm, slots, plan = (
        s.recipe,
        s.engine,
        s.algorithm,
        s.engine.slots,
        s.geometry,
    )
    evaluate(s, s.first_step)
    for step in range(s.first_step, recipe.run.steps):
        phase = s.progress.phase
        with phase("sample"), slots.use((sampling := algorithm.plan(step)).weights):
            rollout = sample(
                s.policy,
                step_prompts(s.prompts, step, recipe.data.prompts_per_step, recipe.run.seed),
                sampling,
                images_per_prompt=recipe.data.images_per_prompt,
                first=plan.first,
                count=plan.samples,
                seed=recipe.run.seed,
                step=step,
                device=engine.device,
                micro_batch=recipe.run.rollout_batch,
            )
        with phase("reward"):
            scores = s.panel(
                rollout.images_B3HW,
                rollout.prompts,
                sample_B=rollout.sample_B,
                group_B=rollout.group_B,
            )
            scores = gather_record(engine, scores)
            everyone = algorithm.credit(scores)
            credit = select(everyone, rollout.sample_B)
        with phase("teachers"):
            points = algorithm.points(rollout, credit)
            points = taught(s, points, rollout, algorithm.teachers(points, credit))
            points = hold_contract(s, points, credit, rollout)
        with phase("train"):
            totals, norms = Metrics(), []
            s.ctx.rollout = rollout
            for batch in minibatches(
                points,
                credit,
                sample_B=rollout.sample_B,
                updates=recipe.train.updates_per_step,
                micro_batch=plan.micro_batch,
                seed=recipe.run.seed,
                step=step,
            ):
                loss, metrics = algorithm.loss(s.ctx, batch)
                totals.add(metrics)
                engine.backward(loss)
                if engine.step():
                    norms.append(engine.grad_norm)
                    algorithm.after_update(slots)
            totals = engine.reduce(totals)
            events = algorithm.after_step(slots, totals)
        log_step(s, step, scores, everyone, totals, norms, events)
        if due(step + 1, recipe.run.steps, recipe.evaluate.every):
            evaluate(s, step + 1)
    finish(s)


def taught(s: Session, points: Points, rollout: Rollout, wanted: dict[str, torch.Tensor]) -> Points:
    """The points with the velocities that were asked for."""
    return teach(
        points,
        wanted,
        policy=s.policy,
        conditioning=rollout.conditioning,
        engine=s.engine,
        use=s.engine.slots.use,
        micro_batch=s.geometry.micro_batch,
    )


def hold_contract(s: Session, points: Points, credit: Credit, rollout: Rollout) -> Points:
    """The points with old velocities that agree with the training numerics (gardo.contract)."""

    @torch.no_grad()
    def probe(points: Points) -> float:
        batch = batch_of(
            points, credit, torch.arange(s.geometry.micro_batch, device=s.engine.device)
        )
        s.ctx.rollout = rollout
        log_ratio_R = s.algorithm.log_ratio(batch, s.ctx.velocity(batch))
        seen = Metrics().maximum("error", log_ratio_R.expm1().abs())
        return s.engine.reduce(seen)["error"]

    def recompute(points: Points) -> Points:
        return taught(
            s, points, rollout, {"train": torch.ones_like(points.sample_R, dtype=torch.bool)}
        )

    return s.algorithm.contract.hold(points, probe, recompute)


def evaluate(s: Session, step: int) -> None:
    start = time.monotonic()
    with s.progress.phase("evaluate"):
        record = s.evaluator(step)
    s.progress.take_seconds()
    record["seconds"] = time.monotonic() - start
    s.write(record)
    s.progress.evaluation(record)


def log_step(
    s: Session,
    step: int,
    scores: Scores,
    credit: Credit,
    totals: Metrics,
    norms: list[float],
    events: list[str],
) -> None:
    """One line of metrics.jsonl and of the progress."""
    contract = s.algorithm.contract
    metrics = {
        **totals.as_dict(),
        **credit.info,
        "grad_norm": max(norms),
        "lr": s.recipe.train.optimizer.lr,
    }
    if contract.error == contract.error:  # not NaN: the algorithm has a ratio
        metrics["ratio_error"] = contract.error
    rewards = {}
    for name, values_B in scores.rewards.items():
        valid = values_B[scores.masks[name]]
        rewards[name] = {
            "mean": float(valid.mean()),
            "std": float(valid.std(correction=0)),
            "role": s.panel.rewards[name].settings.role,
            "valid": len(valid),
        }
    record = {
        "kind": "step",
        "step": step + 1,
        "seconds": s.progress.take_seconds(),
        "rewards": rewards,
        "metrics": metrics,
        "events": [*filter(None, [contract.event]), *events],
    }
    s.write(record)
    s.progress.step(record)


def finish(s: Session) -> None:
    """Saves the weights, exports them for diffusers, writes the report, and says where they are."""
    weights = s.engine.gather_weights()
    if s.engine.rank == 0:
        folder = s.recipe.run_folder
        save_final(folder, weights)
        exported = export_run(folder, policy=s.policy)
        report = write_report(folder)
        s.progress.message(f"report  {report}")
        s.progress.message(f"export  {exported}")
    s.engine.barrier()


def main(arguments: list[str] | None = None) -> int:
    """`--local_rank` is what the deepspeed launcher passes; everything else is `gardo train`'s."""
    parser = argparse.ArgumentParser(
        "gardo.train", description="Train a recipe in this process group."
    )
    parser.add_argument("recipe")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="overrides"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        recipe = load(options.recipe, options.overrides)
        session = open_session(recipe, source=options.recipe)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        train(session)
    finally:
        session.progress.close()
        if session.log:
            session.log.close()
        session.engine.close()
    leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
