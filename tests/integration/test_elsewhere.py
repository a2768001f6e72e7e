"""Two ZeRO-3 ranks whose rewards are in a worker and behind a server: the same run to the bit.

And when the server is killed: the run waits for it where it comes back, and ends where it does not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from gardo.report.metrics_log import step_records
from gardo.rewards.serving.wire import TOKEN
from tests import ROOT
from tests.engine.rewards.clip_models import save_clip
from tests.integration.cases import Case
from tests.integration.checks import seen, steps_of
from tests.integration.launch import environment, free_port, start
from tests.integration.recipes import four_models, recipe

NEAR = Case("gardo", "lora", "stage3", ("near",))
FAR = Case("gardo", "lora", "stage3", ("far",))
CUT_OFF = FAR.but(kernels="torch", steps=6)  # a name of its own
SECRET = "a-token-of-the-integration-tests"


@contextmanager
def serving(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """`gardo rewards serve` of the two that have a URL, once it listens."""
    rewards = {n: r for n, r in four_models(folder, far=False)["rewards"].items()
               if n in ("tiny_shape", "clip")}  # fmt: skip
    file = folder / "served.yaml"
    file.write_text(yaml.safe_dump({"rewards": rewards}))
    process = subprocess.Popen(
        [sys.executable, "-m", "gardo.cli", "rewards", "serve", str(file), "--port", str(port)],
        cwd=ROOT, env={**environment(), TOKEN: SECRET, "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout
        said = process.stdout.readline()
        assert said == f"serving clip, tiny_shape at http://127.0.0.1:{port} with a token\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("elsewhere")
    save_clip(made / "clip")
    (made / "server").write_text(f"http://127.0.0.1:{free_port()}")
    return made


def port_of(folder: Path) -> int:
    return int((folder / "server").read_text().rpartition(":")[2])


def wait_for_step(folder: Path, case: Case, step: int) -> None:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if (folder / case.run / "metrics.jsonl").is_file() and len(steps_of(folder, case)) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}")


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """Near, far, and far with the server killed after the first step and started again."""
    with serving(folder, port_of(folder)) as server:
        start(2, folder, [NEAR]).wait()
        start(2, folder, [FAR], env={TOKEN: SECRET}).wait()
        cut_off = start(2, folder, [CUT_OFF], env={TOKEN: SECRET})
        wait_for_step(folder, CUT_OFF, 1)
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
    with serving(folder, port_of(folder)):
        cut_off.wait()
    return folder


def test_a_run_is_the_same_to_the_bit_wherever_its_rewards_are(runs: Path) -> None:
    for near, far in zip(steps_of(runs, NEAR), steps_of(runs, FAR), strict=True):
        assert near["rewards"] == far["rewards"]
        assert near["metrics"] == far["metrics"]
        assert near["events"] == far["events"]
    near_seen, far_seen = seen(runs, NEAR), seen(runs, FAR)
    assert all(torch.equal(near_seen[name], far_seen[name]) for name in near_seen)


def test_a_server_that_is_started_again_costs_no_value(runs: Path) -> None:
    steps = steps_of(runs, CUT_OFF)
    assert len(steps) == CUT_OFF.steps
    assert all(reward["valid"] == 8 for step in steps for reward in step["rewards"].values())


@pytest.mark.full
def test_a_server_that_stays_away_ends_the_run_with_what_to_do(
    folder: Path, tmp_path: Path
) -> None:
    """As its user types it: exit code 1, the iterations before saved, one message."""
    made = recipe(FAR.but(steps=50), folder)
    made["scoring"]["calls"] = {"deadline": 2.0, "attempt": 2.0, "retries": 3, "first_pause": 0.1}
    made["run"] |= {"folder": str(tmp_path), "name": "down"}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(made))
    with serving(folder, port_of(folder)) as server:
        run = subprocess.Popen(
            [sys.executable, "-m", "gardo.cli", "train", str(file), "--gpus", "2"],
            cwd=ROOT, env={**environment(), TOKEN: SECRET}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        until = time.monotonic() + 300
        log = tmp_path / "down" / "metrics.jsonl"
        while '"kind": "step"' not in (log.read_text() if log.is_file() else ""):
            assert time.monotonic() < until and run.poll() is None, run.communicate()[0][-3000:]
            time.sleep(0.05)
        os.kill(server.pid, signal.SIGKILL)
        said, _ = run.communicate(timeout=300)
    assert run.returncode == 1, said[-3000:]
    line = next(line for line in said.splitlines() if "train.bad_updates" in line)
    assert "rewards.tiny_shape: 8 of 8 images have no value (scoring.max_failed: 0.25)" in line
    assert "ConnectError" in line and "--resume goes on after step" in line
    assert SECRET not in said
    for record in step_records(tmp_path / "down"):  # what is far is waited for, once a reward
        assert record["calls"]["remote"] == 4 and record["rows"]["remote"] == 16
        assert not {"reward", "features"} & record["calls"].keys()
    step = int(line.rpartition("after step ")[2])
    assert [*(tmp_path / "down" / "checkpoints").glob(f"step-{step:06d}")]
