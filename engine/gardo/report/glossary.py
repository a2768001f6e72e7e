"""What every number of `metrics.jsonl` means, in one sentence each.

An entry's `pattern` is the path of a value in a record: `metrics.kl`, `rewards.*.mean`, where `*`
stands for any name (a reward's, a judge's, a kind of diversity's). The report shows these
sentences, the metric reference in the docs is made of them, and a test holds them to what runs log.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

Where = Literal["step", "evaluation"]
Kind = Literal[
    "record", "reward", "diversity", "loss", "kl", "gate", "ratio", "update", "time", "memory",
    "judge",
]  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A value of a record, or those of a pattern; `unit` is "" where it has none."""

    pattern: str
    unit: str
    meaning: str
    where: tuple[Where, ...]
    kind: Kind

    def matches(self, path: str) -> bool:
        """Whether a value's path is of this pattern: `*` is one name, whatever is in it."""
        parts, wanted = path.split("."), self.pattern.split(".")
        if len(wanted) == 3 and len(parts) > 3:  # a name with dots in it: the ends are ours
            parts = [parts[0], ".".join(parts[1:-1]), parts[-1]]
        return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


_STEP: tuple[Where, ...] = ("step",)
_EVALUATION: tuple[Where, ...] = ("evaluation",)
_BOTH: tuple[Where, ...] = ("step", "evaluation")

_ROWS = "fraction of rows"
_SAMPLES = "fraction of samples"
_REWARD = "the reward's"
_KL = "squared difference, mean over a latent's elements"

# metric -> unit, kind, meaning
_METRICS: dict[str, tuple[str, Kind, str]] = {
    "loss": (
        "",
        "loss",
        "The loss whose gradient is taken, regularisation included; its sign and size say little "
        "about progress, because advantages are centred on zero.",
    ),
    "policy_loss": ("", "loss", "The loss without its KL: what the rewards alone ask for."),
    "reward_x0": (
        _REWARD,
        "loss",
        "ReFL: the differentiable proxy of the images predicted at the trained step.",
    ),
    "kl": (
        _KL,
        "kl",
        "How far the policy's velocity is from the reference's, as the algorithm scales it, mean "
        "over the gated rows; it falls to 0 where the reference is reset.",
    ),
    "kl_loss": (
        _KL,
        "kl",
        "The KL as the loss has it, without beta: over all rows, each with its weight, which is "
        "mostly 0 outside the gate.",
    ),
    "kl_in_reward": (
        "",
        "kl",
        "The KL of a sampled trajectory to the reference, which the algorithm takes from the "
        "proxy times algorithm.kl_in_reward.",
    ),
    "ema_kl": (
        _KL,
        "kl",
        "AWM: how far the policy's velocity is from its moving average's, before ema_beta.",
    ),
    "gate_share": (
        _ROWS,
        "gate",
        "The share of training rows under the KL to the reference: 1 with a uniform KL, the "
        "gate's share with GARDO.",
    ),
    "gate_fraction": (
        _SAMPLES,
        "gate",
        "The share of samples that the gate means to take; it follows the uncertainty between "
        "gate.limits.",
    ),
    "uncertainty": (
        "win rate",
        "gate",
        "The mean uncertainty that moves the gate: how far the proxy ranks samples above the "
        "auxiliaries, negative values counted as gate.base says.",
    ),
    "disagreement": (
        "win rate",
        "gate",
        "How far the proxy ranks samples above the auxiliaries, mean of max(U, 0): 0 where all "
        "rank alike, about 0.17 where proxy and auxiliary have nothing to do with each other.",
    ),
    "nearest": (
        "feature distance",
        "diversity",
        "The distance of an image's features to the nearest image of its prompt, mean over "
        "samples: what GARDO multiplies positive advantages with.",
    ),
    "diversity": (
        "100 x feature distance",
        "diversity",
        "The distance of features between two images of one prompt, mean over pairs; it falls "
        "towards 0 when the images of a prompt become one.",
    ),
    "ratio": (
        "",
        "ratio",
        "New over old probability of a sampled step, mean over the rows that train: near 1, "
        "because updates are small.",
    ),
    "ratio_error": (
        "",
        "ratio",
        "The largest |ratio - 1| before any update: numerical noise between sampling and training, "
        "which must be small against algorithm.clip_range.",
    ),
    "clip_fraction": (
        _ROWS,
        "ratio",
        "The share of rows whose ratio left the clip range, and which gave no gradient.",
    ),
    "clip_fraction_high": (
        _ROWS,
        "ratio",
        "The share of rows whose ratio was clipped from above: samples that had become likelier.",
    ),
    "lr": ("", "update", "The learning rate."),
    "grad_norm": (
        "",
        "update",
        "The largest gradient norm of the iteration's updates, before clipping to "
        "train.max_grad_norm.",
    ),
    "skipped_updates": (
        "updates",
        "update",
        "Updates that were not made, because a number was not finite or too many images had no "
        "reward; left out where there are none.",
    ),
    "rows_left_out": (
        "rows",
        "update",
        "Training rows of all ranks that were not computed, because they have neither an advantage "
        "nor a KL: their gradient is 0.",
    ),
}

# phase -> what happens in it
PHASES = {
    "load": "loading the models",
    "encode": "encoding prompts",
    "sample": "denoising the training images",
    "decode": "decoding latents into images, or waiting for that where it runs beside the sampling",
    "reward": "rewards of this process, and what credit is made of them",
    "remote": "waiting for rewards that run elsewhere",
    "features": "image features for diversity",
    "teachers": "velocities of the reference and of other copies of the weights",
    "probe": "the forward pass by which the ratio contract is checked",
    "train": "forward and backward passes",
    "optimizer": "optimizer steps",
    "gather": "gathering sharded weights",
    "compile": "compiling the model's blocks",
    "evaluate": "evaluations",
    "pictures": "keeping some of the training pictures, where they are due",
    "checkpoint": "checkpoints: what of their writing the run waits for",
    "other": "all that is in no phase",
}

_COSTS = {
    "questions": ("questions", "Questions that were asked of the judge's model."),
    "known": ("questions", "Questions that had been answered before, and cost nothing."),
    "unanswered": ("questions", "Questions without an answer: their images are masked."),
    "unreadable": ("questions", "Answers that could not be read: their images are masked."),
    "prompt_tokens": ("tokens", "Tokens of the questions, pictures included."),
    "completion_tokens": ("tokens", "Tokens of the answers."),
    "seconds": ("s", "Seconds from asking to the answer, summed over all questions."),
    "longest": ("s", "The longest that one answer took."),
}


_RECORDS = (
    Entry("kind", "", "What the record is of: step or evaluation.", _BOTH, "record"),
    Entry("step", "steps", "Training steps finished by then.", _BOTH, "record"),
    Entry(
        "events",
        "",
        "What happened besides: resets, skipped updates, old velocities recomputed.",
        _BOTH,
        "record",
    ),
    Entry(
        "images",
        "",
        "The picture of the evaluation, a path inside the run's folder.",
        _EVALUATION,
        "record",
    ),
    Entry("prompts", "", "The prompts in that picture, a row each.", _EVALUATION, "record"),
    Entry("image_count", "images", "Images that were evaluated.", _EVALUATION, "record"),
    Entry("prompt_count", "prompts", "Prompts that were evaluated.", _EVALUATION, "record"),
)

_REWARDS = (
    Entry(
        "rewards.*.mean",
        _REWARD,
        "The reward's mean over the step's samples, or over the evaluation's prompts.",
        _BOTH,
        "reward",
    ),
    Entry(
        "rewards.*.role",
        "",
        "What the reward is for: proxy is optimised, auxiliary moves the gate, held_out only "
        "watches.",
        _BOTH,
        "reward",
    ),
    Entry(
        "rewards.*.std",
        _REWARD,
        "Spread of the reward among the step's samples; near 0 there is nothing to learn from.",
        _STEP,
        "reward",
    ),
    Entry(
        "rewards.*.valid",
        "samples",
        "Samples for which the reward had a value.",
        _STEP,
        "reward",
    ),
    Entry(
        "rewards.*.gated",
        _REWARD,
        "The reward's mean over the gated samples: of a held-out judge below the mean of all where "
        "the gate catches cheats.",
        _STEP,
        "reward",
    ),
    Entry(
        "rewards.*.low",
        _REWARD,
        "The lower end of the mean's 95 % interval over prompts.",
        _EVALUATION,
        "reward",
    ),
    Entry("rewards.*.high", _REWARD, "The upper end of that interval.", _EVALUATION, "reward"),
    Entry(
        "change.*.mean",
        _REWARD,
        "Change since the run's first evaluation, paired by prompt.",
        _EVALUATION,
        "reward",
    ),
    Entry(
        "change.*.low",
        _REWARD,
        "The lower end of the change's 95 % interval; a change is clear where that excludes 0.",
        _EVALUATION,
        "reward",
    ),
    Entry("change.*.high", _REWARD, "The upper end of that interval.", _EVALUATION, "reward"),
    Entry(
        "by_prompt.*",
        _REWARD,
        "The reward's mean over each prompt's images.",
        _EVALUATION,
        "reward",
    ),
)

_DIVERSITY = (
    Entry(
        "diversity.features",
        "100 x feature distance",
        "The distance of features between two images of one prompt, mean over pairs and prompts.",
        _EVALUATION,
        "diversity",
    ),
    *(
        Entry(
            f"diversity.{name}",
            "nats",
            f"Entropy of {what}, read from the pixels of the tiny world.",
            _EVALUATION,
            "diversity",
        )
        for name, what in (
            ("layout", "where objects are"),
            ("size", "how large they are"),
            ("hue", "their colour"),
        )
    ),
)

_SPENT = (
    Entry("seconds", "s", "Seconds that the evaluation took.", _EVALUATION, "time"),
    *(
        Entry(f"seconds.{name}", "s", f"Seconds of the first rank in {what}.", _STEP, "time")
        for name, what in PHASES.items()
    ),
    Entry("calls.*", "calls", "Calls of models in the phase, on the first rank.", _STEP, "time"),
    Entry(
        "rows.*",
        "rows",
        "Rows (images, prompts) that the phase's calls of models took.",
        _STEP,
        "time",
    ),
    Entry(
        "images_per_second",
        "images/s",
        "Training images of all ranks by the seconds of the whole step.",
        _STEP,
        "time",
    ),
    Entry(
        "compiled_graphs",
        "graphs",
        "Graphs compiled in the step: none once all shapes have been met.",
        _STEP,
        "time",
    ),
    Entry(
        "peak_bytes",
        "bytes",
        "The most memory that the fullest rank has held since the start: its GPU's allocator, or "
        "on a CPU the process.",
        _STEP,
        "memory",
    ),
    Entry(
        "memory.*",
        "bytes",
        "Bytes allocated at the phase's peak, on the fullest GPU.",
        _BOTH,
        "memory",
    ),
)


def entries() -> tuple[Entry, ...]:
    """Every value that a record of a built-in algorithm can have, in reading order."""
    metrics = (
        Entry(f"metrics.{name}", unit, meaning, _STEP, kind)
        for name, (unit, kind, meaning) in _METRICS.items()
    )
    judges = (
        Entry(f"judges.*.{name}", unit, meaning, _BOTH, "judge")
        for name, (unit, meaning) in _COSTS.items()
    )
    return (*_RECORDS, *_REWARDS, *_DIVERSITY, *metrics, *_SPENT, *judges)


_ENTRIES = entries()


def meaning(name: str) -> Entry | None:
    """The entry of a value's path, `rewards.hpsv2.mean`, or of a metric alone, `kl`.

    None of what no built-in part logs, such as a metric of somebody's own algorithm.
    """
    for path in (f"metrics.{name}", name):
        for entry in _ENTRIES:
            if entry.matches(path):
                return entry
    return None


def paths(record: Mapping[str, Any]) -> Iterator[str]:
    """The paths of a record's values; a list is a value."""
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{inner}" for inner in paths(value))
        else:
            yield key
