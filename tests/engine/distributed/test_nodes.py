"""Machines of a hostfile, and commands on their way through DeepSpeed's launchers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from deepspeed.launcher.multinode_runner import PDSHRunner, SlurmRunner
from deepspeed.launcher.runner import encode_world_info, fetch_hostfile, parse_args

from gardo.distributed.base import ranks_here
from gardo.distributed.nodes import for_pdsh, read_hostfile
from tests import ROOT

EXAMPLE = ROOT / "recipes" / "cluster" / "hostfile"


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    assert read_hostfile(EXAMPLE) == fetch_hostfile(str(EXAMPLE)) == {"node-1": 8, "node-2": 8}
    file = tmp_path / "hosts"
    file.write_text("# two machines\n\nb.local  slots=2 # the second\n10.0.0.1\tslots=16\n")
    assert list(read_hostfile(file).items()) == list(fetch_hostfile(str(file)).items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=8\nb\n", "line 2: 'b' is not `NAME slots=GPUS`"),
        ("a slots=0\n", "line 1: 'a slots=0' is not"),
        ("a slots=8 slots=9\n", "line 1: 'a slots=8 slots=9' is not"),
        ("a slots=8\na slots=8\n", "line 2: 'a' stands twice; add its slots up"),
        ("# nobody\n", ": no machine in it; write a line"),
    ],
)
def test_a_bad_hostfile_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / 'hosts'}.*") as raised:
        read_hostfile(tmp_path / "hosts")
    assert message in str(raised.value)


def test_a_missing_hostfile_is_refused(tmp_path: Path) -> None:
    """DeepSpeed would train on this machine alone."""
    with pytest.raises(ValueError, match="no such hostfile; write a line"):
        read_hostfile(tmp_path / "hosts")


SETS = [
    "run.steps=3",
    "model.size=[32,32]",
    "rewards.a={kind:b,role:c}",
    "rewards.clipscore={role: held_out, path: '~/a b'}",
    'data.prompts=a "quoted" $HOME `date` \\ name.txt',
    "data.prompts=$HOME/*",
]


def test_arguments_arrive_whole_through_pdsh() -> None:
    """The command that DeepSpeed's own class builds, read by a shell as ssh would have it read."""
    options = ["--force_multi", "--master_addr", "here", "--module", "gardo.train"]
    runner = PDSHRunner(parse_args([*options, *map(for_pdsh, SETS)]), encode_world_info({"a": [0]}))
    command, _, environment = runner.get_cmd({}, {"node-1": [0], "node-2": [0]})
    assert command[command.index("-w") + 1] == "node-1,node-2"
    assert environment["PDSH_RCMD_TYPE"] == "ssh"
    at = command.index("gardo.train")
    assert "--module" in command[:at] and "--node_rank=%n" in command[:at]
    shell = ["sh", "-c", f"printf '%s\\n' {' '.join(command[at + 1 :])}"]
    arrived = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    assert arrived.splitlines() == SETS


def test_why_deepspeeds_own_slurm_launcher_is_not_used() -> None:
    """It drops `--module`. When it no longer does, docs/cluster.md may say something else."""
    args = parse_args(["--launcher", "slurm", "--module", "gardo.train"])
    runner = SlurmRunner(args, encode_world_info({"a": [0]}), {"a": 1})
    assert "-m" not in runner.get_cmd({}, {"a": [0]})


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, 16), ({"LOCAL_SIZE": "8"}, 8), ({"LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "8"}, 4)],
)
def test_ranks_of_this_machine(
    said: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert ranks_here(16) == expected
