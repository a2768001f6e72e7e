"""`gardo sample` on the tiny Flux: base, LoRA and run, what it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from gardo import cli, sample
from gardo.config import check
from gardo.export import export_run
from gardo.session import open_session
from gardo.settings import model_path
from gardo.streams import Stream
from gardo.train import train
from gardo_kernels import random_normal
from tests.integration.cases import Case
from tests.integration.recipes import recipe

RUN = Case("flow_grpo", "lora", "local", ("ema",), steps=1)
PROMPTS = ("two red circles", "one blue square")
ASKED = tuple(part for text in PROMPTS for part in ("--prompt", text))
SHORT = (*ASKED, "--steps", 2, "--size", 16, 16)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run of one iteration; its LoRA and their average are exported."""
    root = tmp_path_factory.mktemp("runs")
    with open_session(check(recipe(RUN, root), RUN.name), quiet=True) as session:
        train(session)
    for average in (False, True):
        export_run(root / RUN.run, average=average)
    yield root / RUN.run


def typed(*arguments: object) -> int:
    """What `gardo sample ...` ends with."""
    with pytest.raises(SystemExit) as raised:
        cli.app(["sample", *map(str, arguments)])
    assert isinstance(raised.value.code, int)
    return raised.value.code


def drawn(folder: Path, *arguments: object) -> list[bytes]:
    """The files of the pictures of `gardo sample ... --out FOLDER`."""
    assert typed(*arguments, "--out", folder) == 0
    return [(folder / row["file"]).read_bytes() for row in log(folder)]


def log(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "samples.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


# ---- what it draws and writes --------------------------------------------------------------------


def test_pictures_are_those_of_diffusers(tmp_path: Path) -> None:
    """The pipeline's own pictures from the same noise, to the level of a pixel."""
    assert typed("builtin:flux", *SHORT, "--count", 2, "--seed", 5, "--out", tmp_path) == 0
    rows = log(tmp_path)
    names = [f"00000{n}.png" for n in range(4)]
    assert [row["file"] for row in rows] == names
    assert [row["prompt"] for row in rows] == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == [*names, "grid.png", "samples.jsonl"]
    pipeline = FluxPipeline.from_pretrained(model_path("builtin:flux"), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    for row in rows:
        noise = random_normal(5, torch.tensor([row["image"]]), Stream.EVALUATION, (16, 16))
        (theirs,) = pipeline(
            row["prompt"], latents=noise, height=16, width=16, output_type="np",
            num_inference_steps=row["steps"], guidance_scale=row["guidance"],
            max_sequence_length=row["text_tokens"],
        ).images  # fmt: skip
        with Image.open(tmp_path / row["file"]) as picture:
            ours = numpy.asarray(picture)
        assert ours.shape == (16, 16, 3)
        assert numpy.abs(ours - 255 * theirs).max() <= 0.5 + 1e-3
    with Image.open(tmp_path / "grid.png") as grid:  # a row a prompt, twice as large
        assert grid.size == (2 * 34 + 2, 2 * 34 + 2)


def test_a_model_of_the_other_family_draws(tmp_path: Path) -> None:
    """With guidance and without, from the same noise."""
    guided = drawn(tmp_path / "guided", "builtin:sd3", *SHORT)
    plain = drawn(tmp_path / "plain", "builtin:sd3", *SHORT, "--guidance", 1)
    assert len({*guided, *plain}) == 4
    assert log(tmp_path / "guided")[0]["guidance"] == 4.5


def test_a_lora_and_the_run_that_it_comes_from_draw_the_same_bits(
    run: Path, tmp_path: Path
) -> None:
    here = drawn(tmp_path / "run", "--run", run, *SHORT)
    lora = drawn(tmp_path / "lora", "builtin:flux", "--lora", run / "export", *SHORT)
    average = drawn(tmp_path / "ema", "--run", run, "--ema", "--step", 1, *SHORT)
    exported = drawn(tmp_path / "exported", "builtin:flux", "--lora", run / "export-ema", *SHORT)
    base = drawn(tmp_path / "base", "builtin:flux", *SHORT)
    assert here == lora and average == exported
    assert len({*map(tuple, (here, average, base))}) == 3
    assert log(tmp_path / "run")[0]["weights"]["run"]["step"] == 1
    assert log(tmp_path / "ema")[0]["weights"]["run"]["weights"] == "average"
    assert log(tmp_path / "lora")[0]["weights"]["lora"]["rank"] == 4


def test_a_run_draws_as_its_evaluations_do(run: Path, tmp_path: Path) -> None:
    asked = sample.task(run=run, prompts=PROMPTS, out=tmp_path)
    settings = check(recipe(RUN, run.parent), RUN.name)
    assert asked.steps == settings.evaluate.steps
    model = asked.contender.model
    assert (model.size, model.guidance) == (settings.model.size, settings.model.guidance)
    assert model.text_tokens == settings.model.text_tokens
    other = sample.task(run=run, prompts=PROMPTS, out=tmp_path, steps=3, size=(32, 48), guidance=0)
    assert (other.steps, other.contender.model.size) == (3, (32, 48))
    assert other.contender.model.guidance == 0


@pytest.mark.parametrize(
    ("model", "size", "guidance", "tokens"),
    [
        ("builtin:flux", (32, 32), 3.5, 8),
        ("builtin:sd3", (32, 32), 4.5, 8),
        ("black-forest-labs/FLUX.1-dev@main", (1024, 1024), 3.5, 512),
        ("stabilityai/stable-diffusion-3.5-medium", (1024, 1024), 4.5, 256),
    ],
)
def test_a_model_draws_as_it_was_made_to(model, size, guidance, tokens, tmp_path):
    asked = sample.task(model=model, prompts=PROMPTS, out=tmp_path)
    found = asked.contender.model
    assert (found.size, found.guidance, found.text_tokens) == (size, guidance, tokens)
    assert asked.steps == 28 and found.path == model.partition("@")[0]


def test_a_folder_of_its_own_is_drawn_anew(tmp_path: Path) -> None:
    """Fewer pictures leave none of the earlier ones; the same command gives the same bits."""
    first = drawn(tmp_path, "builtin:flux", *SHORT)
    assert drawn(tmp_path / "other", "builtin:flux", *SHORT, "--seed", 1) != first
    (tmp_path / "other" / "grid.png").unlink()
    again = drawn(tmp_path / "other", "builtin:flux", *SHORT[2:])
    assert again != first and len(again) == 1
    assert not (tmp_path / "other" / "000001.png").exists()
    assert drawn(tmp_path / "other", "builtin:flux", *SHORT) == first


def test_a_prompt_is_no_file_name(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    texts = ["../../etc/passwd", 'a "quoted" line\u2028', "two red circles <b>"]
    lines = [json.dumps({"prompt": text, "tag": "any"}) for text in texts]
    prompts.write_text("\n".join(lines))
    arguments = ("builtin:flux", "--prompts", prompts, "--steps", 1, "--size", 16, 16)
    assert len(drawn(tmp_path / "out", *arguments)) == 3
    assert [row["prompt"] for row in log(tmp_path / "out")] == [text.strip() for text in texts]


# ---- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*ASKED,), "MODEL: give a diffusers folder, a hub id or builtin:flux; or --run RUN"),
        (("builtin:flux",), "--prompt: say what to draw by --prompt TEXT, or by --prompts FILE"),
        (("builtin:flux", *ASKED, "--prompts", "p.txt"), "--prompt: say what to draw by"),
        (("builtin:flux", "--prompt", " "), '"--prompt" is " "; it must be the text to draw'),
        (("builtin:flux", "--prompts", "no.txt"), "--prompts: no such file: 'no.txt'"),
        (("builtin:flux", *ASKED, "--size", 30, 32),
         "builtin:flux: size: [30, 32] is not a multiple of 4 pixels; nearest: [32, 32]"),
        (("builtin:flux", *ASKED, "--size", 0, 32), "builtin:flux: size"),
        (("builtin:flux", *ASKED, "--guidance", "nan"), "--guidance: nan: give a number from 0"),
        (("builtin:flux", *ASKED, "--base", "int4"), "--base: 'int4' is none of nf4, int8"),
        (("builtin:flux", *ASKED, "--step", 3), "--step: of a run's checkpoint; give --run"),
        (("builtin:flux", *ASKED, "--lora", "a", "--run", "b"), "leave out --lora or --run"),
        (("builtin:flux", *ASKED, "--lora", "no.safetensors"), "--lora: no.safetensors: no such"),
        (("--run", "no-run", *ASKED), "no-run: no checkpoints; name the folder of a run"),
        (("./nowhere", *ASKED, "--size", 32, 32), "./nowhere: no diffusers folder"),
        (("some/model", *ASKED, "--size", 32, 32), "say which with --family NAME, one of flux"),
        (("some/model", *ASKED, "--family", "flux"), "give --size HEIGHT WIDTH"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_said_before_anything_loads(
    arguments: tuple[object, ...], said: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FluxPipeline, "from_pretrained", None)  # whoever loads, fails otherwise
    assert typed(*arguments, "--out", "out") == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["holiday.jpg", "000000.png", "notes/"])
def test_a_folder_of_something_else_is_left_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = tmp_path / name
    strange.mkdir() if name.endswith("/") else strange.write_bytes(b"mine")
    assert typed("builtin:flux", *SHORT, "--out", tmp_path) == 2
    _, err = capsys.readouterr()
    assert err.startswith(f"--out {tmp_path}: {strange.name} is in it, which is not of `gardo")
    assert [path.name for path in tmp_path.iterdir()] == [strange.name]
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    assert typed("builtin:flux", *SHORT, "--out", file) == 2
    assert "is a file; give a folder" in capsys.readouterr().err


def test_a_base_that_the_run_did_not_train_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed("builtin:numbers", "--run", run, *SHORT, "--out", tmp_path / "out") == 2
    assert "builtin:numbers is another" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
