"""Evaluating a model on a suite: what `gardo eval` runs, on one rank or on several.

Batches of images are the suite's, whoever takes them: rank r of W takes every W-th of those that
are missing, the first rank writes down what all have measured, batch by batch. So a cut evaluation
goes on where it was, on any number of ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gardo.contender import Contender, check_device_of, contender, ready_device
from gardo.distributed.base import gather_text, leave_process_group
from gardo.distributed.group import Group
from gardo.ending import die_with_launcher, leave
from gardo.evaluation.drawing import (
    FEATURES,
    FixedImages,
    batches,
    judged,
    of_kind,
    shown_prompts,
)
from gardo.evaluation.images_log import ImagesLog, Row, rows_of_batch
from gardo.evaluation.results import against_of, read_baseline, result_of, write_result
from gardo.evaluation.values import values_of
from gardo.files import made_folder
from gardo.loading import find_files_of, meet_endpoints_of, panel_of
from gardo.machine import ranks, share_of_cores
from gardo.meeting import versions
from gardo.policies.base import Policy
from gardo.recipe_errors import RankError, RecipeError
from gardo.report.pictures import save_image
from gardo.report.progress import format_duration
from gardo.rewards.assembly import HERE, Workers
from gardo.rewards.panel import Panel
from gardo.run_lock import RunLock, Taken
from gardo.suite import Suite, load_suite

TIMEOUT = 3600.0  # seconds that a rank waits for the others
MADE_WITH = ("gardo", "torch", "diffusers", "transformers", "peft", "python")
SAID_EVERY = 5.0  # seconds
LEAST_JUDGED = 16  # images of which scoring.max_failed is a share


class NoValues(Exception):
    """A reward elsewhere that gives too few values: waiting may mend it."""


@dataclass(frozen=True)
class Task:
    """One evaluation, checked: what is evaluated on what, where it is written, and against what."""

    suite: Suite
    contender: Contender
    folder: Path
    against: Path | None = None

    @property
    def images(self) -> Path:
        return self.folder / "images"


def task(
    *,
    suite: Path,
    sets: Sequence[str] = (),
    model: str | None = None,
    lora: Path | None = None,
    run: Path | None = None,
    step: int | None = None,
    average: bool = False,
    out: Path | None = None,
    against: Path | None = None,
) -> Task:
    """What the command's options ask for. RecipeError, before anything heavy loads."""
    asked = load_suite(suite, list(sets))
    one = contender(asked, model, lora=lora, run=run, step=step, average=average)
    folder = out.resolve() if out else Path("evaluations") / asked.name / one.name
    if against:
        read_baseline(against, asked.asks)
        if against.resolve() == folder.resolve():
            raise RecipeError(f"--against {against}: this evaluation itself; give another's folder")
    return Task(asked, one, folder, against)


def evaluate(t: Task, group: Group, say: Callable[[str], object]) -> None:
    """Measures what is missing and writes the results into the task's folder; all ranks call it.

    RecipeError where the folder is another's, or something does not load.
    """
    suite = t.suite
    workers = Workers()
    try:
        with refused(ValueError):  # what a reward's files say, and FieldErrors
            find_files_of(suite.reward_settings)
            if ranks()[1] == 0:
                workers = Workers.start(suite.reward_settings, suite.scoring, say)
            policy = t.contender.policy(group.device)
        log, missing = _begun(t, policy, group)
        total = len(suite.texts) * suite.images_per_prompt
        if missing:
            asked: dict[str, Any] = {"prompt": suite.texts[0], "size": suite.size}
            with refused(ValueError):
                meet_endpoints_of(suite.reward_settings, group, **asked)
            t.contender.load(policy)
            say(f"{total} images of {len(suite.texts)} prompts, {len(missing)} batches to go")
            with refused(ValueError):
                panel = panel_of(suite.reward_settings, suite.scoring, workers, group, **asked)
            try:
                _measure(t, policy, panel, group, log, missing, say)
            finally:
                panel.close()
    finally:
        workers.close()
    if log:
        _finish(t, log, say)


@contextmanager
def refused(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds are refusals: one line for the user."""
    try:
        yield
    except kinds as error:
        raise RecipeError(str(error)) from error


def _begun(t: Task, policy: Policy, group: Group) -> tuple[ImagesLog | None, list[int]]:
    """The log, of the first rank, and which batches are not in it. RecipeError on all ranks."""
    log, said = None, dict[str, Any](missing=[], problem="")
    if group.rank == 0:
        try:
            log = ImagesLog(made_folder(t.folder) / "images.jsonl", _evaluation(t, policy, group))
            total = len(t.suite.texts) * t.suite.images_per_prompt
            said["missing"] = [
                number
                for number, image_B in enumerate(batches(total, t.suite.batch))
                if any(i < total and _lacks(t, log, i) for i in image_B.tolist())
            ]
        except (OSError, ValueError, RecipeError) as error:
            said["problem"] = str(error)
    heard = json.loads(gather_text(group, json.dumps(said))[0])
    if heard["problem"]:
        raise RecipeError(heard["problem"])
    return log, list(heard["missing"])


def _lacks(t: Task, log: ImagesLog, image: int) -> bool:
    """Whether an image is to be drawn: to be measured, or shown."""
    if image not in log.rows:
        return True
    shown = image // t.suite.images_per_prompt in shown_prompts(len(t.suite.texts), t.suite.shown)
    return shown and not _picture(t, image).is_file()


def _evaluation(t: Task, policy: Policy, group: Group) -> dict[str, Any]:
    """What the numbers depend on: JSON."""
    gpu = group.device.type == "cuda"
    device = torch.cuda.get_device_name(group.device) if gpu else group.device.type
    return {
        "suite": {"identity": t.suite.identity, "batch": t.suite.batch, "asks": t.suite.asks},
        "model": t.contender.identity(policy),
        "made_with": {**{name: versions()[name] for name in MADE_WITH}, "device": device},
    }


def _measure(
    t: Task, policy: Policy, panel: Panel, group: Group, log: ImagesLog | None,
    missing: Sequence[int], say: Callable[[str], object],
) -> None:  # fmt: skip
    """Draws and judges the missing batches; `log` is the first rank's."""
    suite, began, said = t.suite, time.monotonic(), time.monotonic()
    # plain torch: the same noise on every machine, and it costs nothing beside the model
    fixed = FixedImages(
        policy, suite.texts, suite.images_per_prompt, suite.steps, suite.seed, kernels="torch"
    )
    all_batches = batches(fixed.total, suite.batch)
    rounds = range(0, len(missing), group.world)
    for done, start in enumerate(rounds, start=1):
        mine = missing[start : start + group.world][group.rank :][:1]
        rows, problem = list[Row](), ""
        try:
            rows = [row for number in mine for row in _batch(t, fixed, panel, all_batches[number])]
        except NoValues as error:
            problem = str(error)
        said_by_rank = [
            json.loads(text) for text in gather_text(group, json.dumps([problem, rows]))
        ]
        for _, measured in said_by_rank:
            if log and measured:
                log.append(measured)
        for problem, _ in said_by_rank:
            if problem:
                raise NoValues(problem)
        now = time.monotonic()
        if now - said > SAID_EVERY or done == len(rounds):
            said, left = now, (now - began) / done * (len(rounds) - done)
            batch = min(start + group.world, len(missing))
            say(f"batch {batch}/{len(missing)}  |  {format_duration(left)} to go")


@torch.no_grad()
def _batch(t: Task, fixed: FixedImages, panel: Panel, image_B: torch.Tensor) -> list[Row]:
    """The lines of a batch's images, those that are shown written to files."""
    suite, device = t.suite, fixed.policy.device
    images, prompts = fixed.draw(image_B.to(device) % fixed.total)  # past the end: repeats
    columns = judged(
        panel, images, prompts, features=suite.measures_features, labels=suite.measures_attributes
    )
    columns = {name: column[image_B < fixed.total] for name, column in columns.items()}
    image_B = image_B[image_B < fixed.total]
    _check_values(suite, panel, columns)
    prompt_B = image_B // suite.images_per_prompt
    shown = set(shown_prompts(len(suite.texts), suite.shown).tolist())
    for image, prompt, pixels in zip(image_B.tolist(), prompt_B.tolist(), images, strict=False):
        if prompt in shown:
            save_image(pixels, _picture(t, image))
    return rows_of_batch(image_B, prompt_B, columns)


def _check_values(suite: Suite, panel: Panel, columns: dict[str, torch.Tensor]) -> None:
    """NoValues where a reward that is scored elsewhere says too little: later it may answer.

    A share of a full batch, and of so many images at least: one image without a value, which may
    never have one, stops nothing.
    """
    lacks = {name: value_B.isnan() for name, value_B in of_kind(columns, "reward").items()}
    if FEATURES in columns:
        (features,) = panel.names("features")
        lacks[features] = columns[FEATURES].isnan().any(-1)
    for name, lacks_B in lacks.items():
        failed = int(lacks_B.sum())
        allowed = suite.scoring.max_failed * max(suite.batch, LEAST_JUDGED)
        if suite.reward_settings[name].where != HERE and failed > allowed:
            raise NoValues(
                f"rewards.{name}: {failed} images of a batch have no value "
                f"({panel.rewards[name].trouble or 'it gave none'}); what was measured before is "
                "kept: mend it, and give the same command again"
            )


def _picture(t: Task, image: int) -> Path:
    return t.images / f"{image:06d}.png"


def _finish(t: Task, log: ImagesLog, say: Callable[[str], object]) -> None:
    """The results of a whole log."""
    suite = t.suite
    values = values_of(log.columns(), suite.reward_settings, suite.images_per_prompt)
    shown = shown_prompts(len(suite.texts), suite.shown).tolist()
    each = range(suite.images_per_prompt)
    pictures = [_picture(t, prompt * len(each) + image) for prompt in shown for image in each]
    result = result_of(log.evaluation, values, name=suite.name, shown=shown)
    if t.against:
        result["against"] = against_of(t.against, result)
    for path in write_result(t.folder, result, pictures, columns=suite.images_per_prompt):
        say(str(path))
    for name, one in result["rewards"].items():
        if lacking := one["images_without_value"]:
            say(f"{name}: {lacking} images have no value, and are left out")


# ---- the command ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 1 where a reward gave too few values, 2 for what cannot be evaluated."""
    parser = argparse.ArgumentParser("gardo.evaluate", description="Evaluate a model on a suite.")
    parser.add_argument("model", nargs="?")
    parser.add_argument("--suite", type=Path, required=True)
    for name in ("lora", "run", "out", "against"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--step", type=int)
    parser.add_argument("--ema", action="store_true", dest="average")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    if options.pop("local_rank") is not None:
        die_with_launcher()
    first = ranks()[0] == 0
    try:
        asked = task(**options)
        group = ready(asked)
        with RunLock(asked.folder) as lock:
            _own(lock, asked, group)
            evaluate(asked, group, (lambda text: print(text, flush=True)) if first else str)
    except (RecipeError, NoValues) as error:
        if ranks()[1] == 0 or isinstance(error, RankError):
            print(error, file=sys.stderr, flush=True)
        return 2 if isinstance(error, RecipeError) else 1
    finally:
        leave_process_group()
    return 0


def arguments_of(
    *, model: str | None, suite: Path, average: bool, sets: Sequence[str], **options: object
) -> list[str]:
    """The arguments of `main` for what `task` is asked."""
    found = [model] if model else []
    found += ["--suite", str(suite), *(["--ema"] if average else [])]
    for name, value in options.items():
        found += [f"--{name}", str(value)] if value is not None else []
    return [*found, *(part for said in sets for part in ("--set", said))]


def ready(t: Task) -> Group:
    """Readies this process, and joins the other ranks where there are any. RecipeError."""
    rank, local_rank, world = ranks()
    check_here(t)
    device = ready_device(local_rank, t.suite.threads or share_of_cores(world))
    if world == 1:
        return Group(device, rank=rank)
    from gardo.distributed.zero import start_process_group

    return start_process_group(device, TIMEOUT)


def check_here(t: Task) -> None:
    """RecipeError where the model is not meant for what this machine has."""
    check_device_of(t.contender, "gardo eval")


def _own(lock: RunLock, t: Task, group: Group) -> None:
    """Takes the folder for the first rank. RecipeError on every rank where another process has it,
    or it cannot be written to."""
    problem = ""
    if group.rank == 0:
        try:
            lock.take()
        except Taken:
            problem = (
                f"--out {t.folder}: another process evaluates into it ({lock.path}); wait for it, "
                "or give another"
            )
        except OSError as error:
            problem = f"--out {t.folder}: {error.strerror}; give another folder"
    if said := gather_text(group, problem)[0]:
        raise RecipeError(said)


if __name__ == "__main__":
    leave(main())
