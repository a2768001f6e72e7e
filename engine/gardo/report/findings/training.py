"""Rules on the updates, on the rewards while training, and on time and memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean, median

from gardo.report.findings.run import ENOUGH, RECENT, Finding, Run
from gardo.report.metrics_log import Record
from gardo.report.phase_table import phase_rows
from gardo.report.progress import format_number, format_share


def ratio_noise(run: Run) -> Iterator[Finding]:
    clip, errors = run.algorithm("clip_range"), run.metric("ratio_error")
    if clip and errors and (noise := median(errors)) > 0.3 * clip:
        yield Finding(
            "warning",
            f"Ratio noise, {format_number(noise, 1)}, is near the clip range, "
            f"{format_number(clip, 1)}: much of the gradient is rounding.",
            "Let sampling and training have the same numerics (old_velocity: recompute, dtype, "
            "batch shape, attention), or raise clip_range.",
            ("ratio_error",),
        )


def recomputed(run: Run) -> Iterator[Finding]:
    times, steps = run.events("old velocities recomputed"), len(run.recent)
    if steps >= ENOUGH and times >= 0.5 * steps:
        yield Finding(
            "note",
            f"Old velocities were computed again in {times} of the last {steps} iterations, one "
            "more forward pass of every row.",
            "Sampling and training disagree: give them one dtype, batch shape and attention "
            "backend, or a wider clip_range.",
            ("ratio_error",),
        )


def clipped_rows(run: Run) -> Iterator[Finding]:
    shares = run.metric("clip_fraction")
    if shares and (mean := fmean(shares)) > 0.4:
        yield Finding(
            "warning",
            f"{format_share(mean)} of rows were clipped in the last {len(shares)} iterations: they "
            "gave no gradient.",
            "Lower the learning rate or train.updates_per_step, or widen clip_range.",
            ("clip_fraction",),
        )


def clipped_gradient(run: Run) -> Iterator[Finding]:
    limit, norms = run.setting("train.max_grad_norm"), run.metric("grad_norm")
    if not limit or len(norms) < RECENT:
        return
    times = sum(norm > limit for norm in norms)
    if times >= 0.95 * len(norms):
        yield Finding(
            "note",
            f"The gradient norm was above train.max_grad_norm, {limit:g}, in {times} of the last "
            f"{len(norms)} iterations (median {format_number(median(norms), 2)}): its size no "
            "longer counts.",
            "That can be meant; if training is unstable, lower the learning rate, else raise the "
            "limit.",
            ("grad_norm",),
        )


def no_gradient(run: Run) -> Iterator[Finding]:
    norms = run.metric("grad_norm")
    if norms and max(norms) == 0:
        yield Finding(
            "warning",
            f"The gradient was 0 in the last {len(norms)} iterations: nothing is learnt.",
            "See whether the proxy differs between the images of a prompt, and whether every ratio "
            "is clipped.",
            ("grad_norm",),
        )


def bad_updates(run: Run) -> Iterator[Finding]:
    counts = [s.get("metrics", {}).get("skipped_updates", 0) for s in run.steps]
    if total := sum(counts):
        made = len(run.steps) * (run.setting("train.updates_per_step") or 1)
        often = total > 0.02 * made or sum(counts[-RECENT:]) > 1
        yield Finding(
            "warning" if often else "note",
            f"{total} of {made} updates were left out, the last in step "
            f"{[s['step'] for s, n in zip(run.steps, counts, strict=True) if n][-1]}.",
            "The events say why: a number that is not finite, or a reward that failed; "
            "train.bad_updates says when that ends the run.",
            ("skipped_updates",),
        )


def not_finite(run: Run) -> Iterator[Finding]:
    steps = [
        step["step"]
        for step in run.recent
        if any(
            isinstance(value, float) and not math.isfinite(value)
            for name, value in step.get("metrics", {}).items()
            if name != "kl"  # of no gated row
        )
    ]
    if steps:
        yield Finding(
            "warning",
            f"Metrics were not finite in {len(steps)} of the last {len(run.recent)} iterations, "
            f"lately in step {steps[-1]}.",
            "Lower the learning rate, or train in bf16 or fp32 where fp16 overflows.",
        )


def no_signal(run: Run) -> Iterator[Finding]:
    """Proxies that say the same of every sample."""
    for name, rows in _rewards(run, "proxy"):
        spreads = [row["std"] for row in rows if math.isfinite(row.get("std", math.nan))]
        if len(spreads) < ENOUGH:
            continue
        now, scale = median(spreads), abs(fmean(row["mean"] for row in rows))
        first = [s["rewards"][name] for s in run.steps[:ENOUGH] if name in s.get("rewards", {})]
        early = [row.get("std", 0.0) for row in first]
        if now <= 1e-6 * max(scale, 1.0):
            what = "says the same of every sample: there is nothing to learn"
        elif early and len(run.steps) > 2 * ENOUGH and now < 0.05 * median(early):
            what = (
                f"hardly differs between samples any more (spread {format_number(now, 2)}, "
                f"{format_number(median(early), 2)} at the start): it is saturated"
            )
        else:
            continue
        yield Finding(
            "warning",
            f"The proxy {name} {what}.",
            "Stop here if it is solved; else take harder prompts, or a reward that goes on telling "
            "images apart.",
            (name,),
        )


def masked_rewards(run: Run) -> Iterator[Finding]:
    """Rewards that had no value for some samples."""
    every = [row for step in run.recent for row in step.get("rewards", {}).values()]
    whole = max((row.get("valid", 0) for row in every), default=0)
    for name, rows in _rewards(run):
        valid = [row["valid"] for row in rows if "valid" in row]
        if not valid or not whole or (share := 1 - fmean(valid) / whole) <= 0.005:
            continue
        yield Finding(
            "warning" if share > 0.05 else "note",
            f"{name} gave no value for {format_share(share)} of the samples in the last "
            f"{len(valid)} iterations: these do not train.",
            "See what the reward or its server says of them; scoring.max_failed is how many an "
            "iteration may lack.",
            (name,),
        )


def unread_answers(run: Run) -> Iterator[Finding]:
    totals: dict[str, dict[str, float]] = {}
    for step in run.recent:
        for name, costs in step.get("judges", {}).items():
            seen = totals.setdefault(name, {"questions": 0, "lost": 0})
            seen["questions"] += costs.get("questions", 0)
            seen["lost"] += costs.get("unanswered", 0) + costs.get("unreadable", 0)
    for name, seen in totals.items():
        share = seen["lost"] / seen["questions"] if seen["questions"] else 0.0
        if share > 0.02:
            yield Finding(
                "warning" if share > 0.1 else "note",
                f"The judge {name} left {format_share(share)} of its questions without an answer "
                "that could be read.",
                "Raise its max_tokens, or the deadline of its calls; see what it answers with "
                "gardo rewards check.",
                (name,),
            )


def _rewards(run: Run, role: str | None = None) -> Iterator[tuple[str, list[Record]]]:
    """Every reward's entries in the last steps, or those of a role."""
    names = dict.fromkeys(n for s in run.recent for n in s.get("rewards", {}))
    for name in names:
        rows = [s["rewards"][name] for s in run.recent if name in s.get("rewards", {})]
        if len(rows) >= ENOUGH and role in (None, rows[-1].get("role")):
            yield name, rows


# phase -> (share of a step that is too much, what to try)
_TOO_MUCH = {
    "reward": (
        0.4,
        "Let rewards run beside the sampling (rollout.overlap), in a worker (where: worker) or on "
        "servers.",
    ),
    "remote": (
        0.3,
        "Give the reward more servers, or let it be asked beside the sampling (rollout.overlap).",
    ),
    "decode": (0.3, "Let images be decoded beside the sampling: rollout.overlap."),
    "gather": (0.3, "A lower ZeRO stage, or fewer and larger forward passes, gathers less."),
    "checkpoint": (0.15, "Raise checkpoint.every."),
}


def slow_phase(run: Run) -> Iterator[Finding]:
    if len(run.steps) <= ENOUGH:
        return
    for row in phase_rows(run.recent):
        limit, advice = _TOO_MUCH.get(row.name, (math.inf, ""))
        if row.share > limit:
            yield Finding(
                "note",
                f"The phase {row.name} takes {format_share(row.share)} of a step "
                f"({format_number(row.seconds, 2)} s), and nothing else runs meanwhile.",
                advice,
                (f"seconds.{row.name}",),
            )


def memory_full(run: Run) -> Iterator[Finding]:
    sizes = [device.get("bytes", 0) for device in run.environment.get("devices", ())]
    peak = max((s.get("peak_bytes", 0) for s in run.steps), default=0)
    if sizes and min(sizes) and (share := peak / min(sizes)) > 0.93:
        yield Finding(
            "note",
            f"The fullest GPU held {peak / 1e9:.1f} of {min(sizes) / 1e9:.1f} GB at its peak, "
            f"{format_share(share)}.",
            "A longer prompt or a fragmented allocator may run out of memory: lower "
            "train.micro_batch, or see gardo plan.",
            ("peak_bytes",),
        )
