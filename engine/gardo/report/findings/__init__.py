"""What a run's numbers say, in plain sentences: is it hacked, does it learn, what is in its way.

A rule is a small function of the run that finds something or nothing; RULES has all of them. What
the evaluations came to is verdict.py's to say: its conclusion is the first finding. Rules on
training metrics look at the last `RECENT` steps and are quiet where these are too few: better to
miss something than to warn of a healthy run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gardo.report.findings import outcome, training
from gardo.report.findings.run import ORDER, Finding, Run

__all__ = ["RULES", "Finding", "Rule", "Run", "findings"]

Rule = Callable[[Run], Iterator[Finding]]

RULES: tuple[Rule, ...] = (
    outcome.hacked,
    outcome.less_diverse,
    training.not_finite,
    training.bad_updates,
    training.no_signal,
    training.no_gradient,
    outcome.kl_explodes,
    training.ratio_noise,
    training.clipped_rows,
    outcome.gate_clamped,
    outcome.gate_empty,
    outcome.gate_catches,
    outcome.reference_resets,
    outcome.not_learning,
    training.masked_rewards,
    training.unread_answers,
    training.recomputed,
    training.clipped_gradient,
    training.slow_phase,
    training.memory_full,
    outcome.nothing_held_out,
)


def findings(run: Run, rules: Sequence[Rule] = RULES) -> list[Finding]:
    """All that is found, warnings first, in the order of the rules."""
    found = [finding for rule in rules for finding in rule(run)]
    return sorted(found, key=lambda finding: ORDER.index(finding.severity))
