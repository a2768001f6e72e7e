"""Pictures of prompts by a model, a LoRA on it or a run's weights: what `gardo sample` draws.

Picture i is of prompt i // count. Its noise is a function of the seed and i, and it is drawn alone:
what is drawn beside it changes no bit of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

import gardo
from gardo.contender import (
    Contender,
    check_choice,
    check_device_of,
    contender,
    named_model,
    ready_device,
)
from gardo.data import load_prompts, prompt_of
from gardo.evaluation.drawing import FixedImages
from gardo.export import checkpoint_of, recipe_of
from gardo.files import made_folder, write_atomically
from gardo.machine import share_of_cores
from gardo.policies.base import Policy
from gardo.policies.quantised import BASES
from gardo.policies.settings import most_text_tokens, usual_size
from gardo.recipe import Recipe
from gardo.recipe_errors import RecipeError
from gardo.report.pictures import save_grid_of, save_image
from gardo.report.progress import format_duration
from gardo.settings import FieldError, check_installed
from gardo.types import Prompt

STEPS = 28  # denoise steps that both families' pipelines have as their default
LOG, GRID = "samples.jsonl", "grid.png"
OURS = re.compile(r"(\d{6,}\.png|samples\.jsonl|grid\.png|\..*\.tmp)")
ENCODED = 64  # prompts whose text is on the device at once, before the first picture
MOST_IN_GRID = 100  # pictures
MOST_IN_ROW = 12
SAID_EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Looks:
    """How a picture is drawn, whatever it shows; None: as the model does by default."""

    size: tuple[int, int]
    guidance: float | None
    text_tokens: int | None
    precision: str
    base: str | None
    family: str | None
    encoders: str = "offload"
    family_option: ClassVar[str] = "--family "


@dataclass(frozen=True)
class Task:
    """Pictures to draw, checked: of what, by whom, how, and where they are written."""

    contender: Contender
    prompts: Sequence[Prompt]
    count: int  # pictures a prompt
    seed: int
    steps: int
    folder: Path

    @property
    def total(self) -> int:
        return len(self.prompts) * self.count

    def picture(self, image: int) -> Path:
        return self.folder / f"{image:06d}.png"


def task(
    *,
    out: Path,
    model: str | None = None,
    lora: Path | None = None,
    run: Path | None = None,
    step: int | None = None,
    average: bool = False,
    prompts: Sequence[str] = (),
    prompts_file: Path | None = None,
    count: int = 1,
    seed: int = 0,
    steps: int | None = None,
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    base: str | None = None,
    family: str | None = None,
) -> Task:
    """What the command's options ask for. RecipeError, before anything heavy loads.

    What is not given is that of the run's evaluations, or else the model's own default.
    """
    check_choice(model, lora=lora, run=run, step=step, average=average)
    texts = _texts(prompts, prompts_file)
    _check_folder(out)
    recipe = _recipe(run, step) if run else None
    looks = _looks(model, recipe, size=size, guidance=guidance, base=base, family=family)
    one = contender(looks, model, lora=lora, run=run, step=step, average=average)
    if not recipe:
        one = _within_tokenizer(one)
    steps = steps or (recipe.evaluate.steps if recipe else STEPS)
    return Task(one, texts, count, seed, steps, out)


def _texts(prompts: Sequence[str], file: Path | None) -> list[Prompt]:
    if bool(prompts) == bool(file):
        raise RecipeError("--prompt: say what to draw by --prompt TEXT, or by --prompts FILE")
    try:
        if file:
            return load_prompts(file)
        return [prompt_of({"--prompt": text}, "--prompt") for text in prompts]
    except ValueError as error:
        raise RecipeError(f"--prompts: {error}" if file else str(error)) from None


def _check_folder(folder: Path) -> None:
    """RecipeError for a folder with anything that this command does not write: it replaces all."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise RecipeError(f"--out {folder}: is a file; give a folder")
    names = sorted(path.name for path in folder.iterdir())
    strange = [name for name in names if not OURS.fullmatch(name)]
    if strange or (names and LOG not in names):
        first = (strange or names)[0]
        raise RecipeError(
            f"--out {folder}: {first} is in it, which is not of `gardo sample`; give an empty or a "
            "new folder"
        )


def _recipe(run: Path, step: int | None) -> Recipe:
    checkpoint_of(run, step)  # says it of a folder that is no run
    return recipe_of(run, whole=False)


def _looks(
    model: str | None, recipe: Recipe | None, *, size: tuple[int, int] | None,
    guidance: float | None, base: str | None, family: str | None,
) -> Looks:  # fmt: skip
    if base is not None and base not in BASES:
        raise RecipeError(f"--base: {base!r} is none of {', '.join(BASES)}; leave it out for none")
    if guidance is not None and not 0 <= guidance < math.inf:
        raise RecipeError(f"--guidance: {guidance}: give a number from 0")
    if recipe:
        like = recipe.model
        own = like.base if like.base in BASES else None
        looks = Looks(like.size, like.guidance, like.text_tokens, recipe.distributed.precision,
                      own, family)  # fmt: skip
    else:
        assert model is not None
        path, _ = named_model(model)
        if not (usual := size or usual_size(path)):
            raise RecipeError(f"{path}: its own size is not known here; give --size HEIGHT WIDTH")
        on_cpu = os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
        looks = Looks(usual, None, None, "float32" if on_cpu else "bfloat16", None, family)
    looks = replace(
        looks,
        size=size or looks.size,
        guidance=looks.guidance if guidance is None else guidance,
        base=base or looks.base,
    )
    try:
        if looks.base:
            check_installed("bitsandbytes", f"--base: {looks.base}")
    except FieldError as error:
        raise RecipeError(str(error)) from None
    return looks


def _within_tokenizer(one: Contender) -> Contender:
    """As many tokens of a prompt as the model's own tokenizer takes, where that is fewer."""
    most = most_text_tokens(one.model.path) or one.model.text_tokens
    tokens = min(most, one.model.text_tokens)
    return replace(one, model=one.model.model_copy(update={"text_tokens": tokens}))


def draw(t: Task, say: Callable[[str], object]) -> None:
    """Draws the pictures into the task's folder, in place of earlier ones; says how far it is.

    RecipeError where something does not load, or the base is not that of the run.
    """
    check_device_of(t.contender, "gardo sample")
    policy = t.contender.policy(ready_device(0, share_of_cores(1)))
    policy.identify()
    t.contender.load(policy)
    made = _made(t, t.contender.identity(policy))
    fixed = FixedImages(policy, t.prompts, t.count, t.steps, t.seed, kernels="torch")
    log = _emptied(t.folder)
    for some in torch.arange(t.total).split(ENCODED * t.count):
        fixed.encode(some)
    began = said = time.monotonic()
    with open(log, "a", encoding="utf-8") as file:
        for image in range(t.total):
            prompt = _draw(fixed, policy, image, t.picture(image))
            row = {"file": t.picture(image).name, "prompt": str(prompt), "image": image, **made}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            now, done = time.monotonic(), image + 1
            if now - said > SAID_EVERY and done < t.total:
                said, left = now, (now - began) / done * (t.total - done)
                say(f"picture {done}/{t.total}  |  {format_duration(left)} to go")
    say(str(log))
    say(str(_grid(t)))


@torch.no_grad()
def _draw(fixed: FixedImages, policy: Policy, image: int, path: Path) -> Prompt:
    images, (prompt,) = fixed.draw(torch.tensor([image], device=policy.device))
    save_image(images[0], path)
    return prompt


def _made(t: Task, identity: dict[str, Any]) -> dict[str, Any]:
    """What all the pictures are functions of, beside their prompts and numbers: JSON."""
    model = t.contender.model
    weights = {"id", "sha256", "revision", "base", "lora", "run"}
    return {
        "model": model.path,
        "weights": {name: said for name, said in identity.items() if name in weights},
        "seed": t.seed,
        "steps": t.steps,
        "guidance": model.guidance,
        "size": list(model.size),
        "text_tokens": model.text_tokens,
        "precision": t.contender.precision,
        "gardo": gardo.__version__,
    }


def _emptied(folder: Path) -> Path:
    """The folder's log, empty, and no picture beside it. RecipeError where it cannot be made."""
    try:
        made_folder(folder)
        write_atomically(folder / LOG, b"")
        for path in folder.iterdir():
            if path.name != LOG and OURS.fullmatch(path.name):
                path.unlink()
    except ValueError as error:
        raise RecipeError(str(error)) from None
    except OSError as error:
        raise RecipeError(f"--out {folder}: {error.strerror}; give another folder") from None
    return folder / LOG


def _grid(t: Task) -> Path:
    """The first pictures, a row a prompt where each has several."""
    shown = [t.picture(image) for image in range(min(t.total, MOST_IN_GRID))]
    columns = t.count if 1 < t.count <= MOST_IN_ROW else math.ceil(len(shown) ** 0.5)
    return save_grid_of(shown, t.folder / GRID, columns)
