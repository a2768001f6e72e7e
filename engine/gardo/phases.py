"""The phases of the training loop, one function each; gardo/train.py calls them in order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gardo import reproduction
from gardo.algorithms.kl import weighed
from gardo.algorithms.uncertainty import disagreement
from gardo.bad_updates import Made, RunStopped
from gardo.contract import RatioContractBroken
from gardo.data import step_prompts
from gardo.ending import Stopped
from gardo.evaluation.evaluate import due
from gardo.export import export_run
from gardo.report.environment import resume_command
from gardo.report.html import write_report
from gardo.report.metrics_log import step_records
from gardo.report.phase_clock import fields
from gardo.report.phase_table import as_text
from gardo.rollout import (
    Part,
    Said,
    batch_of,
    groups_of,
    parts,
    recorded_points,
    sample,
    teach,
    update_of,
)
from gardo.scored import judges, summary
from gardo.session import Session
from gardo.types import Batch, Credit, Metrics, Points, Prompt, Rollout, Scores, to_device, together
from gardo.unscored import too_many_unscored, why_unscored

NOT_FINITE = "a loss or a gradient is not finite"


def sampled(s: Session, step: int) -> Rollout:
    """This rank's images of the step, drawn with the weights that the algorithm samples from.

    With what its teachers, if credit needs any, say at the recorded steps.
    """
    recipe, plan, data = s.recipe, s.algorithm.plan(step), s.recipe.data
    prompts = step_prompts(s.prompts, step, data.prompts_per_step, recipe.run.seed)
    groups = groups_of(s.geometry.first, s.geometry.samples, data.images_per_prompt)
    # while no weights are gathered
    conditioning = s.policy.encode([prompts[group] for group in groups])
    with s.engine.reading(plan.weights):
        rollout = sample(
            s.policy,
            prompts,
            plan,
            images_per_prompt=data.images_per_prompt,
            first=s.geometry.first,
            count=s.geometry.samples,
            seed=recipe.run.seed,
            step=step,
            device=s.engine.device,
            micro_batch=s.geometry.sampled,
            fill=s.geometry.fill,
            seed_1=s.algorithm.world.seed_on(s.engine.device),
            conditioning=conditioning,
            finish=partial(finished, s, step) if recipe.rollout.overlap else None,
            beside=s.beside,
            between=partial(heed, s),
            kernels=recipe.kernels,
        )
    return taught_before_credit(s, rollout, plan.teachers)


def finished(
    s: Session, step: int, latents_BX: Tensor, prompts: Sequence[Prompt]
) -> tuple[Tensor, dict[str, Said]]:
    """Images of latents, and what the rewards say of them that need no other image."""
    images_B3HW = s.policy.decode(latents_BX)
    return images_B3HW, s.panel.alone(images_B3HW, prompts, step)


def taught_before_credit(s: Session, rollout: Rollout, teachers: Sequence[str]) -> Rollout:
    """The rollout with the teachers' velocities at all its recorded steps."""
    if not teachers:
        return rollout
    points = recorded_points(rollout)
    everywhere = torch.ones_like(points.sample_R, dtype=torch.bool)
    with s.progress.phase("teachers"):
        points = taught(s, points, rollout, dict.fromkeys(teachers, everywhere))
    shape = rollout.velocity_BTX.shape
    return replace(rollout, velocities={n: points.velocities[n].view(shape) for n in teachers})


def scored(s: Session, rollout: Rollout) -> Scores:
    """Scores of the images of all ranks, on the host: groups and win rates span them.

    One gather and one copy, for which the host waits. Features stay where they are: the algorithm
    has measured what it needs of them.
    """
    scores = s.panel(
        rollout.images_B3HW,
        rollout.prompts,
        sample_B=to_device(rollout.sample_B, s.engine.device),
        group_B=to_device(rollout.group_B, s.engine.device),
        seed=rollout.seed,
        step=rollout.step,
        gather=s.engine.all_gather,
        said=rollout.values,
    )
    scores = replace(scores, kl_B=s.algorithm.trajectory_kl(rollout))
    scores = s.algorithm.measured(together(scores, s.engine.all_gather))
    return together(replace(scores, features_BD=None), Tensor.cpu)


def taught(s: Session, points: Points, rollout: Rollout, wanted: dict[str, Tensor]) -> Points:
    """The points with the velocities that were asked for."""
    return teach(
        points,
        wanted,
        policy=s.policy,
        conditioning=rollout.conditioning,
        engine=s.engine,
        micro_batch=s.geometry.micro_batch,
        fill=s.geometry.fill,
    )


def credited(s: Session, scores: Scores, step: int) -> Credit:
    """What the samples of all ranks are worth, and what their KL weighs in the update of each.

    Nothing where none has a reward: the algorithm is not asked then, and learns nothing of it.
    """
    updates, seed = s.recipe.train.updates_per_step, s.recipe.run.seed
    update_B = update_of(scores.sample_B, updates, seed=seed, step=step)
    if scores.valid_B.any():
        credit = s.algorithm.credit(scores)
    else:
        credit = Credit(torch.zeros_like(scores.proxy_B), torch.zeros_like(scores.valid_B))
    return weighed(credit, update_B, s.algorithm.kl_weights)


def divided(s: Session, points: Points, credit: Credit, rollout: Rollout) -> list[Part]:
    """This rank's rows in micro-batches, update after update; those that weigh nothing left out."""
    recipe = s.recipe
    keep_all = recipe.train.keep_all_rows
    return parts(
        points,
        sample_B=rollout.sample_B,
        updates=recipe.train.updates_per_step,
        micro_batch=s.geometry.micro_batch,
        seed=recipe.run.seed,
        step=rollout.step,
        idle_R=None if keep_all else s.algorithm.weightless(points, credit),
        agree_max=s.engine.agree_max,
    )


def held_to_contract(
    s: Session, points: Points, credit: Credit, rollout: Rollout, work: Sequence[Part]
) -> Iterator[Batch]:
    """The micro-batches, with old velocities that agree with the training numerics.

    gardo.contract says what that means. What tells is the forward pass of the first micro-batch;
    its loss takes the velocity from here, unless the old ones had to be computed again.
    """
    ahead: list[Tensor] = []  # what the first micro-batch's forward pass said

    def probe(now: Points) -> float:
        batch = batch_of(now, credit, work[0], rollout)
        if not ahead:
            with s.progress.phase("probe"):
                ahead.append(s.ctx.velocity(batch))
        log_ratio_R = s.algorithm.log_ratio(batch, ahead[0].detach())
        seen = Metrics().maximum("error", log_ratio_R.expm1().abs())
        return s.engine.reduce(seen)["error"]

    def recompute(now: Points) -> Points:
        # no graph may wait for its backward pass while other forward passes run: ZeRO-3 counts them
        ahead[:] = [velocity_RX.detach() for velocity_RX in ahead]
        trained_R = torch.zeros_like(now.sample_R, dtype=torch.bool)
        trained_R[torch.cat([part.rows for part in work])] = True
        return taught(s, now, rollout, {"train": trained_R})

    contract = s.algorithm.contract
    try:
        points = contract.hold(points, probe, recompute)
    except RatioContractBroken:
        if not math.isinf(contract.error):
            raise  # else not a number somewhere: `unusable` has the iteration left out
    batches = (batch_of(points, credit, part, rollout) for part in work)
    if ahead and ahead[0].requires_grad:
        first = replace(next(batches), velocity_RX=ahead[0])
        return itertools.chain([first], batches)
    return batches


def unusable(s: Session, scores: Scores) -> str:
    """Why no update of the iteration may be made, by all ranks alike; "" where nothing is wrong."""
    if name := too_many_unscored(s, scores):
        return why_unscored(s, scores, name)
    if math.isinf(s.algorithm.contract.error):  # NaN: the algorithm has no ratio
        return "the policy's ratio is not finite before any update"
    return ""


def update_ended(s: Session, made: Made) -> bool:
    """Whether the update that the engine has just ended was made. Counts it."""
    made.end_update(s.engine.grad_norm, skipped=s.engine.skipped)
    s.bad_updates.note(bad=s.engine.skipped)
    return not s.engine.skipped


def skipped_because(made: Made) -> list[str]:
    """The event of an iteration in which updates were left out."""
    if not made.skipped:
        return []
    why = made.void or NOT_FINITE
    return [f"{made.skipped} of {made.skipped + len(made.norms)} updates left out: {why}"]


def stop_where_bad(
    s: Session, step: int, scores: Scores, rollout: Rollout, points: Points, work: Sequence[Part],
    made: Made,
) -> None:  # fmt: skip
    """RunStopped where too many updates could not be made; leaves what shows the last iteration."""
    why = s.bad_updates.reason_to_stop() if made.skipped else None
    if why is None:
        return
    if too_many_unscored(s, scores):  # not the policy's fault: nothing of it is lost
        problem = s.checkpoints.save(step, s.state())
    else:
        problem = s.checkpoints.settle()
    folder = s.recipe.run_folder / "bad-updates" / f"step-{step:06d}"
    saved, engine = s.checkpoints.last_step, s.engine
    with suppress(OSError):  # no room: the message must come all the same
        reproduction.write_rank(
            folder, engine.rank, losses=made.losses, work=work, points=points, rollout=rollout,
            scores=scores,
        )  # fmt: skip
        if engine.rank == 0:
            reproduction.write_report(
                folder, why=why, step=step, world=engine.world, checkpoint=saved
            )
    after = f"--resume goes on after step {saved}" if saved else "there is no checkpoint yet"
    not_saved = f" (not saved: {problem})" if problem else ""
    raise RunStopped(
        f"{s.recipe.run_folder}: {why} (train.bad_updates), the last in iteration {step}: "
        f"{made.void or NOT_FINITE}; see {folder}. The weights are as they were before; "
        f"{after}{not_saved}"
    )


def average(s: Session) -> None:
    """After an optimizer step: the average of the weights follows, where there is one."""
    if s.average:
        s.average.after_update(s.engine.slots)


def evaluate(s: Session, step: int) -> None:
    """Evaluates, logs and shows the weights after `step` iterations, or their average."""
    s.progress.take()
    with s.progress.phase("evaluate"):
        s.evaluator.encode()  # while no weights are gathered
        with s.engine.reading(s.recipe.evaluated):
            record = s.evaluator(step, between=partial(heed, s))
    spent = s.progress.take()
    record |= {"seconds": sum(phase.seconds for phase in spent.values()), **_memory(s)}
    record |= judges(s.panel, s.engine)
    s.write(record)
    s.evaluated = step
    s.progress.evaluation(record)


def log_step(
    s: Session,
    step: int,
    scores: Scores,
    credit: Credit,
    work: Sequence[Part],
    totals: Metrics,
    made: Made,
    events: Sequence[str],
) -> None:
    """One line of metrics.jsonl and of the progress, after `step` finished iterations."""
    s.finished = step
    contract = s.algorithm.contract
    lr = s.recipe.train.optimizer.lr
    metrics = {**totals.as_dict(), **credit.info, "lr": lr}
    if made.norms:
        metrics["grad_norm"] = max(made.norms)
    if made.skipped:
        metrics["skipped_updates"] = made.skipped
    left_out = sum(len(part.rows) * (1 / part.share - 1) for part in work)  # the same on all ranks
    metrics["rows_left_out"] = round(left_out * s.engine.world)
    if scores.auxiliaries:
        metrics["disagreement"] = disagreement(scores)
    if not math.isnan(contract.error):  # the algorithm has a ratio
        metrics["ratio_error"] = contract.error
    peak = s.engine.agree_max(s.progress.phases.memory.reserved)
    spent = s.progress.take()
    images = s.geometry.samples * s.engine.world
    record = {
        "kind": "step",
        "step": step,
        **fields(spent),
        "images_per_second": images / sum(phase.seconds for phase in spent.values()),
        "peak_bytes": peak,  # of the rank with most, since the start
        "rewards": {name: summary(s, scores, credit.gate_B, name) for name in scores.rewards},
        "metrics": metrics,
        "events": [*filter(None, [contract.event]), *events],
        **_memory(s),
        **judges(s.panel, s.engine),
    }
    s.write(record | compiled(s))
    s.progress.step(record)
    if s.profile:
        try:
            s.profile.step()
        except OSError as error:
            s.progress.message(f"profile not written: {error}")
        s.progress.take()  # writing a trace takes seconds, which are not the next step's


def _memory(s: Session) -> dict[str, dict[str, int]]:
    """Bytes that each phase has allocated at its peak, on the rank where they are most."""
    peaks = s.progress.phases.memory.take()
    fullest = {name: s.engine.agree_max(peak) for name, peak in peaks.items()}
    return {"memory": fullest} if fullest else {}


def compiled(s: Session) -> dict[str, int]:
    """Graphs compiled since the last record, with a line that says so: none once all shapes have
    been met."""
    graphs, seconds = s.policy.compiled.take() if s.policy.compiled else (0, 0.0)
    if not graphs:
        return {}
    s.progress.message(f"compiled {graphs} graphs of blocks in {seconds:.0f} s")
    return {"compiled_graphs": graphs}


def commit_checkpoint(s: Session) -> None:
    """Commits a checkpoint that was being written, if it is written by now."""
    with s.progress.phase("checkpoint"):
        problem = s.checkpoints.settle(wait=False)
    if problem:
        s.progress.message(f"checkpoint not saved: {problem}")


def checkpoint(s: Session, step: int) -> None:
    """Saves what a resume needs after `step` iterations, where that is due or was asked for.

    Asking: a file `save-now` in the run's folder.
    """
    last = s.recipe.run.steps
    asked = s.recipe.run_folder / "save-now"
    wanted = s.engine.agree_max(int(s.engine.rank == 0 and asked.exists()))
    if not wanted and not due(step, last, s.recipe.checkpoint.every):
        commit_checkpoint(s)
        return
    with s.progress.phase("checkpoint"):
        if s.log:
            s.log.sync()
        problem = s.checkpoints.save(step, s.state(), wait=bool(wanted) or step == last)
    if problem:
        s.progress.message(f"checkpoint not saved: {problem}")
    elif wanted and s.engine.rank == 0:
        asked.unlink(missing_ok=True)
        s.progress.message(f"checkpoint of step {step} saved, as asked")


def heed(s: Session) -> None:
    """Raises Stopped on all ranks, where one of them was asked to end; the host waits for them.

    Only where nothing that a checkpoint holds has changed since the last iteration ended.
    """
    if number := s.engine.agree_max(s.stop.asked):
        raise Stopped(number)


def stopped(s: Session, asked: Stopped) -> int:
    """Saves the last finished iteration, where it is not saved; the run's exit code."""
    step, last = s.finished, s.recipe.run.steps
    problem = None
    if step and step != s.checkpoints.last_step:
        with s.progress.phase("checkpoint"):
            problem = s.checkpoints.save(step, s.state())
    if problem:
        s.progress.message(f"checkpoint not saved: {problem}")
    saved = s.checkpoints.last_step
    if saved != step or not step:
        left = f"step {saved} is the last that is saved" if saved else "nothing is saved"
        s.progress.message(f"ended by {asked} in step {step + 1} of {last}: {left}")
        return 128 + asked.number
    s.progress.message(
        f"ended by {asked}, not finished: step {step} of {last} is saved; to go on:\n"
        f"    {resume_command(s.recipe.run_folder)}"
    )
    return 0


def finish(s: Session) -> None:
    """RunStopped where the last weights are not saved."""
    if s.checkpoints.last_step != s.recipe.run.steps:
        raise RunStopped(
            f"the weights of step {s.recipe.run.steps} could not be saved in "
            f"{s.recipe.checkpoint_folder}; make room there and run again with --resume"
        )


def publish(s: Session) -> bool:
    """Exports the last checkpoint's weights for diffusers, writes the report, says where.

    Rank 0 alone: when the ranks have parted, because it may take longer than they would wait.
    False where something could not be written, and how to have it: the run itself is whole.
    """
    if s.engine.rank:
        return True
    folder, say = s.recipe.run_folder, s.progress.message
    with suppress(FileNotFoundError):  # of a log for which there never was room
        say(as_text(step_records(folder)))
    if s.profile:
        say(f"profile {s.profile.folder}")
    whole = True
    try:
        say(f"report  {write_report(folder)}")
    except OSError as error:
        whole = False
        say(f"report  not written: {error}; make room, then: gardo report {folder}")
    for average in (False, True) if s.average else (False,):
        try:
            # not verified: it has just been written
            say(f"export  {export_run(folder, average=average, policy=s.policy, verify=False)}")
        except OSError as error:
            whole = False
            ema = " --ema" if average else ""
            say(f"export  not written: {error}; make room, then: gardo export {folder}{ema}")
    return whole
