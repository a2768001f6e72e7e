"""Who may import whom, read from the source with `ast`: imports inside functions count as well.

A row says which parts of `gardo`, and which of the watched libraries, a module or package may
import. Its own modules, the standard library and libraries that are not watched are always allowed.
A new top-level module or package of `gardo` needs a row of its own.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from gardo import plugins
from tests import ROOT

SOURCES = {"gardo": ROOT / "engine/gardo", "gardo_kernels": ROOT / "kernels/gardo_kernels"}

# Watched: what makes a module heavy, or ties it to one library's habits.
WATCHED = """torch triton deepspeed diffusers transformers peft accelerate tokenizers bitsandbytes
    flash_attn kernels typer rich fastapi starlette uvicorn httpx2 prometheus_client
    tensorboard wandb"""

# fmt: off
MAY_IMPORT = {  # parts of gardo, and gardo_kernels | watched libraries
    "gardo_kernels": "| torch triton",
    "plugins":       "|",
    "settings":      "|",
    "hub":           "|",
    "streams":       "|",
    "files":         "|",
    "lazily":        "| torch",
    "licences":      "|",
    "types":         "| torch",
    "contract":      "types |",
    "beside":        "types | torch",
    "bad_updates":   "types | torch",
    "reproduction":  "types rollout | torch",
    "data":          "types gardo_kernels | torch",
    "hf_prompts":    "types data |",
    "flow":          "types gardo_kernels | torch",
    "rollout":       "types beside flow gardo_kernels | torch",
    "tiny":          "| torch diffusers transformers",
    "policies":      "types flow gardo_kernels tiny"
                     " | torch diffusers transformers peft accelerate bitsandbytes",
    "rewards":       "types tiny gardo_kernels"
                     " | torch transformers fastapi starlette uvicorn httpx2 prometheus_client",
    "algorithms":    "types contract flow rollout gardo_kernels | torch",
    "distributed":   "types | torch deepspeed bitsandbytes",
    "recipe_errors": "|",
    "recipe":        "types data hf_prompts bad_updates algorithms distributed evaluation policies"
                     " report rewards |",
    "recipe_text":   "recipe_errors |",
    "recipe_switch": "recipe_errors |",
    "recipe_rules":  "recipe algorithms distributed policies rewards types |",
    "config":        "recipe recipe_rules recipe_errors recipe_switch recipe_text algorithms"
                     " distributed policies evaluation hf_prompts rewards |",
    "nvidia":        "| torch",
    "ending":        "|",
    "launch":        "distributed ending |",
    "machine":       "recipe recipe_errors nvidia distributed policies gardo_kernels | torch",
    "environment":   "distributed machine nvidia | torch",
    "meeting":       "machine recipe recipe_errors run_folder policies data evaluation hf_prompts"
                     " | torch",
    "run_lock":      "ending |",
    "shipped":       "|",
    "run_folder":    "config recipe recipe_errors report distributed run_lock |",
    "evaluation":    "types hf_prompts rollout policies rewards distributed report recipe_errors"
                     " gardo_kernels tiny | torch transformers",
    "report":        "types licences policies rewards gardo_kernels | torch rich tensorboard wandb",
    "planner":       "types recipe distributed recipe_errors policies rewards gardo_kernels"
                     " | torch diffusers transformers accelerate rich",
    "doctor":        "machine nvidia policies gardo_kernels recipe recipe_errors recipe_rules"
                     " licences distributed hf_prompts planner rewards | torch",
    "loading":       "data machine recipe recipe_errors distributed planner policies rewards types"
                     " | torch diffusers transformers",
    "suite":         "config data evaluation recipe recipe_errors recipe_rules policies rewards"
                     " types |",
    "contender":     "distributed export loading machine policies recipe recipe_errors suite"
                     " | torch",
    "sample":        "contender data evaluation export machine policies recipe recipe_errors report"
                     " types | torch",
    "evaluate":      "* | torch",
    "card":          "algorithms distributed hf_prompts licences recipe recipe_errors report"
                     " rewards |",
    "export":        "recipe recipe_text card config distributed recipe_errors policies loading"
                     " report | torch",
    "new":           "config data planner recipe recipe_errors recipe_rules recipe_text hf_prompts"
                     " licences rewards suite tiny types |",
    "reward_worker": "config machine recipe_errors rewards | torch",
    "scored":        "types distributed rewards session | torch",
    "session":       "* | torch",
    "kept_samples":  "types algorithms data distributed report session gardo_kernels | torch",
    "unscored":      "bad_updates distributed session types |",
    "phases":        "* | torch",
    "train":         "* | torch",
    "selftest":      "* | torch",
    "reward_service": "config data recipe_errors rewards tiny types | torch",
    "fitting":       "data evaluation rewards reward_service types | torch",
    "compare":       "evaluation report | torch",
    "cli":           "* | torch typer rich",
}
AT_START = {  # when the module is imported, as opposed to when a function of it runs
    "plugins":       "|",
    "settings":      "|",
    "hub":           "|",
    "streams":       "|",
    "files":         "|",
    "policies":      "types flow gardo_kernels tiny | torch",  # a recipe is checked without a model
    "cli":           "| typer rich",
}
# fmt: on
# every part of gardo may import these
FOR_ALL = {"plugins", "settings", "hub", "streams", "files", "lazily"}
ALONE = {"gardo_kernels", "plugins", "settings", "streams", "files", "lazily"}  # except these

HEAVY = "diffusers peft transformers accelerate deepspeed torch._dynamo"
BUILT_IN = [
    f"gardo.{package}.{name}"
    for package in ("policies", "algorithms", "rewards")
    for name in plugins.names(f"gardo.{package}")
]
ONLY_IN = {"deepspeed": {"gardo.distributed.zero", "gardo.distributed.deepspeed_adam"}}


class Import:
    """One imported name, resolved to an absolute dotted path."""

    def __init__(self, path: Path, module: str, target: str, line: int, at_start: bool) -> None:
        self.module, self.target, self.at_start = module, target, at_start
        self.where = f"{path.relative_to(ROOT)}:{line}: {module} imports {target}"


def module_name(path: Path) -> str:
    package = next(name for name, folder in SOURCES.items() if path.is_relative_to(folder))
    parts = path.relative_to(SOURCES[package]).with_suffix("").parts
    return ".".join([package, *(part for part in parts if part != "__init__")])


def imports_of(path: Path) -> list[Import]:
    module = module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: list[Import] = []

    def visit(node: ast.AST, at_start: bool) -> None:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            # `from gardo import rewards` imports gardo.rewards
            names = [f"gardo.{a.name}" for a in node.names] if base == "gardo" else [base]
        else:
            names = []
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                at_start = False
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                at_start = False
            for child in ast.iter_child_nodes(node):
                visit(child, at_start)
        line = getattr(node, "lineno", 0)
        found.extend(Import(path, module, name, line, at_start) for name in names)

    visit(ast.parse(path.read_text(encoding="utf-8")), at_start=True)
    return found


def part(module: str) -> str:
    """The row of the table that a module of ours belongs to: gardo.rewards.clip -> rewards."""
    names = module.split(".")
    return names[0] if names[0] == "gardo_kernels" or len(names) == 1 else names[1]


def breaches(row: str, rule: str, imports: list[Import]) -> list[str]:
    """The imports by `row` that `rule`, an entry of the tables, does not allow."""
    parts, libraries = (set(names.split()) for names in rule.split("|"))
    parts |= {row} if row in ALONE else {row, "gardo", *FOR_ALL}

    def allowed(target: str) -> bool:
        top = target.split(".")[0]
        if top in SOURCES:
            return "*" in parts or part(target) in parts or target == "gardo.__version__"
        return top not in WATCHED.split() or top in libraries

    return [at.where for at in imports if part(at.module) == row and not allowed(at.target)]


FILES = sorted(path for folder in SOURCES.values() for path in folder.rglob("*.py"))
IMPORTS = [found for path in FILES for found in imports_of(path)]


def test_every_part_has_a_row() -> None:
    parts = {part(module_name(path)) for path in FILES} - {"gardo"}
    assert parts <= set(MAY_IMPORT), "a new part of gardo: say in MAY_IMPORT what it may import"


@pytest.mark.parametrize("row", MAY_IMPORT)
def test_imports_follow_the_table(row: str) -> None:
    wrong = breaches(row, MAY_IMPORT[row], IMPORTS)
    assert not wrong, f"{row} may import {MAY_IMPORT[row]}\n" + "\n".join(wrong)


@pytest.mark.parametrize("row", AT_START)
def test_light_modules_stay_light(row: str) -> None:
    wrong = breaches(row, AT_START[row], [found for found in IMPORTS if found.at_start])
    assert not wrong, f"{row} may import at start {AT_START[row]}\n" + "\n".join(wrong)


def test_gardo_itself_imports_nothing() -> None:
    assert not [found.where for found in IMPORTS if found.module == "gardo"]


@pytest.mark.parametrize(("library", "homes"), ONLY_IN.items())
def test_one_home(library: str, homes: set[str]) -> None:
    users = {found.module for found in IMPORTS if found.target.split(".")[0] == library}
    assert users <= homes, f"only {homes} may import {library}"


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        *((f"gardo{name}", "torch") for name in ("", ".plugins", ".settings", ".streams", ".cli")),
        ("gardo.recipe_text", "torch"),
        ("gardo.config", HEAVY),
        (", ".join(BUILT_IN), HEAVY),  # what a recipe names is imported to check it
    ],
)
def test_what_is_heavy_is_not_loaded_by(module: str, heavy: str) -> None:
    """The table cannot see what an allowed import drags in; a fresh interpreter can."""
    code = f"import sys, {module}; print(*set({heavy.split()}) & set(sys.modules))"
    path = ":".join(str(folder.parent) for folder in SOURCES.values())
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stdout + done.stderr


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_recipe_is_checked_without_torch(recipe: Path) -> None:
    """Whole, with what its plug-ins ask: torch is put off, its C++ is not there."""
    heavy = {"torch._C", "numpy._core", "triton", "diffusers", "transformers"}
    code = (
        "import sys; from gardo import lazily; lazily.put_off()\n"
        f"from gardo.config import load; load({str(recipe)!r}, prompts=False)\n"
        f"print(*{heavy} & {{*sys.modules}})"
    )
    path = ":".join(str(folder.parent) for folder in SOURCES.values())
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stdout + done.stderr


# The checker itself: each line of source, and what it must be understood to import.
@pytest.mark.parametrize(
    ("source", "target", "at_start"),
    [
        ("import gardo.flow as f", "gardo.flow", True),
        ("from gardo import flow", "gardo.flow", True),
        ("from gardo.flow import sigmas", "gardo.flow", True),
        ("from .base import Reward", "gardo.rewards.base", True),
        ("from . import base", "gardo.rewards", True),
        ("from ..flow import sigmas", "gardo.flow", True),
        ("from .. import flow", "gardo.flow", True),
        ("def f():\n    import deepspeed", "deepspeed", False),
        ("try:\n    import torch\nexcept ImportError: pass", "torch", True),
        ("if TYPE_CHECKING:\n    import torch", "torch", False),
    ],
)
def test_the_reader_of_imports(
    source: str, target: str, at_start: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = SOURCES["gardo"] / "rewards" / "example.py"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding=None: source)
    (found,) = imports_of(path)
    assert (found.target, found.at_start) == (target, at_start)


@pytest.mark.parametrize(
    ("row", "target", "allowed"),
    [
        ("rewards", "gardo.rewards.base", True),
        ("rewards", "gardo.settings", True),
        ("rewards", "gardo.config", False),
        ("rewards", "gardo.policies.flux", False),
        ("rewards", "json", True),
        ("rewards", "diffusers", False),
        ("gardo_kernels", "gardo_kernels.philox", True),
        ("gardo_kernels", "gardo.config", False),
        ("algorithms", "gardo_kernels.policy_loss", True),
        ("algorithms", "deepspeed.zero", False),
        ("train", "gardo.algorithms", True),
        ("train", "deepspeed", False),
    ],
)
def test_the_reader_of_the_table(row: str, target: str, allowed: bool) -> None:
    module = row if row in SOURCES else f"gardo.{row}"
    found = Import(ROOT / "example.py", module, target, line=1, at_start=True)
    assert (not breaches(row, MAY_IMPORT[row], [found])) is allowed
