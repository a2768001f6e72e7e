"""The command that starts the ranks: which GPUs, which port, which machines."""

from __future__ import annotations

import argparse
import base64
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from deepspeed.launcher import launch as launcher
from deepspeed.launcher.runner import fetch_hostfile, parse_args, parse_inclusion_exclusion

from gardo import launch
from gardo.distributed.nodes import included, sent_on

LAUNCHED = {"master": None, "port": None, "launched": True}


def understood(command: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What DeepSpeed's launcher takes a command for."""
    assert command[1:3] == ["-m", launcher.__name__]
    monkeypatch.setattr(sys, "argv", command[2:])
    return launcher.parse_args()


def gpus_taken(command: list[str], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """GPUs of this machine that DeepSpeed's launcher gives to the ranks."""
    world = json.loads(base64.urlsafe_b64decode(understood(command, monkeypatch).world_info))
    return world.pop("localhost") if len(world) == 1 else pytest.fail(f"{world}")


def command(gpus: int, here: int, visible: str | None, include: str | None = None) -> list[str]:
    env = {} if visible is None else {launch.VISIBLE: visible}
    where = launch.places(
        gpus=None if include else gpus, hostfile=None, include=include, here=here, env=env
    )
    assert where.ranks == gpus
    return launch.command(where, ["recipe.yaml"], **LAUNCHED)


@pytest.mark.parametrize(
    ("gpus", "here", "visible", "include", "taken"),
    [
        (4, 8, None, None, [0, 1, 2, 3]),
        (4, 4, "4,5,6,7", None, [4, 5, 6, 7]),
        (2, 4, "4,5,6,7", None, [4, 5]),
        (1, 1, "6", None, [6]),
        (2, 8, None, "localhost:3,5", [3, 5]),
        (8, 8, None, "localhost", [0, 1, 2, 3, 4, 5, 6, 7]),
        (2, 0, None, None, [0, 1]),  # CPU processes
        (2, 0, "4,5", None, [0, 1]),
    ],
)
def test_ranks_get_the_gpus_that_are_meant(
    gpus: int,
    here: int,
    visible: str | None,
    include: str | None,
    taken: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launcher sets CUDA_VISIBLE_DEVICES to what it is told."""
    assert gpus_taken(command(gpus, here, visible, include), monkeypatch) == taken


@pytest.mark.parametrize("name", ["GPU-8932f937", "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f"])
def test_a_gpu_without_a_number_is_used_without_the_launcher(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = command(1, 1, name)
    assert typed[1:] == ["-m", "gardo.train", "recipe.yaml"]
    # what it then sees is CUDA's business: the variable must arrive
    where = launch.places(gpus=1, hostfile=None, include=None, here=1, env={launch.VISIBLE: name})
    monkeypatch.setenv(launch.VISIBLE, name)
    assert launch.run(where, ["sh", "-c", f'test "${launch.VISIBLE}" = {name}'], on_cpu=False) == 0
    with pytest.raises(ValueError, match=f"knows GPUs by number, not {name}; give the numbers"):
        command(2, 2, f"{name},{name}x")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gpus": 8, "here": 4}, "--gpus 8: this machine has 4; use --gpus 4, or set DS_ACC"),
        ({"gpus": 4, "here": 2, "env": {launch.VISIBLE: "4,5"}},
         "--gpus 4: this machine has 2 (CUDA_VISIBLE_DEVICES=4,5); use --gpus 2"),
        ({"gpus": 2, "include": "localhost:0", "here": 4}, "--gpus 2: --include says how many"),
        ({"include": "localhost:1", "here": 1}, "localhost has GPUs 0 to 0, no 1"),
        ({"include": "node:1", "here": 1}, "no 'node'; there is localhost"),
        ({"include": "localhost:a", "here": 1}, "'localhost:a' is not NAME or NAME:GPU,GPU"),
        ({"include": "localhost:0", "here": 0}, "no GPU here to choose from; give --gpus"),
        ({"include": "localhost:1", "here": 2, "env": {launch.VISIBLE: "4,5"}},
         "CUDA_VISIBLE_DEVICES=4,5: --include chooses the GPUs itself; unset"),
    ],
)  # fmt: skip
def test_what_cannot_be_started_is_refused(options: dict[str, object], said: str) -> None:
    every = {"gpus": None, "hostfile": None, "include": None, "env": {}, **options}
    with pytest.raises(ValueError, match=re.escape(said)):
        launch.places(**every)  # type: ignore[arg-type]


def test_part_of_a_hostfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=8\nb slots=8\nc slots=4\n")
    (tmp_path / "pdsh").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    text = "c@a:1,2,2"
    where = launch.places(gpus=None, hostfile=hosts, include=text, here=0, env={})
    theirs = parse_inclusion_exclusion(fetch_hostfile(str(hosts)), text, "")
    assert where.ranks == sum(map(len, theirs.values())) == 6
    assert included({"a": 8, "b": 8, "c": 4}, text) == theirs
    typed = launch.command(where, ["recipe.yaml"], **{**LAUNCHED, "master": "10.0.0.7"})
    args = parse_args(typed[3:])
    assert args.include == text and args.master_addr == "10.0.0.7" and args.force_multi


def test_the_port_is_one_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    def port(asked: int | None = None) -> int:
        typed = launch.command(launch.Places(2), ["r"], **{**LAUNCHED, "port": asked})
        return int(understood(typed, monkeypatch).master_port)

    with socket.socket() as taken:
        taken.bind(("", 29500))  # what the launcher takes
        ports = {port() for _ in range(8)}
        assert 29500 not in ports
        for free in ports:
            with socket.socket() as probe:
                probe.bind(("", free))
    assert port(1234) == 1234


@pytest.mark.parametrize(
    ("script", "code"),
    [("exit 0", 0), ("exit 3", 3), ("kill -TERM $$", 143), ("exit 241", 143), ("exit 250", 134)],
)
def test_exit_codes_are_a_shells(script: str, code: int) -> None:
    """The launcher gives a rank's -15, of a signal, back as 241."""
    assert launch.run(launch.Places(1), ["sh", "-c", script], on_cpu=True) == code


def test_what_a_failed_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    left = tmp_path / "left"
    script = f"sleep 60 & echo $! > {left}; exit 1"
    assert launch.run(launch.Places(1), ["sh", "-c", script], on_cpu=True) == 1
    psutil.wait_procs([psutil.Process(pid) for pid in pids_there(left)], timeout=10)
    assert not pids_there(left)


def pids_there(file: Path) -> list[int]:
    return [pid for pid in map(int, file.read_text().split()) if psutil.pid_exists(pid)]


@pytest.mark.parametrize(("handler", "code"), [(signal.SIG_DFL, 7), (signal.SIG_IGN, 0)])
def test_a_closed_terminal_is_passed_on_unless_it_is_ignored(handler: Any, code: int) -> None:
    """As nohup ignores it."""
    script = """
        of() { awk "/$1/ {print \\$2}" /proc/$PPID/status; }
        until (( (0x$(of SigCgt) | 0x$(of SigIgn)) & 1 )); do sleep 0.05; done  # it has begun
        trap 'exit 7' HUP
        kill -HUP $PPID
        for i in 1 2 3 4 5 6; do sleep 0.1; done
    """
    earlier = signal.signal(signal.SIGHUP, handler)
    try:
        assert launch.run(launch.Places(1), ["bash", "-c", script], on_cpu=True) == code
        assert signal.getsignal(signal.SIGHUP) is handler
    finally:
        signal.signal(signal.SIGHUP, earlier)


def test_what_other_machines_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through DeepSpeed's own reading of the file, and a shell as ssh would start it."""
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import encode_world_info

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / ".deepspeed_env").write_text("HF_HOME=/mine\n\nLD_LIBRARY_PATH=/opt/lib\n")
    env = {
        "HF_HOME": "/theirs", "HF_HUB_OFFLINE": "1", "NCCL_DEBUG": "INFO", "DS_ACCELERATOR": "cpu",
        "TRITON_CACHE_DIR": "/a b/$c`d`\"e\"", "https_proxy": "http://p:1", "OMP_NUM_THREADS": "3",
        "HF_TOKEN": "secret", "WANDB_API_KEY": "secret", "CUDA_VISIBLE_DEVICES": "4,5",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "EDITOR": "vi", "hf_token": "secret",
        "HTTP_PROXY": "http://me:secret@p:1",
    }  # fmt: skip
    text = sent_on(env)
    assert "secret" not in text and "4,5" not in text and "EDITOR" not in text
    runner = PDSHRunner(parse_args(["--master_addr", "h", "r"]), encode_world_info({"a": [0]}))
    for line in text.splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    exports = runner.get_cmd({}, {"a": [0]})[0][6]
    shell = ["env", "-i", "sh", "-c", f"{exports} env"]
    said = subprocess.run(shell, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "HF_HOME=/mine" in said and "LD_LIBRARY_PATH=/opt/lib" in said
    for name in ("TRITON_CACHE_DIR", "https_proxy", "NCCL_DEBUG", "DS_ACCELERATOR"):
        assert f"{name}={env[name]}" in said


@pytest.mark.parametrize(("hostfile", "said"), [(None, "cpu"), ("hosts", "unset")])
def test_only_ranks_of_this_machine_are_told_that_it_has_no_gpu(
    hostfile: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node starts what runs on the GPUs of others."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    where = launch.Places(2, hostfile=tmp_path / hostfile if hostfile else None)
    out = tmp_path / "said"
    sent = f'echo "${{DS_ACCELERATOR:-unset}}" > {out}; grep -c DS_ACC "$DS_ENV_FILE" >> {out}'
    launch.run(where, ["sh", "-c", sent], on_cpu=True)
    assert out.read_text().split() == ([said] if hostfile is None else [said, "0"])
