"""The Flux that writes words: its world, pre-training, judges, arms and table."""

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from campaign.exit_codes import NEEDS_GPU, NEEDS_MORE
from gardo.config import load
from gardo.rewards.ocr import Ocr, OcrSettings, target_of
from gardo.types import Prompt
from tests import ROOT
from words import arms, judges, make, models, tables, world
from words.__main__ import main
from words.fit import Cut, fit

CPU = torch.device("cpu")
SMALL = models.SIZES["small"]
ONCE = {name: models.Budget(1, 5, 1e-3) for name in make.STAGES}


def some_words() -> world.World:
    """The words, with few of the texts beside them: a mask takes a millisecond."""
    return replace(world.words_world(), others=("7Q", "X0B4"))


def making(folder: Path = Path("nowhere"), **changes) -> make.Making:
    return make.Making(replace(SMALL, **changes), folder, CPU)


# ---- the world -----------------------------------------------------------------------------------


def test_a_caption_says_what_is_drawn_and_ocr_finds_its_word():
    scene = world.sample_scenes(some_words(), 40, torch.Generator().manual_seed(0))
    for text in world.captions(some_words(), scene):
        word, *looks = world.parse(text)
        assert world.caption(word, *looks) == text and target_of(Prompt(text)) == word.lower()
    label = world.labels(['"CAT" in red on navy', '"STONE" in cyan on white with a frame'], CPU)
    names = [[world.CLASSES[i] for i in row] for row in label.tolist()]
    assert names[0] == ["C", "A", "T", "", "", "red", "navy", "nothing"]
    assert names[1] == [*"STONE", "cyan", "white", "frame"]


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a cat", "expected such as"),
        ('"CAT" in pink on navy', "'pink' is none of red, yellow"),
        ('"STONES" in red on navy', "'STONES' has more than 5 characters"),
    ],
)
def test_what_is_no_caption_is_refused(prompt, said):
    with pytest.raises(ValueError, match=said):
        world.parse(prompt)


@pytest.mark.parametrize("of", [some_words(), world.numbers_world()], ids=["words", "numbers"])
def test_held_out_words_are_never_drawn_in_pre_training(of):
    scene = world.sample_scenes(of, 4000, torch.Generator().manual_seed(0))
    drawn = {of.texts[i] for i in scene.text_B.tolist()}
    assert drawn == {*of.trained, *of.others} and not drawn & {*of.held_out}
    spelt = {(i, letter) for word in of.trained for i, letter in enumerate(word)}
    unseen = [w for w in of.held_out if any(pair not in spelt for pair in enumerate(w))]
    assert len(unseen) <= len(of.held_out) / 4  # of words; the other texts teach those


def test_ocr_reads_clean_pictures_to_the_letter():
    """Every colour, ground, decoration and font is among them."""
    pytest.importorskip("rapidocr")
    of = some_words()
    masks = world.masks(of)
    scene = world.sample_scenes(of, 18, torch.Generator().manual_seed(1))
    turn = torch.arange(18)
    looks = {"colour_B": turn % 6, "ground_B": turn // 6, "decoration_B": turn % 3}
    scene = replace(scene, font_B=turn // 2 % 3, text_B=turn * 5 % len(of.trained), **looks)
    images = world.draw(of, scene, masks)
    assert images.shape == (18, 3, 64, 64) and images.min() >= 0 and images.max() <= 1
    reader = Ocr(OcrSettings(role="proxy", limit_side_len=make.OCR_SIDE), CPU)
    score_B = reader.score(images, [Prompt(text) for text in world.captions(of, scene)])
    assert int((score_B == 1).sum()) >= 17


# ---- pre-training --------------------------------------------------------------------------------


def test_a_cut_training_goes_on_to_the_bit(tmp_path):
    """A call that has no time left makes one step; three such calls are one of three steps."""

    def trained(file, until):
        m = making(budgets={"flux": models.Budget(3, 2, 1e-3)})
        task = make.task_of(m, "flux")
        budget = m.size.budgets["flux"]
        fit("flux", task.model, task.loss, budget, file=file, until=until, average=task.average)
        return [*task.model.state_dict().values(), *task.average.state_dict().values()]

    for done in (1, 2):
        with pytest.raises(Cut, match=f"flux: {done} of 3 steps"):
            trained(tmp_path / "cut.safetensors", 0.0)
    gone_on, whole = (
        trained(tmp_path / "cut.safetensors", 0.0),
        trained(tmp_path / "whole.safetensors", float("inf")),
    )
    start = make.task_of(making(), "flux").model.state_dict().values()
    assert all(map(torch.equal, gone_on, whole))
    assert not all(map(torch.equal, start, whole[: len(whole) // 2]))


def test_the_full_size_fits_half_an_hour_by_its_estimate():
    text = make.estimate(models.SIZES["full"])
    assert float(text.splitlines()[-1].split()[0]) < 25
    flux = next(line.split() for line in text.splitlines() if line.startswith("flux"))
    assert 20 < float(flux[1]) < 100  # M parameters


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Models of one step of each stage, of the small size."""
    pytest.importorskip("rapidocr")
    folder = tmp_path_factory.mktemp("model")
    make.make(making(folder, budgets=ONCE, samples=2), float("inf"))
    return folder


def test_make_leaves_models_prompts_and_what_ocr_read(made):
    facts = make.made(made)
    assert facts["stages"] == list(make.STAGES) and facts["size"] == "small"
    assert set(facts["ocr"]) == {"trained", "held_out"} and facts["vae_mse"] < 1
    assert (made / "samples.png").is_file() and not [*made.glob("checkpoints/*.safetensors")]
    words = [world.parse(line)[0] for line in (made / "evaluate.txt").read_text().splitlines()]
    of, half = SMALL.world, len(SMALL.world.held_out)
    assert words == [*of.trained[:half], *of.held_out]
    again = make.make(making(made, budgets={}), 0.0)  # nothing is left to train
    assert again == facts
    with pytest.raises(SystemExit, match="holds models of size small; give another folder"):
        make.make(replace(making(made), size=models.SIZES["full"]), 0.0)


# ---- the judges ----------------------------------------------------------------------------------


def test_the_held_out_judge_learns_to_reject_corrupted_pictures():
    steps = 60
    m = making(budgets={"genuine": models.Budget(steps, 20, 3e-3)})
    task = make.task_of(m, "genuine")
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.zero_grad()
        task.loss(step).backward()
        optimizer.step()
    images = m.pictures("genuine", 10_000)[1]
    bad = judges.corrupted(images, torch.Generator().manual_seed(0))
    with torch.no_grad():
        good, rejected = (task.model(x).softmax(-1)[..., -1].mean(1) for x in (images, bad))
    assert float((rejected[:, None] > good).float().mean()) > 0.8  # area under the ROC curve


def test_rewards_read_their_weights_and_score_what_is_asked(made):
    texts = [Prompt('"42" in red on black'), Prompt('"17" in cyan on black')]
    for plugin, file, low, high in (
        (judges.Letters, "letters", -4, 0),
        (judges.Genuine, "genuine", 0, 1),
    ):
        settings = plugin.Settings(
            kind="words", role="held_out", path=str(made / f"{file}.safetensors"), batch=1
        )
        reward, images = plugin(settings, CPU), torch.rand(2, 3, 64, 64)
        value_B = reward.score(images, texts)
        assert value_B.shape == (2,) and bool(((value_B >= low) & (value_B <= high)).all())
        assert not torch.equal(value_B, reward.score(images, texts[::-1]))
        assert reward.score(images * torch.nan, texts).isnan().all()
        with pytest.raises(ValueError, match="no such file"):
            plugin.Settings(kind="words", role="held_out", path="nowhere")


# ---- the arms ------------------------------------------------------------------------------------


def recipes(made: Path, *, small: bool) -> dict[str, dict]:
    said = arms.settings(made / "runs", made, small=small)
    return {a: load(arms.recipe_of(a), said).model_dump(mode="json") for a in arms.ARMS}


@pytest.mark.parametrize("small", [True, False])
def test_arms_are_valid_and_differ_in_the_algorithm_alone(made, small):
    found = recipes(made, small=small)
    assert [r["run"].pop("name") for r in found.values()] == ["no-kl", "uniform-kl", "gardo"]
    algorithms = {arm: recipe.pop("algorithm") for arm, recipe in found.items()}
    assert found["no_kl"] == found["uniform_kl"] == found["gardo"]
    gardo = algorithms["gardo"].pop("base")
    bases = [algorithms["no_kl"], algorithms["uniform_kl"], gardo]
    assert all(base["advantage"] == bases[0]["advantage"] for base in bases)
    assert [base["beta"] > 0 for base in bases] == [False, True, True]
    assert set(algorithms["gardo"]) >= {"gate", "diversity", "reference"}


def test_without_models_or_gpu_it_says_so(tmp_path, capsys):
    assert main(["arms", "--small", "--model", str(tmp_path)]) == NEEDS_MORE
    assert "has no finished models; `./run words make` makes them" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert main(["make"]) == NEEDS_GPU


def test_a_setting_that_is_none_is_one_line(made, tmp_path, capsys):
    command = ["arms", "--small", "--model", str(made), "--out", str(tmp_path)]
    assert main([*command, "--set", "run.stesp=1"]) == 2
    assert "run.stesp" in capsys.readouterr().out and not (tmp_path / "runs" / "no-kl").exists()


@pytest.mark.full
def test_every_arm_trains_and_is_taken_as_it_is_afterwards(made, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(str(ROOT / p) for p in ("engine", "kernels", "benchmarks"))
    )
    few = ["run.steps=1", "data.prompts_per_step=2", "data.images_per_prompt=4"]
    few += ["train.micro_batch=8"]
    few += ["evaluate.prompt_count=4", "evaluate.images_per_prompt=1"]
    for _ in range(2):
        arms.train(tmp_path / "runs", made, float("inf"), small=True, sets=few)
    assert "| GARDO | held out |" in tables.write(tmp_path)
    with (tmp_path / "words.csv").open() as file:
        assert {row["iteration"] for row in csv.DictReader(file)} == {"0", "1"}


# ---- the table -----------------------------------------------------------------------------------


def evaluation(step: int, ocr: list[float]) -> dict:
    by_prompt = {"ocr": ocr, "genuine": [x / 2 for x in ocr], "letters": [x - 4 for x in ocr]}
    return {
        "kind": "evaluation", "step": step, "by_prompt": by_prompt, "image_count": 8,
        "prompt_count": 4, "diversity": {"features": 7.0 + step},
    }  # fmt: skip


def test_the_table_has_the_start_and_both_halves_of_every_arm(tmp_path):
    for index, arm in enumerate(arms.ARMS):
        folder = arms.run_folder(tmp_path / "runs", arm)
        folder.mkdir(parents=True)
        end = [0.5 + 0.1 * index, 0.7 + 0.1 * index, 0.25, 0.45]
        steps = [
            {"kind": "step", "step": n, "metrics": {"gate_share": s} if index else {}}
            for n, s in ((1, 0.1), (2, 0.3))
        ]
        log = [evaluation(0, [0.3, 0.5, 0.2, 0.4]), *steps, evaluation(2, end)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))
        (tmp_path / "runs" / f"{arm}.revision").write_text("abc1234\n")
    lines = tables.write(tmp_path).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:10]]
    assert {len(row) for row in cells} == {10}
    assert [row[0] for row in cells[2:]] == [
        "start", "start", *(title for title in arms.ARMS.values() for _ in range(2))
    ]  # fmt: skip
    rows = {(row[0], row[1]): row for row in cells[2:]}
    assert rows["start", "held out"][2].startswith("30.0 [") and rows["start", "trained"][3] == ""
    assert rows["GARDO", "trained"][2].startswith("80.0 [")
    assert rows["GARDO", "trained"][3].startswith("+40.0 [")
    assert rows["GARDO", "held out"][5].startswith("+2.5 [")
    assert rows["no KL", "trained"][6].startswith("-3.40 [")
    assert [rows[arm, "trained"][8] for arm in ("no KL", "GARDO")] == ["0.0", "20.0"]
    assert "After 2 iterations; one seed. 8 images of 4 prompts" in lines[-1]
    with (tmp_path / "words.csv").open() as file:
        found = [*csv.DictReader(file)]
    assert len(found) == 3 * 2 * 2 * 3 and {row["revision"] for row in found} == {"abc1234"}
