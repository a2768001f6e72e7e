"""Two machines of one rank each, played by this one: what starts them is real but for the wire.

Stand-ins for ssh, pdsh, srun and scontrol lie on the PATH: they run here what would run there. All
else is as on a cluster: DeepSpeed's launcher or the Slurm script, the variables, gloo.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gardo.config import read_yaml
from gardo.distributed import nodes
from gardo.distributed.saved import Saved, committed
from gardo.report.metrics_log import read_metrics
from gardo.train import main
from tests import ROOT
from tests.integration.launch import DEMO, Launched, environment, free_port, settings_for

STAND_INS = {
    "ssh": "echo 127.0.0.1",
    "scontrol": "echo 127.0.0.1; echo 127.0.0.2",
    # pdsh -S -f N -w HOST,HOST COMMAND: a shell on each host, %n is its number
    "pdsh": """
while [ "$1" != -w ]; do shift; done
hosts=$2; shift 2
number=0; ranks=
for host in ${hosts//,/ }; do
    command=$*
    sh -c "${command//%n/$number}" & ranks="$ranks $!"
    number=$((number + 1))
done
for rank in $ranks; do wait $rank || exit $?; done
""",
    # srun OPTIONS COMMAND: a task on each of two nodes
    "srun": """
while [[ $1 == --* ]]; do shift; done
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 SLURM_LOCALID=0
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
wait $first && wait $second
""",
}


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment in which the stand-ins are found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(stat.S_IRWXU)
    own = environment()
    return {**own, "PATH": os.pathsep.join([str(folder), own["PATH"]])}


def run_of(folder: Path) -> Path:
    """The run, seen to have been two ranks'."""
    run = folder / "tiny-flux-gardo"
    assert [r["kind"] for r in read_metrics(run / "metrics.jsonl")][-2:] == ["step", "evaluation"]
    (newest,) = committed(run / "checkpoints")
    assert Saved(newest).manifest["world"] == 2
    return run


@pytest.mark.full  # three launchers import everything, one after another
def test_a_hostfile_starts_two_machines(cluster: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
    reward = "rewards.tiny_patches={role: held_out, min_pixels: 3}"  # for a shell to take apart
    done = subprocess.run(
        [sys.executable, "-m", "gardo.cli", "train", str(DEMO), "--port", str(free_port()),
         "--hostfile", str(tmp_path / "hosts"), *settings_for(tmp_path, reward)],
        cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    resolved = read_yaml((run_of(tmp_path) / "recipe.yaml").read_text(), "recipe.yaml")
    assert resolved["rewards"]["tiny_patches"]["min_pixels"] == 3


def test_the_slurm_script_starts_two_machines(cluster: dict[str, str], tmp_path: Path) -> None:
    script = ROOT / "recipes" / "cluster" / "slurm.sbatch"
    job = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_ID": str(free_port() - 20000)}
    done = subprocess.run(
        ["bash", str(script), str(DEMO), *settings_for(tmp_path)],
        cwd=ROOT, env={**cluster, **job}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    run_of(tmp_path)


def train_apart(folder: Path, settings: list[str]) -> int:
    """A rank whose relative paths lie in a folder of its own; 0 where the run is refused."""
    here = folder / f"machine-{os.environ['RANK']}"
    here.mkdir()
    os.chdir(here)
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    nodes.PATIENCE = 1.0
    return 0 if main([str(DEMO), *settings, "--set", "run.folder=runs"]) == 2 else 1


def test_a_run_folder_that_is_not_shared_is_refused_before_training(tmp_path: Path) -> None:
    said = Launched(2, train_apart, tmp_path, settings_for(tmp_path)).wait()
    assert f"{DEMO}: run.folder: runs on " in said and "all machines share" in said
    assert not list((tmp_path / "machine-0").rglob("*.*"))
