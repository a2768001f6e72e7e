"""Loading a file must never run it: no pickle, no remote code, no unsafe YAML in what we ship.

Read with `ast`, so a docstring may still explain why. SECURITY.md has the reasons.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests import ROOT

FOLDERS = ["engine", "kernels", "benchmarks"]

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
OPTIONS_AS_TEXT = {
    "trust_remote_code",
    "weights_only",
}  # as keys of a dict: {"trust_remote_code": ...}
UNSAFE_CALLS = {
    "yaml.load": "use yaml.safe_load",
    "yaml.load_all": "use yaml.safe_load_all",
    "yaml.full_load": "use yaml.safe_load",
    "yaml.unsafe_load": "use yaml.safe_load",
    "torch.save": "tensors go to safetensors, the rest to JSON",
    "eval": "never on a file's or a user's text",
    "exec": "never on a file's or a user's text",
    "os.system": "use subprocess with a list",
}


def complaints(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0], *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            names = {node.attr}
        else:
            names = set()
        for name in names & PICKLES:
            yield node.lineno, f"{name}: unpickling runs code"  # type: ignore[attr-defined]
        if isinstance(node, ast.Constant) and node.value in OPTIONS_AS_TEXT:
            yield node.lineno, f"{node.value!r} as a string"
        if isinstance(node, ast.Call):
            yield from ((node.lineno, text) for text in complaints_of_call(node))


def complaints_of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    if name in UNSAFE_CALLS:
        yield f"{name}: {UNSAFE_CALLS[name]}"
    for option in ("trust_remote_code", "allow_pickle", "shell"):
        value = options.get(option)
        if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
            yield f"{option}={ast.unparse(value)}"
    if name == "torch.load" or "weights_only" in options:
        value = options.get("weights_only")
        if not (isinstance(value, ast.Constant) and value.value is True):
            yield f"{name} without weights_only=True"


# DeepSpeed reads nothing else: what writes its layout writes pickles of tensors, and reads none.
WRITES_FOR_OTHERS = {ROOT / "engine/gardo/distributed/universal.py": "torch.save: "}
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def test_no_file_of_ours_can_run_what_it_loads() -> None:
    assert FILES
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in FILES
        for line, text in complaints(ast.parse(path.read_text(encoding="utf-8")))
        if not text.startswith(WRITES_FOR_OTHERS.get(path, "\0"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "from torch.serialization import pickle",
        "torch.serialization.pickle.loads(b)",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "load(f, weights_only=flag)",
        "AutoModel.from_pretrained(n, trust_remote_code=True)",
        'options = {"trust_remote_code": True}',
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "numpy.load(f, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_the_checker_sees(source: str) -> None:
    assert list(complaints(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        '"""Never pickle."""',
        "torch.load(f, weights_only=True)",
        "yaml.safe_load(text)",
        "model.eval()",
        "AutoModel.from_pretrained(n, trust_remote_code=False)",
    ],
)
def test_the_checker_lets_pass(source: str) -> None:
    assert not list(complaints(ast.parse(source)))
