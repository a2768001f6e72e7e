"""The command that starts the ranks: which GPUs, which port, which machines."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.runner import (
    apply_num_nodes_and_gpus,
    fetch_hostfile,
    parse_args,
    parse_inclusion_exclusion,
)

from gardo import launch
from gardo.distributed.nodes import included, sent_on

LAUNCHED = {"master": None, "port": None, "launched": True}


def gpus_taken(command: list[str], there: int) -> list[int]:
    """GPUs of a machine with so many that DeepSpeed's launcher gives to the ranks."""
    args = parse_args(command[command.index("deepspeed.launcher.runner") + 1 :])
    assert fetch_hostfile(args.hostfile) is None
    active = parse_inclusion_exclusion({"localhost": there}, args.include, args.exclude)
    return apply_num_nodes_and_gpus(active, args.num_nodes, args.num_gpus)["localhost"]


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
    gpus: int, here: int, visible: str | None, include: str | None, taken: list[int]
) -> None:
    """DeepSpeed's launcher deletes CUDA_VISIBLE_DEVICES where it is told a number."""
    assert gpus_taken(command(gpus, here, visible, include), 8) == taken


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
    assert included({"a": 8, "b": 8, "c": 4}, text) == {h: len(g) for h, g in theirs.items()}
    typed = launch.command(where, ["recipe.yaml"], **{**LAUNCHED, "master": "10.0.0.7"})
    args = parse_args(typed[3:])
    assert args.include == text and args.master_addr == "10.0.0.7" and args.force_multi


def test_the_port_is_one_that_is_free() -> None:
    with socket.socket() as taken:
        taken.bind(("", 29500))  # what the launcher takes
        where = launch.Places(2)
        ports = {parse_args(launch.command(where, ["r"], **LAUNCHED)[3:]).master_port
                 for _ in range(8)}  # fmt: skip
        assert 29500 not in ports
        for port in ports:
            with socket.socket() as probe:
                probe.bind(("", port))
    chosen = launch.command(where, ["r"], **{**LAUNCHED, "port": 1234})
    assert parse_args(chosen[3:]).master_port == 1234


def test_a_stray_hostfile_is_not_obeyed() -> None:
    assert parse_args(["x"]).hostfile == str(launch.STRAY_HOSTFILE)
    typed = launch.command(launch.Places(2), ["r"], **LAUNCHED)
    assert parse_args(typed[3:]).hostfile == ""


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
