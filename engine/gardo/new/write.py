"""Writes a new recipe, and its prompts where none are given. Nothing is written over."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gardo.config import check, load
from gardo.data import load_prompts, prompt_of
from gardo.files import write_atomically
from gardo.hf_prompts import is_dataset
from gardo.licences import licence_of
from gardo.new.text import commented
from gardo.new.values import Asked, Raw, fitted, starts, values
from gardo.recipe_errors import RecipeError
from gardo.recipe_rules import WITHOUT_PROMPTS
from gardo.tiny import world
from gardo.types import Prompt

COUNT, HELD_OUT = 800, 0.1  # prompts that are written, and the share for evaluations


def write_recipe(out: Path, asked: Asked, prompts: str | None, command: str) -> list[str]:
    """The lines to be said of it. RecipeError or ValueError, and nothing is written, where it
    would not load."""
    if out.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(f"{out}: it holds YAML; call it {out.stem}.yaml")
    made = out.with_name(f"{out.stem}_prompts.jsonl")
    for path in (out, *([] if prompts else [made])):
        if path.exists() or path.is_symlink():
            raise ValueError(f"{path}: is there already, and nothing is written over; give another "
                             "name, or remove it")  # fmt: skip
    rows = [] if prompts else prompts_for(asked)
    share = 0.0 if prompts or asked.model.startswith("builtin:") else HELD_OUT
    named = _named(prompts, out.parent) if prompts else made.name
    first = prompt_of(dict(rows[0]), "prompt") if rows else _first_of(prompts)
    asked = replace(asked, prompts=named, prompt=first, held_out=share)
    raw, verdict = fitted(values(asked), asked, str(out), lambda text: print(text, flush=True))
    recipe = check(raw, str(out), rules=WITHOUT_PROMPTS)
    text = commented(raw, recipe, command, _head(asked, raw))
    files = {out: text.encode()}
    if rows:
        files[made] = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()
    _write(files, lambda: load(out))
    lines = [f"{made}: {len(rows)} prompts"] if rows else []
    lines += [f"{out}: {raw['algorithm']['name']}, {' '.join(raw['rewards'])}"]
    lines += [verdict] if verdict else []
    return [*lines, *_next(out, asked.gpus)]


def _first_of(prompts: str | None) -> Prompt | None:
    """Of a file; none of what is no file here, which the recipe's check says."""
    file = Path(prompts or "").expanduser()
    return load_prompts(file)[0] if file.is_file() else None


def _named(prompts: str, folder: Path) -> str:
    """As a recipe in `folder` finds it: a data set, a file beside it, or one anywhere."""
    if is_dataset(prompts):
        return prompts
    path = Path(prompts).expanduser().absolute()
    inside = path.is_relative_to(folder.absolute())
    return str(path.relative_to(folder.absolute()) if inside else path)


def prompts_for(asked: Asked) -> Sequence[Any]:
    """Of the grammar that the proxy's name asks for; else the tiny world's, or captions."""
    from gardo.rewards import caption_prompts, geneval_prompts, ocr_prompts

    if asked.rewards[0] == "ocr":
        return ocr_prompts.prompts(COUNT, seed=0)[0]
    if asked.rewards[0] == "geneval":
        return geneval_prompts.files(COUNT, seed=0)[0]
    if asked.model.startswith("builtin:"):
        return [{"prompt": prompt} for prompt in world.prompts()]
    return caption_prompts.prompts(COUNT, seed=0)[0]


def _write(files: dict[Path, bytes], works: Callable[[], Any]) -> None:
    """Takes all of them away again where it does not work with them."""
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, data)
        works()
    except (OSError, RecipeError) as error:
        for path in files:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ValueError(f"{error.filename}: {error.strerror}; give another folder") from None
        raise


def _head(asked: Asked, raw: Raw) -> str:
    models, path = starts()["models"], raw["model"]["path"]
    base = models.get(asked.model) or models[raw["model"]["family"]]
    licence = licence_of(path)
    of = f" Licence of {path}: {licence.title}. {licence.terms}" if licence.terms else ""
    return (
        f"The numbers are those of the recipe {base['recipe']} that comes with gardo, but for what "
        "the rewards, the GPUs and their memory asked to be changed; they belong to its batch."
        f"{of}\nEvery field that is not here has a default: docs/reference/recipe.md, "
        "`gardo schema`."
    )


def _next(out: Path, gpus: int) -> list[str]:
    path, count = shlex.quote(os.fspath(out)), f"--gpus {gpus}"
    return [
        "next:",
        f"  gardo doctor {path} {count}",
        f"  gardo train {path} {count} --dry-run",
        f"  gardo train {path} {count}",
    ]


def run_name(out: Path) -> str:
    """Of the recipe's file, as run.name may be."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).lstrip("._-") or "run"
