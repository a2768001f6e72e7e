"""environment.json: what it says of this machine, and nothing of who is at it."""

from __future__ import annotations

import getpass
import json
import socket
import subprocess
from pathlib import Path

import torch

from gardo import __version__, environment
from gardo.distributed.group import Group
from gardo.report.environment import read_environment


def test_a_start_is_described_without_names_and_paths(tmp_path: Path) -> None:
    start = environment.describe(Group(torch.device("cpu")), after_step=3)
    assert start["gardo"] == __version__ and start["packages"]["torch"] == torch.__version__
    assert start["ranks"] == start["machines"] == len(start["devices"]) == 1
    assert start["after_step"] == 3 and "CPU" in start["devices"][0]["name"]
    said = json.dumps(start)
    for private in (str(Path.home()), str(Path.cwd()), socket.gethostname(), getpass.getuser()):
        assert len(private) < 4 or private not in said
    environment.keep(tmp_path, start)
    environment.keep(tmp_path, start | {"after_step": 5})
    assert [one["after_step"] for one in read_environment(tmp_path)] == [3, 5]


def test_a_damaged_file_begins_anew(tmp_path: Path) -> None:
    (tmp_path / environment.FILE).write_text('{"starts": 1}')
    environment.keep(tmp_path, {"gardo": "x"})
    assert read_environment(tmp_path) == [{"gardo": "x"}]


def test_the_revision_is_that_of_a_checkout_alone(tmp_path: Path) -> None:
    package = tmp_path / "engine" / "gardo"
    package.mkdir(parents=True)
    assert environment.revision(package) is None
    (package / "a.py").write_text("1")

    def git(*arguments: str) -> None:
        named = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *named, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert environment.revision(package) is None  # nothing is committed yet
    git("add", "-A")
    git("commit", "-m", "one", "--no-verify")
    commit = environment.revision(package)
    assert commit and not commit.endswith("+")
    (package / "a.py").write_text("2")
    assert environment.revision(package) == commit + "+"
