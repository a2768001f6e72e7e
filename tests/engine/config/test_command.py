"""A bad recipe at the command line: exit status 2, one line on stderr, nothing made."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gardo import cli
from gardo.distributed.saved import self_digest
from tests import ROOT
from tests.engine.config.recipe import written


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Our modules in a new process in `folder`."""
    paths = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels"))
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("module", ["gardo.cli train", "gardo.train"])
def test_a_bad_recipe_ends_with_2_before_anything_is_made(module: str, tmp_path: Path) -> None:
    light = "rewards: {dinov3: null}, algorithm: {diversity: null}"  # its library takes seconds
    path = written(tmp_path, f"{{model: {{path: ./no/such/model}}, {light}}}")
    before = sorted(tmp_path.rglob("*"))
    done = run(tmp_path, *module.split(), "recipe.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    ours = [line for line in done.stderr.splitlines() if not line.startswith("[transformers]")]
    assert ours == [
        "recipe.yaml: model.path: no such folder: './no/such/model'; "
        "give a diffusers folder or a hub id owner/name"
    ]
    assert sorted(tmp_path.rglob("*")) == before
    assert path in before


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command in this process says on stderr as it ends with 2."""
    with pytest.raises(SystemExit) as raised:
        cli.app(list(arguments))
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err.strip()


def test_geometry_is_refused_before_launching(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    message = refused(capsys, "train", str(path), "--gpus", "5")
    assert message.startswith(f"{path}: data.prompts_per_step: 8 prompts x 12 images = 96 do not")
    local = "distributed.engine=local"
    message = refused(capsys, "train", str(path), "--gpus", "2", "--set", local)
    assert message == (
        f"{path}: distributed.engine: local runs in one process; drop --gpus 2, or use engine zero"
    )
    message = refused(capsys, "train", str(path), "--set", "run.stepz=1")
    assert message == "--set run.stepz: unknown field. Did you mean run.steps?"
    assert list(empty.iterdir()) == []


def test_a_hostfile_says_how_many_ranks_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, hosts = written(tmp_path), tmp_path / "hosts"
    several = ["train", str(path), "--hostfile", str(hosts)]
    assert refused(capsys, *several).startswith(f"{hosts}: no such hostfile; write a line")
    hosts.write_text("a slots=3\nb slots=2\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "pdsh, which is not on the PATH; install it, or" in refused(capsys, *several)
    (tmp_path / "pdsh").touch(mode=0o755)
    assert "do not split evenly over 5 ranks" in refused(capsys, *several)
    local = "distributed.engine=local"
    hosts.write_text("a slots=2\nb slots=2\n")
    assert f"drop --hostfile {hosts}," in refused(capsys, *several, "--set", local)
    message = refused(capsys, *several, "--gpus", "4")
    assert message == "--gpus 4: --hostfile says how many there are; drop --gpus"


def test_folders_without_a_run_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "export", str(tmp_path))
    assert message.startswith(f"{tmp_path}: no checkpoints; name the folder")
    message = refused(capsys, "report", str(tmp_path))
    assert message == (
        f"{tmp_path}: no metrics.jsonl; name the folder of a run, such as runs/tiny-flux-gardo"
    )
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file, a folder that is not there, a log that is none, a run without its recipe."""
    file, gone, run_folder = tmp_path / "file", tmp_path / "gone", tmp_path / "run"
    file.write_text("no run")
    for folder in (file, gone):
        assert "no checkpoints; name the folder" in refused(capsys, "export", str(folder))
        assert "no metrics.jsonl; name the folder" in refused(capsys, "report", str(folder))
        assert f"{folder}" in refused(capsys, "plan", str(folder))
        assert f"{folder}" in refused(capsys, "doctor", str(folder))
        out = str(tmp_path / "out")
        assert f"{folder}" in refused(capsys, "import", str(folder), "--out", out)
    run_folder.mkdir()
    (run_folder / "metrics.jsonl").write_text("{}\n{}\n")
    message = refused(capsys, "report", str(run_folder))
    assert message.startswith(f"{run_folder}: no report can be made of it: ")
    assert f"no line of {run_folder / 'metrics.jsonl'} is a record" in message
    torn = run_folder / "checkpoints" / "step-000001"
    torn.mkdir(parents=True)
    assert "its manifest cannot be read" in refused(capsys, "export", str(run_folder))
    manifest: dict[str, object] = {"format": 1, "step": 1, "files": []}
    manifest["sha256"] = self_digest(manifest)
    (torn / "manifest.json").write_text(json.dumps(manifest))
    message = refused(capsys, "export", str(run_folder))
    assert message.startswith(f"{run_folder / 'recipe.yaml'}: no such recipe")
    (run_folder / "recipe.yaml").write_text("[")
    assert "recipe.yaml: not valid YAML" in refused(capsys, "export", str(run_folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]


def test_a_port_that_is_taken_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        message = refused(capsys, "train", str(path), "--port", port)
    assert message == f"--port {port}: another program has it; leave it out"
    assert "less than or equal to 65535" in refused(capsys, "train", str(path), "--port", "70000")
