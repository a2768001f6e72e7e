"""`gardo eval` on the tiny Flux: base, LoRA and run, compared, cut and gone on with."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from gardo import cli, evaluate
from gardo.config import check
from gardo.evaluation.statistics import bootstrap_mean, paired_change
from gardo.export import export_run
from gardo.report import pictures
from gardo.report.evaluation import as_html, as_markdown
from gardo.rewards.panel import Panel
from gardo.session import open_session
from gardo.suite import load_suite
from gardo.train import train
from tests.integration.cases import Case
from tests.integration.recipes import recipe

SUITE = """\
name: small
prompts: prompts.txt
images_per_prompt: 2
seed: 3
steps: 2
guidance: 3.5
size: [16, 16]
text_tokens: 8
batch: 5
precision: float32
threads: 1
diversity: both
shown: 3
rewards:
  tiny_count: {role: proxy}
  tiny_shape: {role: auxiliary}
  tiny_purity: {role: held_out}
  dinov3: {role: features, path: "builtin:dinov3", size: 32}
"""
PROMPTS = "one red circle\ntwo green squares\nthree blue triangles\none cyan square\n" \
          "two yellow circles\nthree magenta squares\n"  # fmt: skip
RUN = Case("flow_grpo", "lora", "local", steps=1)
PAGES = ["grid.png", "result.html", "result.json", "result.md"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    (folder / "prompts.txt").write_text(PROMPTS)
    (folder / "suite.yaml").write_text(SUITE)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run of one iteration that drew at another size; its LoRA is exported."""
    root = tmp_path_factory.mktemp("runs")
    with open_session(check(recipe(RUN, root), RUN.name), quiet=True) as session:
        train(session)
    folder = root / RUN.run
    export_run(folder)
    yield folder


def typed(place: Path, *arguments: object) -> int:
    """What `gardo eval ...` ends with."""
    with pytest.raises(SystemExit) as raised:
        cli.app(["eval", *map(str, arguments), "--suite", str(place / "suite.yaml")])
    assert isinstance(raised.value.code, int)
    return raised.value.code


def evaluated(place: Path, name: str, *arguments: object) -> dict[str, Any]:
    """The result of `gardo eval ... --out NAME`."""
    assert typed(place, *arguments, "--out", place / name) == 0
    return result(place / name)


def result(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "result.json").read_text())
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def base(place: Path) -> dict[str, Any]:
    return evaluated(place, "base", "builtin:flux")


def test_a_result_holds_every_value_and_its_interval(base: dict[str, Any], place: Path) -> None:
    assert sorted(p.name for p in (place / "base").iterdir() if p.is_file()) == sorted(
        [*PAGES, "images.jsonl"]
    )
    for name, role in (("tiny_count", "proxy"), ("tiny_purity", "held_out")):
        one = base["rewards"][name]
        by_image = torch.tensor(one["by_image"], dtype=torch.float64)
        assert by_image.shape == (6, 2) and one["role"] == role
        assert one["by_prompt"] == pytest.approx(by_image.mean(1).tolist())
        expected = bootstrap_mean(by_image.mean(1))
        assert (one["mean"], one["low"], one["high"]) == pytest.approx(
            (expected.mean, expected.low, expected.high)
        )
    assert set(base["diversity"]) == {"pairwise", "nearest", "vendi"}
    assert set(base["label_entropy"]) == {"layout", "size", "hue"}
    assert set(base["proxy"]["rank_correlation"]) == {"tiny_shape", "tiny_purity"}
    assert base["model"]["id"] == "builtin:flux" and len(base["model"]["sha256"]) == 64
    assert base["made_with"]["torch"] == torch.__version__
    assert base["suite"]["asks"]["rewards"]["dinov3"]["kind"] == "dinov3"


def test_a_lora_and_the_run_that_it_comes_from_are_one_model(
    base: dict[str, Any], run: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    against = ("--against", place / "base")
    from_run = evaluated(place, "run", "builtin:flux", "--run", run, *against)
    from_lora = evaluated(place, "lora", "builtin:flux", "--lora", run / "export", *against)
    assert from_run["model"]["run"]["step"] == 1
    assert from_lora["model"]["lora"]["rank"] == 4
    for name, one in from_run["rewards"].items():
        assert one["by_image"] == from_lora["rewards"][name]["by_image"]
        assert one["by_image"] != base["rewards"][name]["by_image"]
        means = [torch.tensor(r["rewards"][name]["by_prompt"]) for r in (base, from_run)]
        expected = paired_change(means[0].double(), means[1].double())
        found = from_run["against"]["rewards"][name]["change"]
        assert found["mean"] == pytest.approx(expected.mean, abs=1e-6)
        assert found["low"] < found["mean"] < found["high"]
    signs = {i["sign"] for i in from_run["against"]["indicators"]}
    assert signs == {"fell", "apart", "traded", "narrower"}
    assert from_run["against"]["differs_in"] == []
    for page in ("result.md", "result.html"):
        text = (place / "run" / page).read_text()
        assert "Signs of reward hacking" in text and "tiny_purity" in text
        assert from_run["against"]["indicators"][0]["of"] in text
    assert "<script" not in (place / "run" / "result.html").read_text()


def test_a_cut_evaluation_goes_on_and_ends_in_the_same_result(
    base: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut in its second batch, and its log torn; only what is missing is drawn again."""
    drawn: list[list[int]] = []
    batch = evaluate._batch

    def cut(t: Any, fixed: Any, panel: Any, image_B: torch.Tensor) -> Any:
        drawn.append(image_B.tolist())
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return batch(t, fixed, panel, image_B)

    monkeypatch.setattr(evaluate, "_batch", cut)
    arguments = ["builtin:flux", "--suite", str(place / "suite.yaml"), "--out", str(place / "cut")]
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(arguments)
    log = place / "cut" / "images.jsonl"
    with log.open("ab") as file:
        file.write(b'{"image": 5, "prompt": 2, "rew')
    assert not (place / "cut" / "result.json").exists()
    assert evaluate.main(arguments) == 0
    assert drawn[2:] == [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]
    for name in PAGES:
        assert (place / "cut" / name).read_bytes() == (place / "base" / name).read_bytes(), name
    count = len(drawn)
    assert evaluate.main([*arguments, "--against", str(place / "base")]) == 0
    assert len(drawn) == count  # it only compared
    changes = result(place / "cut")["against"]["rewards"]
    assert all(one["change"]["mean"] == 0 for one in changes.values())
    assert all(one["win_rate"]["mean"] == 0.5 for one in changes.values())


def test_the_batch_changes_nothing_but_rounding(base: dict[str, Any], place: Path) -> None:
    found = evaluated(place, "batch", "builtin:flux", "--set", "batch=12")
    for name, one in found["rewards"].items():
        expected = torch.tensor(base["rewards"][name]["by_image"])
        assert torch.allclose(torch.tensor(one["by_image"]), expected, atol=1e-4)
    assert found["suite"]["identity"] == base["suite"]["identity"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--against", "{place}/base", "--set", "steps=3"],
         "its suite asks something else (steps: 2 there, 3 here); evaluate both on one suite"),
        (["--against", "{place}/nothing"], "no result.json there"),
        (["--out", "{place}/base", "--set", "seed=4"], "give another --out, or remove it"),
        (["--out", "{place}/base", "--against", "{place}/base"], "this evaluation itself"),
        (["--out", "{place}/prompts.txt/x"], "give another folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_or_written_is_refused(
    arguments: list[str], said: str, base: dict[str, Any], place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = (place / "base" / "result.json").read_bytes()
    assert typed(place, "builtin:flux", *(a.format(place=place) for a in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "Traceback" not in error
    assert (place / "base" / "result.json").read_bytes() == before


def test_a_base_that_the_run_did_not_train_is_refused(
    run: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    from gardo.policies.folders import link_pipeline
    from gardo.settings import model_path

    home = Path(model_path("builtin:flux"))
    other = tmp_path / "other"
    other.mkdir()
    link_pipeline(home, other)
    (other / "transformer").mkdir(exist_ok=True)
    name = "diffusion_pytorch_model.safetensors"
    weights = load_file(home / "transformer" / name)
    weights[next(iter(weights))] += 1
    save_file(weights, other / "transformer" / name)
    config = (home / "transformer" / "config.json").read_bytes()
    (other / "transformer" / "config.json").write_bytes(config)
    assert typed(place, other, "--run", run, "--out", tmp_path / "out") == 2
    assert "is another (" in capsys.readouterr().err


def test_more_pictures_are_drawn_where_more_are_shown(
    base: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured stays; of a picture that is gone the batch is drawn again."""
    found = evaluated(place, "shown", "builtin:flux", "--set", "shown=1")
    (place / "shown" / "images" / "000000.png").unlink()
    more = evaluated(place, "shown", "builtin:flux", "--set", "shown=6")
    assert len(list((place / "shown" / "images").iterdir())) == 12
    assert more["rewards"] == found["rewards"] == base["rewards"]


def test_a_picture_of_many_large_images_is_made_smaller(
    base: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "MIN_SIDE", 4)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 6 * 8 * 8)
    evaluated(place, "smaller", "builtin:flux")
    with Image.open(place / "smaller" / "grid.png") as grid:
        assert grid.size == (2 * (2 * 8 + 2) + 2, 3 * (2 * 8 + 2) + 2)


def test_a_bug_in_a_reward_is_no_refusal(place: Path) -> None:
    reward = "rewards.broken={kind: 'tests.engine.evaluation.measured:Broken', role: held_out}"
    arguments = ["builtin:flux", "--suite", str(place / "suite.yaml"), "--set", reward]
    with pytest.raises(ValueError, match="too many values") as raised:
        evaluate.main([*arguments, "--out", str(place / "broken")])
    assert raised.value.__notes__ == ["rewards.broken: Broken failed"]


@pytest.mark.parametrize(
    ("batch", "lacks", "stops"), [(16, 4, False), (16, 5, True), (1, 1, False)]
)
def test_a_reward_elsewhere_that_says_too_little_stops_the_evaluation(
    place: Path, batch: int, lacks: int, stops: bool
) -> None:
    """Features too; one image that never has a value stops nothing, however small the batch."""
    far = "http://127.0.0.1:9"
    suite = load_suite(
        place / "suite.yaml", [f"batch={batch}", f"rewards.dinov3.where={far}",
                               f"rewards.tiny_purity.where={far}"]
    )  # fmt: skip
    panel = Panel({})
    panel.rewards = {n: SimpleNamespace(settings=s, trouble="down")
                     for n, s in suite.reward_settings.items()}  # fmt: skip
    value_B = torch.ones(batch)
    value_B[:lacks] = torch.nan
    for columns in ({"reward/tiny_purity": value_B}, {"features": value_B[:, None].expand(-1, 3)}):
        with pytest.raises(evaluate.NoValues, match="down") if stops else nullcontext():
            evaluate._check_values(suite, panel, columns)
    here = {"reward/tiny_shape": torch.full((batch,), torch.nan)}
    evaluate._check_values(suite, panel, here)  # NaN of a reward here is left out


def test_a_page_shows_texts_of_users_as_texts(base: dict[str, Any]) -> None:
    hostile = "![x](http://far/away.png) <script>alert(1)</script> & [a](b)"
    asks = {**base["suite"]["asks"], "prompts": [[hostile, {}]] * 6}
    found = {**base, "suite": {**base["suite"], "asks": asks}}
    found["model"] = {**base["model"], "lora": {"path": hostile, "sha256": "0"}}
    for text in (as_markdown(found), as_html(found, tiny_png())):
        assert "<script>alert" not in text
    assert "](http" not in as_markdown(found) and "](b)" not in as_markdown(found)


def tiny_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    return file.getvalue()
