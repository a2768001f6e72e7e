"""The wheel holds exactly our two packages, whole, and nothing that would shadow a neighbour's.

`engine/` and `kernels/` are folders, never packages: diffusers and transformers import an optional
library called `kernels`, and one of ours by that name on the path breaks them.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest

from gardo import shipped
from tests import ROOT

SOURCES = {"gardo": ROOT / "engine/gardo", "gardo_kernels": ROOT / "kernels/gardo_kernels"}
NOT_SHIPPED = {"README.md"}  # for readers of the source


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a clean copy of the checkout."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("engine", "kernels", "recipes", "suites", "benchmarks", "tests"):
        if (ROOT / name).exists():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--no-index", "-w", str(out), "."], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    assert path.name == "gardo_engine-0.1.0-py3-none-any.whl"
    return path


@pytest.fixture(scope="module")
def wheel(built: Path) -> set[str]:
    """The names in it."""
    return {name for name in zipfile.ZipFile(built).namelist() if not name.endswith("/")}


def test_containers_are_not_packages() -> None:
    assert not (ROOT / "engine/__init__.py").exists()
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "benchmarks/kernels").exists()  # a script's own folder is on its path


def test_wheel_has_two_packages(wheel: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {"gardo", "gardo_kernels"}


def is_cache(path: Path) -> bool:
    return any(
        part == "__pycache__" or part.startswith(".") for part in path.relative_to(ROOT).parts
    )


def test_wheel_has_every_file_of_the_packages(wheel: set[str]) -> None:
    """Python, py.typed, tiny weights and text alike: what works in a checkout works installed."""
    expected = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in SOURCES.items()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in NOT_SHIPPED and not is_cache(path)
    }
    expected |= {
        f"gardo/_shipped/{path.relative_to(ROOT).as_posix()}"
        for part in shipped.PARTS
        for path in (ROOT / part).rglob("*")
        if path.is_file() and not is_cache(path)
    }
    found = {name for name in wheel if ".dist-info/" not in name}
    assert found == expected, "mend package_data in setup.py, or add an __init__.py"


def test_tiny_weights_are_shipped(wheel: set[str]) -> None:
    if not (SOURCES["gardo"] / "tiny/weights").exists():
        pytest.skip("no engine/gardo/tiny/weights yet: python -m gardo.tiny.make writes it")
    assert any(
        name.startswith("gardo/tiny/weights/") and name.endswith(".safetensors") for name in wheel
    )


def test_wheel_has_the_command_and_the_licence(wheel: set[str]) -> None:
    info = {name.split("/", 1)[1] for name in wheel if ".dist-info/" in name}
    assert "entry_points.txt" in info
    assert any(name.endswith("LICENSE") for name in info)


def test_the_demo_runs_from_the_wheel_in_an_empty_folder(built: Path, tmp_path: Path) -> None:
    site, here = tmp_path / "site", tmp_path / "empty"
    here.mkdir()
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu"}

    def gardo(*arguments: str) -> str:
        command = [sys.executable, "-m", "gardo.cli", *arguments]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    smaller = "run.steps=1 data.prompts_per_step=2 data.images_per_prompt=4 train.micro_batch=8"
    fewer = "evaluate.prompt_count=1 evaluate.images_per_prompt=1 distributed.engine=local"
    gardo("demo", "--gpus", "1", "--set", *smaller.split(), *fewer.split())
    run = here / "runs/tiny-flux-gardo"
    assert (run / "report.html").exists() and list(run.glob("export/*.safetensors"))
    assert gardo("recipes").startswith("recipes: ")
    assert (here / "recipes/tiny_prompts.txt").exists() and (here / "suites/tiny.yaml").exists()
    (here / "suites/tiny.yaml").write_text("mine")
    assert "left alone, because they were there: " in gardo("recipes")
    assert (here / "suites/tiny.yaml").read_text() == "mine"
    planned = gardo("train", "recipes/tiny_flux_gardo.yaml", "--dry-run")
    assert "nothing was started" in planned


def pinned(name: str) -> dict[str, str]:
    """What a constraints file pins, those that it takes in included."""
    pins: dict[str, str] = {}
    for line in (ROOT / name).read_text().lower().splitlines():
        if line.startswith("-c "):
            pins |= pinned(line.removeprefix("-c "))
        elif not line.startswith("#"):
            package, version = line.split("==")
            assert package not in pins, f"{name}: {package} is pinned twice"
            pins[package] = version
    return pins


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-cuda12.txt"])
def test_tested_set_satisfies_the_requirements(name: str) -> None:
    """Each requirement of setup.py that a set pins is met by that pin."""
    requirements = pytest.importorskip("packaging.requirements")
    with mock.patch("setuptools.setup") as setup:  # read the call instead of installing
        runpy.run_path(str(ROOT / "setup.py"))
    call = setup.call_args.kwargs
    pins = pinned(name)
    wanted = [*call["install_requires"], *call["extras_require"]["dev"]]
    for requirement in map(requirements.Requirement, wanted):
        pin = pins.get(requirement.name.lower())
        assert pin is None or requirement.specifier.contains(pin), (str(requirement), pin)
    for package in ("torch", "triton", "deepspeed", "diffusers", "transformers", "peft"):
        assert package in pins, f"{name} does not pin {package}"


def test_the_two_sets_differ_in_what_an_old_driver_needs() -> None:
    """2.10 is PyPI's last torch for CUDA 12."""
    new, old = pinned("constraints.txt"), pinned("constraints-cuda12.txt")
    assert new.keys() == old.keys()
    assert {name for name in new if new[name] != old[name]} == {"numpy", "torch", "triton"}
    assert old["torch"] == "2.10.0"


def seconds(code: str) -> float:
    """What `code` prints, run in a fresh interpreter that sees the checkout: a time in seconds."""
    path = os.pathsep.join(str(folder.parent) for folder in SOURCES.values())
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def test_kernels_import_cheaply() -> None:
    """At most 0.2 s beyond torch, triton's own import aside; best of three, in CPU time."""
    code = (
        "import time, torch, importlib.util as u\n"
        "if u.find_spec('triton'): import triton, triton.language\n"
        "start = time.process_time(); import gardo_kernels; print(time.process_time() - start)"
    )
    assert min(seconds(code) for _ in range(3)) < 0.2


def test_command_line_starts_without_torch() -> None:
    """`gardo --help` in a fresh interpreter: torch stays out."""
    code = (
        "import sys, gardo.cli\n"
        "sys.argv = ['gardo', '--help']\n"
        "try: gardo.cli.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print(float('torch._C' in sys.modules))"
    )
    assert seconds(code) == 0.0
