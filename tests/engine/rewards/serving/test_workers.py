"""Processes that a run starts for its rewards: they live exactly as long as it does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from gardo.config import reward_sections
from gardo.recipe_errors import RecipeError
from gardo.rewards.assembly import ScoringSettings, Workers, assemble, check_places
from gardo.rewards.base import Reward, RewardSettings
from gardo.rewards.serving.client import Remote, Server
from gardo.rewards.serving.workers import Worker, WorkerSettings, _environment
from tests.engine.rewards.serving.served import CPU, PROMPTS, QUICK, SIZE, pictures, tiny

PATIENT = QUICK.model_copy(update={"deadline": 60.0, "retries": 100, "longest_pause": 0.5})
DINO = {"kind": "dinov3", "path": "builtin:dinov3", "size": 32, "dtype": "float32"}


def gone(pid: int, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_worker_scores_to_the_bit_comes_back_when_killed_and_ends_with_the_run():
    asked = reward_sections(
        {"tiny_fidelity": {"where": "worker"}, "dinov3": {**DINO, "where": "worker:far"},
         "tiny_shape": {"role": "proxy"}},
        "a test",
    )  # fmt: skip
    scoring = ScoringSettings(calls=PATIENT, workers={"far": WorkerSettings(threads=1)})
    said: list[str] = []
    workers = Workers.start(asked, scoring, said.append)
    pids = {name: worker.process.pid for name, worker in workers.running.items()}
    assert set(pids) == {"worker", "far"}
    panel = assemble(asked, scoring, CPU, workers.addresses(), prompt=PROMPTS[0], size=SIZE)
    here = tiny(tiny_fidelity={}, tiny_shape={}, dinov3=DINO)
    for name, reward in here.items():
        assert torch.equal(
            panel.score(name, pictures(3), PROMPTS), reward.score(pictures(3), PROMPTS)
        )

    os.kill(pids["worker"], signal.SIGKILL)
    again = panel.score("tiny_fidelity", pictures(3), PROMPTS)
    assert torch.equal(again, here["tiny_fidelity"].score(pictures(3), PROMPTS))
    assert said == ["worker worker ended (by signal 9); started again"]

    pids = {worker.process.pid for worker in workers.running.values()}
    panel.close()
    workers.close()
    assert all(map(gone, pids))


def test_a_worker_whose_starter_is_killed_ends_too():
    code = (
        "import time; from gardo.rewards.serving.workers import Worker, WorkerSettings\n"
        "w = Worker('w', WorkerSettings(), {'tiny_purity': {'kind': 'tiny_purity'}})\n"
        "w.address(); print(w.process.pid, flush=True); time.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout
    pid = int(starter.stdout.readline())
    assert psutil.pid_exists(pid)
    starter.kill()
    starter.wait()
    assert gone(pid)


def test_a_worker_that_cannot_load_is_one_error(capfd):
    worker = Worker("w", WorkerSettings(), {"d": {**DINO, "path": "/nowhere"}})
    with pytest.raises(
        ValueError, match=r"scoring.workers.w: its rewards did not load \(exit code 2\)"
    ):
        worker.address()
    assert "rewards.d.path" in capfd.readouterr().err


def test_another_python_that_lacks_what_is_needed_is_one_error(tmp_path: Path, capfd):
    empty = tmp_path / "python"
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    empty.chmod(0o755)
    worker = Worker("w", WorkerSettings(python=str(empty)), {"p": {"kind": "tiny_purity"}})
    with pytest.raises(ValueError, match="its rewards did not load"):
        worker.address()
    assert "No module named" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("where", "workers", "message"),
    [
        ("worker:far", {}, "rewards.tiny_purity.where: worker:far: there is no such worker"),
        ("worker", {"far": {}}, "scoring.workers.far: no reward is scored there"),
    ],
)
def test_workers_and_rewards_must_know_each_other(where, workers, message):
    asked = reward_sections({"tiny_purity": {"where": where}}, "a test")
    scoring = ScoringSettings(workers={name: WorkerSettings(**w) for name, w in workers.items()})
    with pytest.raises(ValueError, match=message):
        check_places(asked, scoring)


@pytest.mark.parametrize("where", ["there", "ftp://host", "worker:", "http://", "worker:a b"])
def test_a_place_that_is_none_is_refused(where):
    with pytest.raises(RecipeError, match=r"a test: rewards.tiny_purity.where"):
        reward_sections({"tiny_purity": {"where": where}}, "a test")


def test_a_reward_elsewhere_needs_no_folder_here():
    asked = reward_sections({"d": {**DINO, "path": "/on/the/server", "where": "http://gpu7"}}, "x")
    assert asked["d"].path == "/on/the/server"
    with pytest.raises(RecipeError, match=r"rewards\.d\.path"):
        reward_sections({"d": {**DINO, "path": "/on/the/server"}}, "x")


CHATTY = "tests.engine.rewards.serving.test_workers:Chatty"


class Chatty(Reward):
    """Prints while it loads and while it scores, more than a pipe holds."""

    Settings = RewardSettings

    def __init__(self, settings: RewardSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        print("loading")

    def score(self, images_B3HW, prompts):
        print("x" * 100_000)
        return images_B3HW.mean((1, 2, 3))


def test_what_a_reward_prints_does_not_break_its_worker(capfd):
    worker = Worker("w", WorkerSettings(start_seconds=60), {"c": {"kind": CHATTY}})
    try:
        server = Server(worker.address(), QUICK, parallel=1)
        settings = reward_sections({"c": {"kind": CHATTY, "where": "worker"}}, "a test")["c"]
        far = Remote(settings, CPU, plugin=Chatty, name="c", server=server,
                     pixels="float32", exact=True)  # fmt: skip
        for _ in range(3):
            assert far.score(pictures(3), PROMPTS).isfinite().all()
        far.close()
    finally:
        worker.close()
    assert "loading" in capfd.readouterr().err


def test_a_worker_outlives_the_signals_of_a_batch_system():
    worker = Worker("w", WorkerSettings(), {"p": {"kind": "tiny_purity"}})
    try:
        worker.address()
        assert worker.process
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            worker.process.send_signal(number)
        time.sleep(0.5)
        assert worker.process.poll() is None
    finally:
        worker.close()
    assert worker.process.poll() == 0


def test_a_worker_that_is_closed_does_not_come_back(monkeypatch):
    said: list[str] = []
    worker = Worker("w", WorkerSettings(), {"p": {"kind": "tiny_purity"}}, said.append)
    worker.address()
    first = worker.process
    assert first
    first.kill()
    while not said:  # it is about to be started again
        time.sleep(0.01)
    worker.close()
    worker._watch.join(20)
    assert not worker._watch.is_alive() and worker.process is first


@pytest.mark.parametrize(
    ("python", "why"), [("/nowhere/python", "No such file"), ("/bin/true", "exit code 0")]
)
def test_a_python_that_is_none_is_one_error(python, why):
    worker = Worker("w", WorkerSettings(python=python), {"p": {"kind": "tiny_purity"}})
    with pytest.raises(ValueError, match=f"its rewards did not load .*{why}"):
        worker.address()


def test_another_python_is_given_our_packages_alone(tmp_path: Path):
    """Its own site-packages are its own, wherever ours lie."""
    spy = tmp_path / "python"
    spy.write_text(f'#!/bin/sh\necho "$PYTHONPATH" > {tmp_path}/path\nls "${{PYTHONPATH%%:*}}" > '
                   f"{tmp_path}/listed\n")  # fmt: skip
    spy.chmod(0o755)
    worker = Worker("w", WorkerSettings(python=str(spy)), {"p": {"kind": "tiny_purity"}})
    with pytest.raises(ValueError, match="did not load"):
        worker.address()
    assert (tmp_path / "listed").read_text().split() == ["gardo", "gardo_kernels"]
    assert not Path((tmp_path / "path").read_text().split(":")[0].strip()).exists()


@pytest.mark.parametrize(("first", "seen"), [("3,7", "3,7"), ("", None)])
def test_a_worker_sees_the_gpus_that_the_run_was_given(first, seen, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")  # what a launcher leaves to the ranks
    monkeypatch.setenv("GARDO_CUDA_VISIBLE_DEVICES", first)
    found = _environment(None)
    assert found.get("CUDA_VISIBLE_DEVICES") == seen
    assert "GARDO_CUDA_VISIBLE_DEVICES" not in found
