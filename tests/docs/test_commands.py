"""Every command of the pages: parsed by the real command line, or run."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from gardo.cli import app
from gardo.cli.common import spread
from gardo.config import full_schema, load
from tests import ROOT
from tests.docs.shell import OTHERS, Block, blocks, commands_of, pages

ELSEWHERE = {"sglang.launch_server"}  # modules of other packages
EVERY = [block for page in pages() for block in blocks(page)]
RUN = sorted({block.page for block in EVERY if block.runs})


def check(command: tuple[str, ...]) -> None:
    """Fails where a command is none of ours or of others', or its words are not understood."""
    name, rest = command[0], list(command[1:])
    if name == "./run":
        check_run(rest)
    elif name == "gardo":
        check_gardo(rest)
    elif name == "deepspeed":
        check_gardo(["train", *rest[rest.index("gardo.train") + 1 :]])
    elif name == "sbatch":
        script = next(word for word in rest if word.endswith(".sbatch"))
        assert (ROOT / script).is_file(), script
        check_gardo(["train", *rest[rest.index(script) + 1 :]])
    elif name == "python" and rest[0] == "-m":
        assert rest[1] in ELSEWHERE or importlib.util.find_spec(rest[1]), rest[1]
    elif name == "python":
        assert (ROOT / rest[0]).is_file(), rest[0]
    else:
        assert name in OTHERS, f"{name!r} is no command that is known here"


@cache
def run_commands() -> set[str]:
    said = subprocess.run([ROOT / "run", "help"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in said.splitlines() if line.startswith("  ")}


def check_run(rest: list[str]) -> None:
    if rest[0] == "bench":
        assert (ROOT / f"benchmarks/bench_{rest[1]}.py").is_file(), rest[1]
    elif rest[0] not in run_commands():
        check_gardo(rest)


def check_gardo(words: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    words = spread(words)
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"no such command: {' '.join(words)}"
        command, words = command.commands[words[0]], words[1:]
    given = command.make_context(command.name, list(words)).params
    overrides = [o for o in given.get("set_") or () if not o.endswith("=...")]
    suite = "suite" in given
    for override in overrides:
        name = override.partition("=")[0]
        assert suite or exists(full(), name.split(".")), f"--set {name}: no such field"
    if given.get("recipe") is not None:
        check_recipe(str(given["recipe"]), overrides)


def check_recipe(recipe: str, overrides: list[str]) -> None:
    file = next((f for f in (ROOT / recipe, ROOT / "docs/examples" / recipe) if f.is_file()), None)
    if file is None:  # a reader's own
        its_own = recipe == "recipe.yaml" or recipe.startswith(("my_", "runs/"))
        assert its_own, f"{recipe}: no such recipe"
    elif file.parent.name != "examples":  # whose modules lie there: test_examples.py
        files = re.compile(r"data\.prompts=(?!hf:)|train\.weights\.path=")  # of the reader
        load(file, [o for o in overrides if not files.match(o)], prompts=False)


full = cache(full_schema)


def exists(part: dict[str, Any], names: list[str]) -> bool:
    """Whether a field is in a schema, in any of the kinds that a section may be."""
    if "$ref" in part:
        return exists(full()["$defs"][part["$ref"].rpartition("/")[2]], names)
    inner = [*part.get("anyOf", []), *part.get("oneOf", [])]
    if any(exists(one, names) for one in inner):
        return True
    if not names:
        return not inner
    if "properties" in part:
        found = part["properties"].get(names[0])
    else:
        found = part.get("additionalProperties")
    if found == {} or (found and "anyOf" not in found and "$ref" not in found and not known(found)):
        return True  # a base or a judge: any plug-in's section
    return isinstance(found, dict) and exists(found, names[1:])


def known(part: dict[str, Any]) -> bool:
    return bool({"type", "enum", "const", "oneOf"} & part.keys())


def test_blocks_are_found() -> None:
    found = {block.page.name for block in EVERY}
    assert {"README.md", "quickstart.md", "evaluation.md", "cluster.md", "files.md"} <= found
    assert {"reliability.md", "evidence.md"} <= found, "four spaces, and no fence"
    assert ("gardo", "selftest", "reliability") in {c for block in EVERY for c in block.commands}
    names = {command[0] for block in EVERY for command in block.commands}
    assert {"gardo", "./run", "deepspeed", "sbatch", "python"} <= names


@pytest.mark.parametrize("block", EVERY, ids=str)
def test_commands_are_understood(block: Block) -> None:
    kind = block.mark.partition(" ")[0]
    assert kind in {"", "run", "parse", "skip"}, f"{block}: <!-- test: {block.mark} -->"
    assert kind != "skip" or block.mark != "skip", f"{block}: say why"
    for command in block.commands if kind != "skip" else ():
        check(command)


@pytest.mark.parametrize(
    "line",
    [
        "gardo trian recipes/tiny_flux_gardo.yaml",
        "gardo train recipes/tiny_flux_gardo.yaml --gpu 2",
        "gardo train recipes/nobody.yaml",
        "gardo train my_recipe.yaml --set train.optimiser.lr=1",
        "gardo train recipes/tiny_flux_gardo.yaml --set sampler.steps=1",
        "gardo rewards lists",
        "./run bench nothing",
        "./run nothing",
        "python -m gardo.nothing",
        "gradio train",
    ],
)
def test_what_is_wrong_is_seen(line: str) -> None:
    (command,) = commands_of(line)
    with pytest.raises(BaseException):  # noqa: B017  a parser's, a recipe's, an assertion's
        check(command)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder like a checkout in which the demo has been run, shortly."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("recipes", "suites", "docs/examples"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    smaller = "run.steps=2 data.prompts_per_step=2 train.micro_batch=36 distributed.engine=local"
    fewer = "evaluate.prompt_count=2 evaluate.images_per_prompt=1 evaluate.steps=2"
    fields = [*smaller.split(), *fewer.split()]
    run(("gardo", "train", "recipes/tiny_flux_gardo.yaml"), folder, fields)
    yield folder


def run(command: tuple[str, ...], folder: Path, fields: list[str]) -> None:
    words = [sys.executable, "-m", "gardo.cli", *command[1:]] if command[0] == "gardo" else command
    takes = command[:2] in {("gardo", "train"), ("gardo", "plan"), ("gardo", "eval")}
    added = [word for field in fields if takes for word in ("--set", field)]
    paths = os.pathsep.join(map(str, (ROOT / "engine", ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*words, *added], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    said = f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert done.returncode == 0, said


@pytest.mark.full
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_commands_that_are_marked_run(page: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkout"
    shutil.copytree(trained, folder)
    for block in blocks(page):
        here = folder
        for command in block.commands if block.runs else ():
            if command[0] == "cd":
                here = here / command[1]
            else:
                run(command, here, block.fields)
