"""What `gardo rewards check` and `serve` say of a recipe's rewards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gardo.cli import app
from gardo.config import reward_file
from gardo.reward_service import compared, sample_pictures, served_here
from gardo.rewards.serving.wire import TOKEN
from tests import ROOT
from tests.engine.rewards.serving.served import free_port

DEMO = ROOT / "recipes" / "tiny_flux_gardo.yaml"


def gardo(*arguments: str | Path) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["rewards", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def rewards(tmp_path: Path) -> Path:
    file = tmp_path / "rewards.yaml"
    file.write_text(
        "rewards: {tiny_purity: {}, shape: {kind: tiny_shape}}\nmodel: {size: [32, 32]}\n"
    )
    return file


def test_a_training_recipe_is_checked_reward_by_reward():
    code, said, _ = gardo("check", DEMO, "--only", "tiny_purity", "--only", "tiny_fidelity")
    assert code == 0
    assert [line for line in said.splitlines() if not line.startswith(" ")] == [
        "ok      tiny_purity (tiny_purity, here)",
        "ok      tiny_fidelity (tiny_fidelity, here)",
    ]
    assert said.count("ms an image") == said.count("licence: ") == 2


def test_values_are_recorded_and_compared(rewards: Path, tmp_path: Path):
    golden = tmp_path / "golden.json"
    assert gardo("check", rewards, "--record", golden)[0] == 0
    code, said, _ = gardo("check", rewards, "--golden", golden)
    assert code == 0 and said.count("as in the golden file") == 2
    recorded = json.loads(golden.read_text())
    recorded["rewards"]["shape"]["values"][2] += 0.5
    golden.write_text(json.dumps(recorded))
    code, said, _ = gardo("check", rewards, "--golden", golden)
    assert code == 1 and "FAILED  shape" in said and "picture 3: " in said
    assert "ok      tiny_purity" in said


def test_one_that_fails_does_not_keep_the_others_from_being_checked(rewards: Path):
    url = f"http://127.0.0.1:{free_port()}"
    quick = "{deadline: 1.0, attempt: 1.0, retries: 1, first_pause: 0.05}"
    code, said, _ = gardo("check", rewards, "--set", f"rewards.shape.where={url}",
                          "--set", f"scoring.calls={quick}")  # fmt: skip
    assert code == 1
    assert "ok      tiny_purity" in said and "FAILED  shape" in said and "ConnectError" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nobody"], "--only nobody: "),
        (["--set", "rewards.shape.kind=nobody"], "rewards.shape.kind"),
        (["--set", "scoring.max_failed=2"], "scoring.max_failed"),
        (["--golden", "nowhere.json"], "--golden nowhere.json"),
        (["--device", "cuda:99"], "no GPU is here"),
    ],
)
def test_what_cannot_be_checked_is_one_error(rewards: Path, arguments, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, error = gardo("check", rewards, *arguments)
    assert code == 2 and message in error and "Traceback" not in error


def test_a_file_without_rewards_is_one_error(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("model: {}\n")
    code, _, error = gardo("check", tmp_path / "r.yaml")
    assert code == 2 and "rewards: missing" in error


@pytest.mark.parametrize(
    ("arguments", "token", "message"),
    [
        (["--host", "0.0.0.0"], None, "others reach this address, and there is no token"),
        ([], "short", f"{TOKEN}: has 5 characters"),
        (["--only", "nobody"], None, "no such reward to serve"),
    ],
)
def test_what_cannot_be_served_is_one_error(rewards: Path, arguments, token, message, monkeypatch):
    if token:
        monkeypatch.setenv(TOKEN, token)
    else:
        monkeypatch.delenv(TOKEN, raising=False)
    code, _, error = gardo("serve", rewards, "--port", "0", *arguments)
    assert code == 2 and message in error


def test_served_are_those_with_a_url_or_all(rewards: Path):
    every = reward_file(rewards).rewards
    assert list(served_here(every, "x", None)) == ["tiny_purity", "shape"]
    far = reward_file(rewards, ["rewards.shape.where=http://gpu7:8700"]).rewards
    served = served_here(far, "x", None)
    assert list(served) == ["shape"] and served["shape"].where == "here"


def test_a_judge_that_only_a_server_knows_is_told_so_before_it_loads(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text("rewards:\n  good: {kind: yes_no, where: 'http://gpu7:8700'}\n")
    code, _, error = gardo("serve", file, "--port", "0")
    assert code == 2 and f"{file}: rewards.good.path: is missing" in error


def test_the_pictures_are_the_same_every_time():
    assert (sample_pictures((64, 64)) == sample_pictures((64, 64))).all()


@pytest.mark.parametrize(
    ("values", "golden", "wrong"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0),
        ([1.0005], [1.0], 0),
        ([1.002], [1.0], 1),
        ([2001.0], [2000.0], 0),
        ([float("nan")], [1.0], 1),
        ([1.0], [1.0, 2.0], 1),
    ],
)
def test_values_differ_by_a_thousandth_of_their_size(values, golden, wrong):
    assert len(compared(values, golden)) == wrong
