"""`gardo rewards fit`: what it reports and writes, and what it refuses before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from gardo.cli import app
from gardo.fitting.accuracy import measured
from gardo.fitting.command import batches, fit_reward
from gardo.rewards.fitted import Fit, read_fit
from tests.engine.fitting import drawn

OWN = ["--features", "dinov3", "--path", "builtin:dinov3", "--size", "32", "--device", "cpu"]


def gardo(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["rewards", "fit", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_what_features_can_see_is_learnt_and_reported(pairs: Path, tmp_path: Path):
    code, said, _ = gardo(pairs, *OWN, "--out", tmp_path / "fit", "--held-out", 0.4)
    assert code == 0
    first, features, fit, train, held_out, last = said.splitlines()
    assert first == f"{pairs}: 160 pairs (0 ties) of 20 prompts and 320 pictures"
    assert features.startswith("features: dinov3 of builtin:dinov3, 48 wide, of 320 pictures")
    assert fit.startswith("fit: 5 heads, linear, bradley_terry, on 96 pairs in ")
    assert fit.endswith("held out: 64 pairs, whole prompts")
    assert train.startswith("train: accuracy ") and held_out.startswith("held out: accuracy ")
    assert last.startswith(f"wrote {tmp_path / 'fit'}; in a recipe: {{kind: fitted")
    report = read_fit(str(tmp_path / "fit")).report["held_out"]
    assert report["accuracy"]["mean"] > 0.75 and report["accuracy"]["low"] > 0.5
    assert report["log_loss"] < 0.6 and report["pairs"] == 64
    assert abs(report["predicted"] - report["observed"]) < 0.15
    assert sum(part["pairs"] for part in report["bins"]) == 64


def test_random_verdicts_are_said_to_be_unknown(tmp_path: Path):
    file = drawn.write(tmp_path / "pairs", verdict=drawn.at_random)
    code, said, _ = gardo(file, *OWN, "--out", tmp_path / "fit", "--held-out", 0.5)
    accuracy = read_fit(str(tmp_path / "fit")).report["held_out"]["accuracy"]
    assert code == 0 and accuracy["low"] < 0.5 < accuracy["high"]
    assert "held-out accuracy is not shown to be above 0.5" in said


def test_the_folder(fitted: Path):
    assert sorted(path.name for path in fitted.iterdir()) == ["fitted.json", "heads.safetensors"]
    found = read_fit(str(fitted))
    assert (found.features, found.path, found.size, found.width) == (
        "dinov3", "builtin:dinov3", 32, 48
    )  # fmt: skip
    assert (found.heads, found.hidden, found.loss, found.seed, found.pairs) == (
        5, 0, "bradley_terry", 0, 160
    )  # fmt: skip
    state = load_file(fitted / "heads.safetensors")
    assert {n: list(t.shape) for n, t in state.items()} == {
        "mean": [48], "deviation": [48], "weight": [5, 1, 48], "bias": [5, 1]
    }  # fmt: skip
    assert {t.dtype for t in state.values()} == {torch.float32}


def test_the_same_seed_is_the_same_bytes(pairs: Path, fitted: Path, tmp_path: Path):
    fit_reward(pairs, drawn.wanted(tmp_path / "again"))
    fit_reward(pairs, drawn.wanted(tmp_path / "other", seed=1))
    for name in ("fitted.json", "heads.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (fitted / name).read_bytes()
        assert (tmp_path / "other" / name).read_bytes() != (fitted / name).read_bytes()


@pytest.mark.parametrize(
    ("loss", "verdict", "hidden"),
    [("ties", drawn.ties_where_near, 0), ("margin", drawn.with_margins, 0),
     ("uncertainty", drawn.by_brightness, 0), ("bradley_terry", drawn.by_brightness, 8)],
)  # fmt: skip
def test_every_loss_learns_it(loss: str, verdict: Any, hidden: int, tmp_path: Path):
    file = drawn.write(tmp_path / "pairs", verdict=verdict)
    said = fit_reward(file, drawn.wanted(tmp_path / "fit", loss=loss, hidden=hidden, held_out=0.4))
    assert said.accuracy.mean > 0.75 and said.accuracy.low > 0.5
    assert (said.ties > 0) == (loss == "ties")


def test_one_prompt_is_fitted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = drawn.write(tmp_path / "pairs", 30, prompts=1)
    said = fit_reward(file, drawn.wanted(tmp_path / "fit"))
    assert "held out: 6 pairs, pairs of the one prompt, no new prompt" in capsys.readouterr().out
    assert said.by_prompt.low != said.by_prompt.low and said.pairs == 6  # NaN: one prompt


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--features", "vgg"], "--features vgg: it is none of dinov3, dinov2, clip"),
        (["--loss", "hinge"], "--loss hinge: it is none of bradley_terry, ties, margin, uncer"),
        (["--held-out", "1"], "--held-out 1: a share of the pairs between 0 and 1"),
        (["--path", "./none"], "--path "),
        (["--features", "clip"], "--size 32: clip has the size of its model"),
        (["--device", "abacus"], "--device abacus: no such device"),
        (["--loss", "ties"], "--loss ties: no pair of "),
        (["--loss", "margin"], "--loss margin: no pair of "),
        (["--size", "30"], "--size: 30: is no multiple of the model's patches of 4 pixels"),
        (["--path", "nobody/nothing"], "--path: 'nobody/nothing'"),
    ],
)
def test_wrong_options(pairs: Path, tmp_path: Path, arguments: list[str], message: str,
                       monkeypatch: pytest.MonkeyPatch):  # fmt: skip
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, said = gardo(pairs, *OWN, "--out", tmp_path / "fit", *arguments)
    assert code == 2 and said.startswith(message) and said.count("\n") == 1
    assert not (tmp_path / "fit").exists()


def test_a_folder_that_has_something_is_left_alone(pairs: Path, tmp_path: Path):
    (tmp_path / "mine.txt").write_text("x")
    code, said, wrong = gardo(pairs, *OWN, "--out", tmp_path)
    assert code == 2 and not said
    assert wrong == f"--out {tmp_path}: is there and not empty; give another folder\n"


def test_a_picture_that_ends_early_names_its_line(tmp_path: Path):
    file = drawn.write(tmp_path / "pairs", 24)
    picture = tmp_path / "pairs" / "5.png"
    picture.write_bytes(picture.read_bytes()[:100])  # its header is whole
    code, _, said = gardo(file, *OWN, "--out", tmp_path / "fit")
    assert code == 2 and said.startswith(f"line 3: '{picture}' cannot be read: ")
    assert not (tmp_path / "fit").exists()


def test_a_wrong_line_is_found_before_a_model_loads(tmp_path: Path):
    file = drawn.write(tmp_path / "pairs", 24)
    with open(file, "a") as more:
        more.write(json.dumps({"prompt": "x", "first": "0.png", "second": "1.png"}))
    code, said, wrong = gardo(file, *OWN, "--out", tmp_path / "fit")
    assert code == 2 and not said
    assert wrong.startswith(f"'{file}', line 25: preferred: missing; write first")


# ---- its parts -----------------------------------------------------------------------------------


def test_pictures_of_one_size_go_together():
    rows = [(Path(str(i)), "p") for i in range(7)]
    sizes = {path: (8, 8) if i % 2 else (4, 8) for i, (path, _) in enumerate(rows)}
    assert list(batches(rows, sizes, 3)) == [[0, 2, 4], [6], [1, 3, 5]]


def test_accuracy_by_hand():
    """Four pairs: right, wrong, a tie, and one that the reward cannot tell apart."""
    ahead_N = torch.tensor([1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    first_N = torch.tensor([0.7, 0.9, 0.6, 0.5], dtype=torch.float64)
    preferred_N = torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    said = measured(ahead_N, first_N, preferred_N, ["a", "b", "a", "b"])
    assert said.accuracy.mean == pytest.approx((1 + 0 + 0.5) / 3) and said.ties == 1
    logs = torch.tensor([0.7, 0.1, (0.6 * 0.4) ** 0.5, 0.5], dtype=torch.float64).log()
    assert said.log_loss == pytest.approx(-logs.mean().item())
    assert said.predicted == pytest.approx((0.7 + 0.9 + 0.6 + 0.5) / 4)
    assert said.observed == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert [part.pairs for part in said.bins] == [1, 1, 1, 1] and said.knows_nothing
    assert json.dumps(said.as_json(), allow_nan=False)


def test_a_report_is_json(fitted: Path):
    text = (fitted / "fitted.json").read_text()
    assert Fit.model_validate_json(text).model_dump(mode="json") == json.loads(text)
