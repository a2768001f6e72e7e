"""The Dockerfile, which no test can build here: what it copies and names is there."""

from __future__ import annotations

import fnmatch
import re
import runpy
import shlex
from unittest import mock

from tests import ROOT

LINES = re.sub(r"\\\n\s*", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()


def lines(word: str) -> list[str]:
    return [line.removeprefix(word).strip() for line in LINES if line.startswith(f"{word} ")]


def copied() -> set[str]:
    return {name for line in lines("COPY") for name in shlex.split(line)[:-1]}


def extras() -> dict[str, list[str]]:
    with mock.patch("setuptools.setup") as setup:  # read the call instead of installing
        runpy.run_path(str(ROOT / "setup.py"))
    return dict(setup.call_args.kwargs["extras_require"])


def test_what_it_copies_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert copied()
    for name in copied():
        assert (ROOT / name).exists(), name
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name


def test_it_installs_by_the_constraints_of_the_repository() -> None:
    (default,) = (line.partition("=")[2] for line in lines("ARG"))
    assert {default, *(path.name for path in ROOT.glob("constraints*.txt"))} <= copied()
    (install,) = (line for line in lines("RUN") if "pip install" in line)
    assert '-c "$CONSTRAINTS"' in install
    (names,) = re.findall(r'"\.\[([\w,]+)\]"', install)
    assert set(names.split(",")) <= extras().keys()


def test_the_base_image_is_pinned_and_the_command_is_ours() -> None:
    (base,) = lines("FROM")
    assert re.search(r":\d", base)
    assert lines("ENTRYPOINT") == ['["gardo"]']
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    scripts = setup.call_args.kwargs["entry_points"]["console_scripts"]
    assert any(script.startswith("gardo =") for script in scripts)


def test_what_setup_reads_is_copied_before_it_installs() -> None:
    text = "\n".join(LINES)
    before = text[: text.index("pip install")]
    for name in ("setup.py", "pyproject.toml", "README.md", "engine", "kernels"):
        assert re.search(rf"^COPY .*\b{re.escape(name)}\b", before, re.MULTILINE), name
