"""Rules on what the evaluations say, on the gate and on the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from statistics import fmean, median

from gardo.report.findings.run import ENOUGH, RECENT, Finding, Run
from gardo.report.progress import format_number, format_share
from gardo.report.verdict import gaps, judge, moved


def hacked(run: Run) -> Iterator[Finding]:
    """The verdict's conclusion, with the numbers that it rests on."""
    if len(run.evaluations) < 2:
        return
    changes = moved(run.evaluations)
    tone = judge(run.evaluations).tone
    rose = [one for one in changes if one.role == "proxy" and one.direction == "up"]
    fell = [one for one in changes if one.role == "held_out" and one.direction in ("down", "sank")]
    about = tuple(one.name for one in (*fell, *rose))
    said = " and ".join(f"held-out {one.name} {one.words}" for one in fell)
    beside = " and ".join(f"the proxy {one.name} {one.words}" for one in rose)
    if tone == "bad" and rose:
        yield Finding(
            "warning",
            f"The reward is probably being hacked: {said}, while {beside}.",
            f"Look at the pictures; {_best_step(run)}, and train with the gate, a stronger KL or "
            "auxiliaries that see what the proxy does not.",
            about,
        )
    elif tone == "bad":
        yield Finding(
            "warning",
            f"The pictures get worse and nothing is won: {said}; no proxy clearly rose.",
            "Lower the learning rate; see whether the proxy can tell good from bad images at all.",
            about,
        )
    elif fell and rose:
        yield Finding(
            "note",
            f"{said[0].upper()}{said[1:]}, less than prompts differ, while {beside}.",
            "It may be where hacking begins: watch the next evaluations and the pictures.",
            about,
        )
    elif tone == "good":
        yield Finding(
            "good",
            f"{beside[0].upper()}{beside[1:]}, and no held-out reward clearly fell.",
            "Go on, as long as that stays so.",
            about,
        )


def _best_step(run: Run) -> str:
    """Which checkpoint to keep: of the evaluations after the start the one whose held-out rewards
    were highest."""
    later = gaps(run.evaluations)[1:]
    if not later or (best := max(later, key=lambda one: one.held_out)) is later[-1]:
        return "keep an earlier checkpoint"
    return f"of the evaluations, that of step {best.step} had the highest held-out: go back to it"


def not_learning(run: Run) -> Iterator[Finding]:
    """No proxy moves, after many steps."""
    if len(run.evaluations) < 3 or len(run.steps) < 2 * RECENT:
        return
    proxies = [one for one in moved(run.evaluations) if one.role == "proxy"]
    if proxies and all(one.direction in ("flat", "unknown") for one in proxies):
        noise = max(run.metric("clip_fraction"), default=1.0) == 0
        yield Finding(
            "note",
            f"After {len(run.steps)} steps no proxy has clearly changed"
            + (
                ", and no ratio was ever clipped: updates hardly move the policy." if noise else "."
            ),
            "Raise the learning rate, give more images a prompt, or a KL that weighs less.",
            tuple(one.name for one in proxies),
        )


def nothing_held_out(run: Run) -> Iterator[Finding]:
    if not run.evaluations:
        return
    rewards = run.evaluations[-1].get("rewards", {}).values()
    if rewards and all(reward.get("role") != "held_out" for reward in rewards):
        yield Finding(
            "note",
            "No held-out reward is evaluated, so hacking cannot be told from learning.",
            "Add a reward with role: held_out, one that is neither the proxy nor like it.",
        )


def less_diverse(run: Run) -> Iterator[Finding]:
    """Kinds of diversity that have fallen far since the first evaluation."""
    if len(run.evaluations) < 2:
        return
    first, last = (run.evaluations[at].get("diversity", {}) for at in (0, -1))
    for name, after in last.items():
        before = first.get(name)
        if not before or before <= 0 or not math.isfinite(after) or after > 0.8 * before:
            continue
        yield Finding(
            "warning" if after < 0.7 * before else "note",
            f"Diversity of {name} fell by {format_share(1 - after / before)}, from "
            f"{format_number(before, 3)} to {format_number(after, 3)}: images come to look alike.",
            "Compare the first with the last pictures; diversity: of gardo rewards images that "
            "differ, and a KL holds the policy near its start.",
            (name,),
        )


def gate_clamped(run: Run) -> Iterator[Finding]:
    limits, shares = run.algorithm("gate.limits"), run.metric("gate_fraction")
    warmup = run.algorithm("gate.warmup") or 0
    if not limits or not shares or limits[0] == limits[1] or len(run.steps) < warmup + ENOUGH:
        return
    for limit, end in ((limits[1], "upper"), (limits[0], "lower")):
        times = sum(math.isclose(share, limit) for share in shares)
        if times < 0.6 * len(shares):
            continue
        meant = {
            "upper": (
                "proxy and auxiliaries disagree ever more",
                "Look at the gated pictures: raise the upper of gate.limits if they are cheats, "
                "else see whether the auxiliaries fit the prompts.",
            ),
            "lower": (
                "they disagree ever less",
                "If the held-out falls all the same, the auxiliaries do not see what the proxy is "
                "cheated by: add one that does.",
            ),
        }[end]
        yield Finding(
            "warning" if end == "upper" else "note",
            f"The gate's share was at its {end} clamp, {format_share(limit)}, in {times} of the "
            f"last {len(shares)} iterations: {meant[0]}.",
            meant[1],
            ("gate_fraction", "uncertainty"),
        )


def gate_empty(run: Run) -> Iterator[Finding]:
    shares = run.metric("gate_share")
    if shares and max(shares) == 0 and run.algorithm("gate"):
        yield Finding(
            "warning",
            f"The gate took no sample in the last {len(shares)} iterations: the KL is idle.",
            "Raise gate.fraction and the lower of gate.limits, or draw more samples an iteration.",
            ("gate_share",),
        )


def gate_catches(run: Run) -> Iterator[Finding]:
    """Whether held-out judges think less of what the gate holds back, step by step."""
    names = dict.fromkeys(n for s in run.recent for n, r in s.get("rewards", {}).items())
    for name in names:
        rows = [s["rewards"][name] for s in run.recent if name in s.get("rewards", {})]
        rows = [row for row in rows if row.get("role") == "held_out" and "gated" in row]
        gaps = [row["gated"] - row["mean"] for row in rows]
        gaps = [gap for gap in gaps if math.isfinite(gap)]
        worse = sum(gap < 0 for gap in gaps)
        if len(gaps) < 10 or 0.25 * len(gaps) < worse < 0.75 * len(gaps):
            continue
        mean = format_number(abs(fmean(gaps)), 2)
        if worse >= 0.75 * len(gaps):
            yield Finding(
                "good",
                f"The gate catches what {name} dislikes: gated samples scored {mean} below all in "
                f"{worse} of the last {len(gaps)} iterations.",
                "The auxiliaries see what the proxy misses: keep them.",
                (name, "gate_share"),
            )
        else:
            yield Finding(
                "warning",
                f"The gate holds back what {name} likes: gated samples scored {mean} above all in "
                f"{len(gaps) - worse} of the last {len(gaps)} iterations.",
                "See whether gate.sign is paper, and whether the auxiliaries agree with held-out "
                "judges.",
                (name, "gate_share"),
            )


def reference_resets(run: Run) -> Iterator[Finding]:
    """Reset so often that the KL holds nothing, or never although it is meant to be."""
    asked = run.algorithm("reference")
    if not isinstance(asked, Mapping) or len(run.recent) < RECENT:
        return
    resets = run.events("reference reset")
    if resets > RECENT / 3:
        yield Finding(
            "warning",
            f"The reference was reset in {resets} of the last {RECENT} iterations: the KL then "
            "restrains little.",
            "Raise reset_kl, or reset_updates, of algorithm.reference; or beta.",
            ("kl",),
        )
    elif asked.get("reset_kl") and not any(
        event.startswith("reference reset") for s in run.steps for event in s.get("events", ())
    ):
        highest = max(run.metric("kl"), default=math.nan)
        if highest < asked["reset_kl"] / 10 and len(run.steps) >= 5 * RECENT:
            yield Finding(
                "note",
                f"The reference was never reset in {len(run.steps)} steps: the KL, at most "
                f"{format_number(highest, 2)} lately, stays far below reset_kl, "
                f"{format_number(asked['reset_kl'], 2)}.",
                "Lower reset_kl if the proxy has stopped rising.",
                ("kl",),
            )


def kl_explodes(run: Run) -> Iterator[Finding]:
    """The last steps' KL against that of the steps before them."""
    values = [step.get("metrics", {}).get("kl") for step in run.steps]
    known = [value for value in values if value is not None and math.isfinite(value)]
    before, now = known[-3 * RECENT : -ENOUGH], known[-ENOUGH:]
    if len(before) < RECENT or run.events("reference reset"):
        return
    usual = max(before)
    if usual > 0 and min(now) > 3 * usual:
        yield Finding(
            "warning",
            f"The KL to the reference explodes: {format_number(median(now), 2)} in the last "
            f"{ENOUGH} iterations, at most {format_number(usual, 2)} in the {len(before)} before.",
            "Lower the learning rate, or raise beta; go on from the checkpoint before it.",
            ("kl",),
        )
