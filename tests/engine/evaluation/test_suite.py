"""A suite's file: what it asks, what is said of a wrong one, and which suites are the same."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from gardo.contender import contender
from gardo.evaluation.images_log import ImagesLog
from gardo.recipe_errors import RecipeError
from gardo.rewards.geneval_metadata import request_of
from gardo.suite import Suite, load_suite, model_settings
from tests import ROOT

SUITES = ROOT / "suites"
GOOD = """\
name: good
prompts: prompts.txt
images_per_prompt: 2
steps: 2
size: [32, 32]
rewards: {tiny_count: {role: proxy}, tiny_fidelity: {role: held_out}}
"""


def written(folder: Path, text: str = GOOD) -> Path:
    (folder / "prompts.txt").write_text("one red circle\ntwo blue squares\n")
    path = folder / "suite.yaml"
    path.write_text(text)
    return path


def suite(folder: Path, *sets: str) -> Suite:
    return load_suite(written(folder), list(sets))


def refusal(folder: Path, *sets: str) -> str:
    with pytest.raises(RecipeError) as raised:
        suite(folder, *sets)
    return str(raised.value)


def test_a_suite_reads_its_prompts_beside_it(tmp_path: Path) -> None:
    found = suite(tmp_path)
    assert found.texts == ["one red circle", "two blue squares"]
    assert found.reward_settings["tiny_count"].role == "proxy"


DINO = "rewards.dinov3={role: features, path: 'builtin:dinov3', size: 32}"


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["stepz=3"], "--set stepz: unknown field. Did you mean steps?"),
        (["prompts=nothing.txt"], "--set prompts: no such file: "),
        (["prompts=geneval:none"], "--set prompts: geneval:none: give how many"),
        (["rewards.tiny_count.role=hidden"], "--set rewards.tiny_count.role: 'hidden'"),
        (["rewards.tiny_coutn={role: proxy}"], "'tiny_coutn' is none of"),
        (["rewards=null"], "--set rewards: missing; name at least one"),
        (["diversity=features"], "--set diversity: features needs a reward with role features"),
        (["diversity=features", "images_per_prompt=1", DINO], "1 image has no other to differ"),
        (["rewards.p={kind: preference, role: held_out, judge: {kind: tiny_count}}"],
         "preference compares the images of a group"),
        (["prompts=geneval:6"], "(rewards.tiny_count)"),
        (["rewards.tiny_count.where=worker:none"], "there is no such worker"),
    ],
)  # fmt: skip
def test_a_bad_suite_is_told_the_field_and_the_mend(
    sets: list[str], said: str, tmp_path: Path
) -> None:
    message = refusal(tmp_path, *sets)
    assert said in message and "\n" not in message


def test_a_suite_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such suite; give a YAML file, such as suites/tiny"):
        load_suite(tmp_path / "none.yaml", [])


@pytest.mark.parametrize(
    "other", ["batch=3", "name=x", "precision=float32", "shown=1", "threads=1", "encoders=resident"]
)
def test_how_it_is_computed_is_no_part_of_what_is_asked(other: str, tmp_path: Path) -> None:
    assert suite(tmp_path, other).identity == suite(tmp_path).identity
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert suite(moved).identity == suite(tmp_path).identity


def test_how_a_judge_is_asked_is_no_part_and_which_one_is(tmp_path: Path) -> None:
    judge = "kind: yes_no, role: held_out, where: 'openai:http://localhost:1/v1', model: a"
    asked = [f"rewards.judge={{{judge}}}", "rewards.judge.parallel=3", "rewards.judge.cache=0"]
    plain = suite(tmp_path, asked[0])
    assert suite(tmp_path, *asked).identity == plain.identity
    assert suite(tmp_path, asked[0], "rewards.judge.model=b").identity != plain.identity


@pytest.mark.parametrize(
    "other",
    ["seed=1", "steps=3", "images_per_prompt=3", "guidance=1.0", "prompt_count=1",
     "rewards.tiny_count.object_area=2.0", "rewards.tiny_count.role=auxiliary"],
)  # fmt: skip
def test_what_is_asked_is(other: str, tmp_path: Path) -> None:
    assert suite(tmp_path, other).identity != suite(tmp_path).identity


def test_other_words_are_another_suite(tmp_path: Path) -> None:
    before = suite(tmp_path)
    path = written(tmp_path)
    (tmp_path / "prompts.txt").write_text("one red circle\ntwo blue circles\n")
    assert load_suite(path, []).identity != before.identity


def test_generated_prompts_are_of_all_six_tasks() -> None:
    name, count = SUITES / "geneval.yaml", 100
    prompts = load_suite(name, [f"prompts=geneval:{count}"]).texts
    assert len(set(prompts)) == count
    tasks = Counter(request_of(prompt).task for prompt in prompts)
    assert len(tasks) == 6 and max(tasks.values()) - min(tasks.values()) <= 1
    assert load_suite(name, [f"prompts=geneval:{count}"]).texts == prompts
    assert load_suite(name, [f"prompts=geneval:{count}", "seed=1"]).texts != prompts
    many = load_suite(name, ["prompts=geneval:553"]).texts  # more than a sixth is not 80 classes
    assert len(load_suite(name, ["prompts=geneval:2000"]).texts) == 2000
    assert len(many) == 553 and Counter(request_of(p).task for p in many)["single_object"] == 80


@pytest.mark.parametrize("name", ["geneval", "ocr", "drawbench"])
def test_shipped_suites_want_the_users_prompts(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"prompts: no such file: "):
        load_suite(SUITES / f"{name}.yaml", [])
    mine = tmp_path / "mine.txt"
    mine.write_text('a photo of a dog, "WOOF"\n' if name != "geneval" else "a photo of a dog\n")
    found = load_suite(SUITES / f"{name}.yaml", [f"prompts={mine}"])
    assert len(found.texts) == 1
    assert {s.role for s in found.reward_settings.values()} >= {"proxy", "held_out", "features"}


def test_the_tiny_suite_reads() -> None:
    assert len(load_suite(SUITES / "tiny.yaml", []).texts) == 54


def test_a_model_is_told_what_the_suite_asks(tmp_path: Path) -> None:
    found = model_settings(suite(tmp_path, "text_tokens=8", "guidance=2.0"), "builtin:flux")
    assert (found.family, found.size, found.guidance) == ("flux", (32, 32), 2.0)
    default = model_settings(suite(tmp_path), "builtin:sd3")
    assert (default.family, default.guidance, default.text_tokens) == ("sd3", 4.5, 256)
    hub = model_settings(suite(tmp_path), "black-forest-labs/FLUX.1-dev")
    assert (hub.family, hub.guidance) == ("flux", 3.5)


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (None, {}, "MODEL: give a diffusers folder"),
        ("some/model", {}, "say which with --set family=NAME, one of flux, sd3"),
        ("./nowhere", {}, "./nowhere: no diffusers folder"),
        ("builtin:flux", {"lora": Path("no.safetensors")}, "--lora: no.safetensors: no such file"),
        ("builtin:flux", {"step": 3}, "--step: of a run's checkpoint; give --run"),
        ("builtin:flux", {"lora": Path("a"), "run": Path("b")}, "leave out --lora or --run"),
        (None, {"run": Path("no-run")}, "no-run: no checkpoints; name the folder of a run"),
    ],
)
def test_a_bad_contender_is_told_what_is_missing(
    model: str | None, options: dict[str, object], said: str, tmp_path: Path
) -> None:
    asked = suite(tmp_path)
    with pytest.raises(RecipeError) as raised:
        contender(asked, model, **options)
    assert said in str(raised.value)


def test_a_size_that_the_model_has_not_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"builtin:flux: size: .*\[30, 32\]"):
        model_settings(suite(tmp_path, "size=[30, 32]"), "builtin:flux")


# ---- images.jsonl --------------------------------------------------------------------------------

ROWS = [{"image": n, "prompt": n // 2, "rewards": {"a": 0.1 * n, "b": None}} for n in range(4)]


def test_a_log_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    path, of = tmp_path / "images.jsonl", {"model": "m", "suite": {"steps": 2}}
    ImagesLog(path, of).append(ROWS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # the last line is torn
    again = ImagesLog(path, of)
    assert sorted(again.rows) == [0, 1, 2]
    again.append(ROWS[3:])
    assert path.read_bytes() == whole
    columns = ImagesLog(path, of).columns()
    assert columns["reward/a"].tolist() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert columns["reward/b"].isnan().all()


def test_a_log_of_another_evaluation_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "images.jsonl"
    ImagesLog(path, {"model": "m", "suite": {"steps": 2}}).append(ROWS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"\(suite.steps: 2 there, 3 here\); give another --out"):
        ImagesLog(path, {"model": "m", "suite": {"steps": 3}})
    assert path.read_bytes() == before
